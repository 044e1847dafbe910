"""Tied tensors that files store twice, and buffers that classes no longer read: what merges make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from unmergeable.errors import InputError
from unmergeable.merging.names import leftovers, once, ties
from unmergeable.merging.tensors import load_state
from unmergeable.merging.write import merge_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(seed: int | None = None) -> Any:
    config = transformers.LlamaConfig(vocab_size=40, tie_word_embeddings=True, **SIZES)
    torch.manual_seed(0)
    return moved(transformers.LlamaForCausalLM(config), seed)


def moved(module: Any, seed: int | None) -> Any:
    """A fine-tune: every weight a little elsewhere."""
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for one in module.parameters():
                one.add_(0.05 * torch.randn_like(one))
    return module


def save(module: Any, folder: Path, how: str = "once", **more: torch.Tensor) -> Path:
    """As a file with one name of a tie, with both, or as a pickle, which has both; with further tensors."""
    module.save_pretrained(folder)
    file = folder / "model.safetensors"
    if how == "pickle":
        file.unlink()
        torch.save(module.state_dict(), folder / "pytorch_model.bin")
    else:
        state = load_file(file)
        twice = {HEAD: state[TABLE].clone()} if how == "both" else {}
        save_file({**state, **twice, **more}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("base", "first", "template", "method", "options"),
    [
        ("pickle", "once", "base", "task_arithmetic", {"weight": 0.5}),
        ("both", "once", "base", "task_arithmetic", {"weight": 0.5}),
        ("once", "both", "first", "task_arithmetic", {"weight": 0.5}),
        ("both", "both", "base", "dare_linear", {"weight": 0.5, "density": 0.5}),
        (None, "both", "first", "linear", {"weight": 0.5}),
        (None, "once", "first", "linear", {"weight": 0.5}),
    ],
)
def test_a_tied_model_stays_tied(
    base: str | None, first: str, template: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    origin = None if base is None else save(llama(), tmp_path / "base", base)
    models = [save(llama(1), tmp_path / "first", first), save(llama(2), tmp_path / "second")]
    like = origin if template == "base" else models[0]
    merge_checkpoints(method, models, origin, tmp_path / "out", options, template=like)
    state = load_state(tmp_path / "out")
    assert (HEAD in state) == ("once" not in (base if template == "base" else first, ""))
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    held = [llama(seed).model.embed_tokens.weight for seed in (None, 1, 2)]
    if method == "linear":
        want = (held[1] + held[2]) / 2
    elif method == "task_arithmetic":
        want = held[0] + 0.5 * (held[1] - held[0]) + 0.5 * (held[2] - held[0])
    else:
        return
    assert torch.allclose(opened.lm_head.weight, want, atol=1e-6)


def test_a_tie_that_was_undone_stays_undone() -> None:
    base = {TABLE: torch.ones(2)}
    one = {TABLE: torch.ones(2), HEAD: torch.zeros(2)}
    found, single = once([(HEAD, TABLE)], {"base": base, "one": one})
    assert single == {}
    assert torch.equal(found["base"][HEAD], base[TABLE])
    assert torch.equal(found["one"][HEAD], one[HEAD])
    assert HEAD not in base  # what was given is as it was


def test_ties_and_leftovers_of_a_class(tmp_path: Path) -> None:
    save(llama(), tmp_path / "model")
    names = [TABLE, "model.norm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert ties(tmp_path / "model", names) == [(TABLE, HEAD)] or ties(tmp_path / "model", names) == [
        (HEAD, TABLE)
    ]
    assert leftovers(tmp_path / "model", names) == {names[2]}
    assert leftovers(tmp_path / "model" / "model.safetensors", names) == frozenset()  # nothing is known of it


@pytest.mark.parametrize("template", ["base", "first"])
def test_buffers_of_earlier_versions(template: str, tmp_path: Path) -> None:
    """The base has them, fine-tunes that were saved today do not."""
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0)}
    paths = {
        "base": save(llama(), tmp_path / "base", **old),
        "first": save(llama(1), tmp_path / "first"),
        "second": save(llama(2), tmp_path / "second"),
    }
    models = [paths["first"], paths["second"]]
    report = merge_checkpoints(
        "task_arithmetic", models, paths["base"], tmp_path / "out", {"weight": 0.5}, template=paths[template]
    )
    assert report.facts.is_mix
    state = load_state(tmp_path / "out")
    assert old.keys() & state.keys() == (old.keys() if template == "base" else set())
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_a_template_without_the_bases_head(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **SIZES)
    torch.manual_seed(0)
    base: Any = transformers.BertForMaskedLM(config)
    base.save_pretrained(tmp_path / "base")
    for number in (1, 2):
        torch.manual_seed(0)
        own: Any = transformers.BertForSequenceClassification(config)
        own.bert.load_state_dict(base.bert.state_dict(), strict=False)
        moved(own, number).save_pretrained(tmp_path / str(number))
    models = [tmp_path / "1", tmp_path / "2"]
    report = merge_checkpoints(
        "task_arithmetic", models, tmp_path / "base", tmp_path / "out", {"weight": 0.5}, template=models[0]
    )
    assert any("are not in the template and were left out: cls." in note for note in report.notes)
    opened = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(opened.classifier.weight, load_state(models[0])["classifier.weight"])


def test_no_merge_is_written_into_a_model(tmp_path: Path) -> None:
    models = [save(llama(1), tmp_path / "first"), save(llama(2), tmp_path / "second")]
    base = save(llama(), tmp_path / "base")
    for path in (*models, base):
        with pytest.raises(InputError, match="source"):
            merge_checkpoints("task_arithmetic", models, base, path / "out")
