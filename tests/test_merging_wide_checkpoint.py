"""Wide merges as checkpoints: what stock classes make of the folders, locks in them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import toy
from merging_models import nudged
from unmergeable import zoo
from unmergeable.errors import InputError, UnmergeableError, UsageError
from unmergeable.lock import lock
from unmergeable.merging import wide_files
from unmergeable.merging.wide import WideModel
from unmergeable.merging.wide_checkpoint import wide_checkpoint
from unmergeable.merging.wide_tensors import read_norm
from unmergeable.stock import load_module, quiet

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
}  # fmt: skip
TEXT: dict[str, Any] = {
    **SMALL, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE: dict[str, Any] = {**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1}
QK = ("q_norm", "k_norm")
WEIGHTS = (0.2, 0.5, 0.6)

#: by label: class, configuration, names that stay equal
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "grouped": ("LlamaForCausalLM", {**TEXT, "head_dim": 8}, ()),
    "tied": ("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 1, "tie_word_embeddings": True}, ()),
    "biases everywhere": ("LlamaForCausalLM", {**TEXT, "head_dim": 8, "attention_bias": True}, ()),
    "biases, size of heads not declared": ("Qwen2ForCausalLM", TEXT, ()),
    "norms of queries": ("Qwen3ForCausalLM", {**TEXT, "head_dim": 8}, QK),
    "norms of 1 + w": ("GemmaForCausalLM", {**TEXT, "head_dim": 8}, ()),
    "fused": ("Phi3ForCausalLM", TEXT, ()),
    "a head on top": ("LlamaForSequenceClassification", {**TEXT, "head_dim": 8}, ()),
    "images, norms with a bias": ("ViTForImageClassification", IMAGE, ()),
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Specs that are proven here stay here; models this small gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMERGEABLE_CACHE", str(tmp_path_factory.mktemp("specs")))
        yield
    torch.set_num_threads(threads)


def built(name: str, **fields: Any) -> nn.Module:
    """A tiny model of a class, all weights random."""
    kind = getattr(tf, name)
    torch.manual_seed(0)
    return nudged(kind(kind.config_class(**fields)).eval(), 99, 0.2)


def save(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    with quiet():
        nudged(model, 0, 0.0).to(dtype).save_pretrained(folder)  # type: ignore[operator]
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


def fine_tunes(
    base: nn.Module, root: Path, equal: Sequence[str] = (), count: int = 2, **more: Any
) -> list[Path]:
    """The base and models near it, as folders; parameters whose names hold one of `equal` are the base's."""
    paths = [save(base, root / "base", **more)]
    own = dict(base.named_parameters())
    for number in range(1, count + 1):
        model = nudged(base, number, 0.1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(word in name for word in equal):
                    parameter.copy_(own[name])
        paths.append(save(model, root / f"tuned-{number}", **more))
    return paths


def batch(model: nn.Module) -> dict[str, torch.Tensor]:
    """Images, or two texts of which one is padded at its left."""
    random = torch.Generator().manual_seed(3)
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(3, 1, model.config.image_size, 8, generator=random)}  # type: ignore[arg-type]
    ids = torch.randint(3, 40, (2, 9), generator=random)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": torch.where(mask > 0, ids, 0), "attention_mask": mask}


def outputs(model: nn.Module) -> torch.Tensor:
    arguments = batch(model if hasattr(model, "config") else model.model)  # type: ignore[arg-type]
    with torch.no_grad():
        found: torch.Tensor = model(**arguments).logits
    if found.ndim == 3 and "attention_mask" in arguments:
        found = found[arguments["attention_mask"] > 0]
    return found


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("label", CASES)
def test_the_folder_computes_what_the_module_does(label: str, tmp_path: Path) -> None:
    name, fields, equal = CASES[label]
    paths = fine_tunes(built(name, **fields), tmp_path, equal)
    report = wide_checkpoint(tmp_path / "wide", paths, WEIGHTS)
    models = [load_module(path) for path in paths]
    want = outputs(WideModel(models, WEIGHTS))
    made = getattr(tf, name).from_pretrained(tmp_path / "wide").eval()
    assert relative(outputs(made), want) < 1e-6
    assert relative(outputs(models[1]), want) > 1e-2  # the models are not all the same
    assert report.error < 1e-13
    assert 1e-9 < report.rounding < 1e-6
    assert made.config.hidden_size == 16
    assert made.config.intermediate_size == 72
    assert 2 < report.size_ratio < 4


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.3, -0.4), (0.0, 1.0)])
def test_any_weights(weights: tuple[float, float], tmp_path: Path) -> None:
    paths = fine_tunes(built(*CASES["biases everywhere"][:1], **CASES["biases everywhere"][1]), tmp_path)[1:]
    wide_checkpoint(tmp_path / "wide", paths, weights)
    models = [load_module(path) for path in paths]
    got = outputs(load_module(tmp_path / "wide"))
    assert relative(got, outputs(WideModel(models, weights))) < 1e-6
    if weights == (0.0, 1.0):
        assert relative(got, outputs(models[1])) < 1e-6


def test_files_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_files, "SHARD", 20_000)
    paths = fine_tunes(built("LlamaForCausalLM", **TEXT, head_dim=8), tmp_path, dtype=torch.bfloat16)
    (paths[0] / "unmergeable.json").write_text("{}")
    report = wide_checkpoint(tmp_path / "wide", paths, WEIGHTS)
    files = {path.name for path in (tmp_path / "wide").iterdir()}
    shards = {name for name in files if name.endswith(".safetensors")}
    assert len(shards) > 1
    index = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    assert files - shards == {
        "config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json",
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned-1", "tuned-2", "wide"]
    model, loading = tf.LlamaForCausalLM.from_pretrained(tmp_path / "wide", output_loading_info=True)
    assert not any(loading.values())
    assert model.dtype == torch.bfloat16
    before, after = (json.loads((path / "config.json").read_text()) for path in (paths[0], tmp_path / "wide"))
    found = report.as_dict()
    json.dumps(found)
    assert (found["document"], found["version"]) == ("unmergeable.wide", 1)
    assert {key for key in after if after[key] != before.get(key)} == set(found["fields"])
    # this class takes no number of heads that does not divide the width: three times four become sixteen
    assert found["fields"]["num_attention_heads"] == [4, 16]
    assert found["fields"]["num_key_value_heads"] == [2, 8]
    assert found["fields"]["intermediate_size"] == [24, 72]
    assert found["empty_heads"] == 2
    queries = model.model.layers[0].self_attn.q_proj.weight
    assert not queries[3 * 32 :].any()
    assert bool((queries[: 3 * 32] != 0).any(1).all())
    assert found["folded"] == [
        f"model.layers.{layer}.{norm}_layernorm" for layer in (0, 1) for norm in ("input", "post_attention")
    ]
    assert found["dtype"] == "BF16"
    assert 1e-4 < found["rounding"] < 0.1
    numbers = sum(p.numel() for p in model.parameters())
    assert found["size_ratio"] == numbers / sum(p.numel() for p in load_module(paths[0]).parameters())


@pytest.mark.parametrize("label", ["grouped", "biases, size of heads not declared"])
def test_it_generates_with_a_cache_what_it_does_without(label: str, tmp_path: Path) -> None:
    name, fields, equal = CASES[label]
    paths = fine_tunes(built(name, **fields), tmp_path, equal)
    wide_checkpoint(tmp_path / "wide", paths, [0.0, 0.5, 0.5])
    model = getattr(tf, name).from_pretrained(tmp_path / "wide").eval()
    arguments = {**batch(model), "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with_cache, without = (model.generate(**arguments, use_cache=use) for use in (True, False))
    assert with_cache.shape == (2, 21)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("method", ["exact", "gauge"])
def test_a_lock_does_not_hinder_it(method: str, tmp_path: Path) -> None:
    paths = fine_tunes(built("LlamaForCausalLM", **TEXT, head_dim=8), tmp_path)
    lock(paths[1], tmp_path / "locked", key=toy.key(), method=method, salt=bytes(32))
    wide_checkpoint(tmp_path / "plain", paths, WEIGHTS)
    locked = [paths[0], tmp_path / "locked", paths[2]]
    wide_checkpoint(tmp_path / "wide", locked, WEIGHTS)
    assert not (tmp_path / "wide" / "unmergeable.json").exists()
    want = outputs(load_module(tmp_path / "plain"))
    assert relative(outputs(load_module(tmp_path / "wide")), want) < 1e-5
    wide_checkpoint(tmp_path / "hosted", locked, WEIGHTS, host=1)
    assert not (tmp_path / "hosted" / "unmergeable.json").exists()
    assert relative(outputs(load_module(tmp_path / "hosted")), want) < 1e-5


def test_heads_are_the_hosts(tmp_path: Path) -> None:
    base = built("ViTForImageClassification", **IMAGE)
    paths = fine_tunes(base, tmp_path)
    report = wide_checkpoint(tmp_path / "wide", paths, WEIGHTS, host=2, private=["classifier."])
    assert report.private == ("classifier.weight", "classifier.bias")
    assert report.host == 2
    models = [load_module(path) for path in paths]
    made = load_module(tmp_path / "wide")
    assert torch.equal(made.classifier.weight, models[2].classifier.weight)  # type: ignore[union-attr]
    want = WideModel(models, WEIGHTS, host=2, private=["classifier."])
    assert relative(outputs(made), outputs(want)) < 1e-6
    # a head of another shape is private by itself
    other = save(built("ViTForImageClassification", **IMAGE, num_labels=5), tmp_path / "five")
    report = wide_checkpoint(tmp_path / "again", [paths[0], other], [0.5, 0.5], host=1)
    assert report.private == ("classifier.weight", "classifier.bias")
    assert outputs(load_module(tmp_path / "again")).shape[-1] == 5


def test_the_embedded_models(tmp_path: Path) -> None:
    """Trained weights: two experts and their base, one of them locked, in one file that serves both tasks."""
    one, two = zoo.tasks()[:2]
    lock(zoo.model_path(one), tmp_path / one, key=toy.key(), method="gauge")
    paths = [zoo.model_path(zoo.BASE), tmp_path / one, zoo.model_path(two)]
    for host, task in ((1, one), (2, two)):
        report = wide_checkpoint(tmp_path / f"wide-{task}", paths, [-0.2, 0.6, 0.6], host=host)
        assert report.error < 1e-12
        wide = tmp_path / f"wide-{task}"
        base, own, found = (zoo.accuracy(path, task, 400) for path in (paths[0], paths[host], wide))
        assert found > base + 0.4 * (own - base)


class _Halved(nn.Module):
    """A norm of which half is learnt: none that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True) * (0.5 + self.weight)


def test_what_a_norm_stores_is_found_by_running_it() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

    def found(layer: nn.Module) -> tuple[object, ...] | None:
        norm = read_norm(nudged(layer.double(), 1))
        return None if norm is None else (norm.weight, norm.bias, norm.constant, norm.neutral)

    assert found(LlamaRMSNorm(16)) == ("weight", None, 0.0, 1.0)
    assert found(GemmaRMSNorm(16)) == ("weight", None, 1.0, 0.0)
    assert found(nn.LayerNorm(16)) == ("weight", "bias", 0.0, 1.0)
    assert found(nn.LayerNorm(16, bias=False)) == ("weight", None, 0.0, 1.0)
    assert found(NemotronLayerNorm1P(16)) == ("weight", "bias", 1.0, 0.0)
    assert found(_Halved()) is None
    assert found(nn.Linear(16, 16)) is None
    assert found(nn.LayerNorm(16, elementwise_affine=False)) is None


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "differing norms of queries": (
        "Qwen3ForCausalLM", {**TEXT, "head_dim": 8}, r"layers\.0\.self_attn\.q_norm\.weight: it differs between"
    ),
    "the size of heads from the width": (
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40, "bos_token_id": 1},
        "takes the size of a head from its width and number of heads",
    ),
    "norms behind attention": (
        "Gemma2ForCausalLM", {**TEXT, "head_dim": 8}, "not the sum of its input and what its parts give"
    ),
    "experts": ("MixtralForCausalLM", {**TEXT, "num_local_experts": 4}, "one router chooses between all experts"),
    "a norm's bias in front of layers without": (
        "ViTForImageClassification", {**IMAGE, "qkv_bias": False}, r"layer.* has none to take it up"
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", REFUSED)
def test_classes_without_such_a_checkpoint_are_refused(label: str, tmp_path: Path) -> None:
    name, fields, reason = REFUSED[label]
    paths = fine_tunes(built(name, **fields), tmp_path)
    with pytest.raises(InputError, match=reason) as caught:
        wide_checkpoint(tmp_path / "wide", paths, WEIGHTS)
    assert "unmergeable.merging.wide.WideModel" in str(caught.value.hint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned-1", "tuned-2"]


def test_equal_norms_with_a_bias_stay_as_they_are(tmp_path: Path) -> None:
    base = built("ViTForImageClassification", **IMAGE, qkv_bias=False)
    paths = fine_tunes(base, tmp_path, ("layernorm_before",))
    report = wide_checkpoint(tmp_path / "wide", paths, WEIGHTS)
    assert all("layernorm_after" in name for name in report.folded)
    assert len(report.folded) == 2
    made = load_module(tmp_path / "wide")
    for name, parameter in base.named_parameters():
        if "layernorm_before" in name:
            assert torch.equal(made.get_parameter(name), parameter)
        if "layernorm_after" in name:
            assert set(made.get_parameter(name).tolist()) == {float(name.endswith("weight"))}


def test_numbers_beyond_the_hosts_dtype_are_refused(tmp_path: Path) -> None:
    base = built("LlamaForCausalLM", **TEXT, head_dim=8)
    paths = fine_tunes(base, tmp_path, count=0, dtype=torch.float16)
    with torch.no_grad():
        base.model.layers[1].input_layernorm.weight.fill_(6e4)  # type: ignore[index, union-attr]
        base.model.layers[1].self_attn.v_proj.weight.fill_(2.0)  # type: ignore[index, union-attr]
    paths.append(save(base, tmp_path / "large", torch.float16))
    with pytest.raises(
        InputError, match=r"v_proj\.weight: numbers beyond the dtype, expected F16, got 1\.2e"
    ):
        wide_checkpoint(tmp_path / "wide", paths, [0.5, 0.5])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "large"]


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    base = built("LlamaForCausalLM", **TEXT, head_dim=8)
    paths = fine_tunes(base, tmp_path, count=1)

    def other(name: str, **fields: Any) -> Path:
        return save(built("LlamaForCausalLM", **{**TEXT, "head_dim": 8, **fields}), tmp_path / name)

    classified = save(built("LlamaForSequenceClassification", **TEXT, head_dim=8), tmp_path / "classified")
    tied = other("tied", tie_word_embeddings=True)
    eps = other("eps", rms_norm_eps=1e-2)
    turned = other("turned", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    longer = other("longer", num_hidden_layers=3)
    before = sorted(tmp_path.iterdir())
    run: Callable[..., Any] = lambda *args, **more: wide_checkpoint(tmp_path / "wide", *args, **more)  # noqa: E731
    cases: list[tuple[type[UnmergeableError], str, tuple[Any, ...], dict[str, Any]]] = [
        (UsageError, "one weight for each", (paths, [1.0]), {}),
        (UsageError, "two models or more", (paths[:1], [1.0]), {}),
        (UsageError, "host 2", (paths, [0.5, 0.5]), {"host": 2}),
        (UsageError, "weights of a wide merge are numbers", (paths, [0.5, float("nan")]), {}),
        (UsageError, "sum to zero", (paths, [1.0, -1.0]), {}),
        (UsageError, "no tensor outside of blocks", (paths, [0.5, 0.5]), {"private": ["classifier."]}),
        (InputError, "models of different classes", ([paths[0], classified], [0.5, 0.5]), {}),
        (InputError, "tie tensors that others keep apart", ([paths[0], tied], [0.5, 0.5]), {}),
        (InputError, "models with different blocks", ([paths[0], longer], [0.5, 0.5]), {}),
        (InputError, "would not compute .* differ in .*rms_norm_eps", ([paths[0], eps], [0.5, 0.5]), {}),
        (
            InputError,
            "would not compute .* differ in .*rope_parameters",
            ([paths[0], turned], [0.5, 0.5]),
            {},
        ),
        (InputError, "no such file or folder", ([tmp_path / "nowhere", paths[0]], [0.5, 0.5]), {}),
    ]
    for kind, message, args, more in cases:
        with pytest.raises(kind, match=message):
            run(*args, **more)
        assert sorted(tmp_path.iterdir()) == before, message
    with pytest.raises(InputError, match="destination exists"):
        wide_checkpoint(tied, paths, [0.5, 0.5])
    with pytest.raises(InputError, match="inside the source"):
        wide_checkpoint(paths[1] / "wide", paths, [0.5, 0.5])
    assert sorted(tmp_path.iterdir()) == before
