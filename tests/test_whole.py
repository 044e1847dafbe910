"""Checkpoints that are not whole: what stock loaders would draw at random or refuse is refused, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import toy
import unmergeable as um
from unmergeable import specs
from unmergeable.errors import Contradiction, InputError
from unmergeable.match import match_spec
from unmergeable.spec import Rest, Spec
from unmergeable.stock import quiet

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_cache")]
WEIGHTS = "model.safetensors"
TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    "pad_token_id": 0,
}  # fmt: skip
IMAGE = {**{name: TEXT[name] for name in list(TEXT)[1:5]}, "image_size": 16, "patch_size": 8}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
T5 = {
    "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2,
}  # fmt: skip
WHISPER = {
    "vocab_size": 120, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 16,
    "max_source_positions": 50, "max_target_positions": 64, "pad_token_id": 0,
}  # fmt: skip
CLIP = {"max_position_embeddings": 20, "projection_dim": 24}
UNTIED = {"tie_word_embeddings": False}

#: (class, config class, fields)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "tie_word_embeddings": True}),
    ("LlamaForCausalLM", "LlamaConfig", {**TEXT, **UNTIED}),
    ("LlamaForSequenceClassification", "LlamaConfig", TEXT),
    ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TEXT, "rotary_pct": 0.25}),
    ("GPT2LMHeadModel", "GPT2Config", GPT2),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT2, **UNTIED}),
    ("BertModel", "BertConfig", TEXT),
    ("BertForMaskedLM", "BertConfig", TEXT),
    ("BertForSequenceClassification", "BertConfig", TEXT),
    ("ViTForImageClassification", "ViTConfig", IMAGE),
    ("T5ForConditionalGeneration", "T5Config", T5),
    ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu", **UNTIED}),
    ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    ("CLIPTextModel", "CLIPTextConfig", {**TEXT, **CLIP}),
    (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**TEXT, **CLIP},
            "vision_config": {**IMAGE, "projection_dim": 24},
            "projection_dim": 24,
        },
    ),
]


def make(case: tuple[str, str, dict[str, Any]], folder: Path, **options: Any) -> Path:
    name, config, fields = case
    given = getattr(transformers, config)(**copy.deepcopy(fields))
    torch.manual_seed(0)
    with quiet():
        getattr(transformers, name)(given, **options).save_pretrained(folder)
    return folder


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], **fields: Any) -> Path:
    """Edit the tensors of a checkpoint and fields of its config.json."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def llama(folder: Path, **fields: Any) -> Path:
    return make(("LlamaForCausalLM", "LlamaConfig", {**TEXT, **fields}), folder)


def refused(path: Path, text: str) -> str:
    target = path.parent / "locked"
    with pytest.raises(InputError, match=text) as caught:
        um.lock(path, target, key=toy.key())
    assert not target.exists()
    return str(caught.value)


def locks(path: Path) -> Any:
    target, back = path.parent / f"{path.name}-locked", path.parent / f"{path.name}-back"
    report = um.lock(path, target, key=toy.key())
    um.unlock(target, back, key=toy.key())
    assert (path / WEIGHTS).read_bytes() == (back / WEIGHTS).read_bytes()
    return report


# --- missing tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2].get('tie_word_embeddings')}")
def test_a_tensor_is_missed_exactly_where_stock_loaders_miss_it(
    case: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    path = make(case, tmp_path / "model")
    tensors, config = load_file(path / WEIGHTS), json.loads((path / "config.json").read_text())
    cls = getattr(transformers, case[0])
    own = cls.config_class.from_pretrained(path)
    specs.find_spec(config, {name: tuple(t.shape) for name, t in tensors.items()}, prove=False)
    for gone in tensors:
        rest = {name: tensor for name, tensor in tensors.items() if name != gone}
        try:
            with quiet():
                _, report = cls.from_pretrained(
                    None, config=copy.deepcopy(own), state_dict=dict(rest), output_loading_info=True
                )
            lost = bool(report["missing_keys"])
        except RuntimeError:  # experts that are stacked while they are loaded: one of them is not there
            lost = True
        try:
            specs.find_spec(config, {name: tuple(t.shape) for name, t in rest.items()}, prove=False)
            missed = False
        except Contradiction:
            missed = True
        assert missed == lost, gone


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"]
)
def test_a_missing_embedding_or_norm(name: str, tmp_path: Path) -> None:
    path = change(llama(tmp_path / "model"), lambda tensors: tensors.pop(name))
    assert "at random" in refused(path, f"missing {name}")


def test_several_missing_norms_are_named_once(tmp_path: Path) -> None:
    def without(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            del tensors[f"model.layers.{layer}.input_layernorm.weight"]

    refused(
        change(llama(tmp_path / "model"), without), r"missing model.layers.0.\w+.weight and 1 more like it"
    )


def test_a_missing_norm_of_a_class_that_is_proven_now(tmp_path: Path) -> None:
    path = llama(tmp_path / "model", hidden_act="relu", head_dim=16)
    locks(path)
    name = "model.layers.1.post_attention_layernorm.weight"
    refused(change(path, lambda tensors: tensors.pop(name)), f"missing {name}")


@pytest.mark.parametrize(("tied", "fine"), [(True, True), (False, False)])
def test_a_head_may_be_missing_where_it_is_tied(tied: bool, fine: bool, tmp_path: Path) -> None:
    path = llama(tmp_path / "model", **UNTIED)
    change(path, lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=tied)
    if fine:
        locks(path)
    else:
        refused(path, "missing lm_head.weight")


def test_a_tied_head_may_be_there_and_may_stand_for_the_embedding(tmp_path: Path) -> None:
    path = llama(tmp_path / "model", tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    locks(change(path, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()})))
    change(path, lambda tensors: tensors.pop(embedding))
    specs.find_spec(
        json.loads((path / "config.json").read_text()),
        {name: tuple(t.shape) for name, t in load_file(path / WEIGHTS).items()},
        prove=False,
    )


@pytest.mark.parametrize(
    "case",
    [
        ("BertModel", "BertConfig", TEXT),
        ("ViTModel", "ViTConfig", IMAGE),
        ("RobertaModel", "RobertaConfig", TEXT),
    ],
    ids=lambda case: case[0],
)
def test_a_pooler_is_there_or_not_but_not_in_part(
    case: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    locks(make(case, tmp_path / "with"))
    locks(make(case, tmp_path / "without", add_pooling_layer=False))
    half = change(make(case, tmp_path / "half"), lambda tensors: tensors.pop("pooler.dense.bias"))
    refused(half, "missing pooler.dense.bias")


def test_a_bare_body_needs_no_head(tmp_path: Path) -> None:
    """`architectures` often keeps the class that was trained, while the body alone was saved."""
    path = make(("BertModel", "BertConfig", TEXT), tmp_path / "model", add_pooling_layer=False)
    change(path, dict, architectures=["BertForMaskedLM"])
    locks(path)
    refused(
        change(path, lambda tensors: tensors.pop("embeddings.word_embeddings.weight")),
        "missing bert.embeddings.word",
    )


# --- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [90, 104], ids=["fewer", "padded"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_the_embedding_that_the_config_does_not_say(rows: int, tied: bool, tmp_path: Path) -> None:
    """As stock loaders: neither fewer than vocab_size nor more."""
    path = llama(tmp_path / "model", tie_word_embeddings=tied)
    change(path, dict, vocab_size=2 * 96 - rows)
    with quiet(), pytest.raises(RuntimeError, match="mismatch"):
        transformers.LlamaForCausalLM.from_pretrained(path)
    refused(path, r"embed_tokens.weight: axis 0 is 'vocab_size' = \d+ by the config, got 96")


def test_a_padded_vocabulary_that_the_config_says(tmp_path: Path) -> None:
    locks(llama(tmp_path / "model", vocab_size=128))


def test_positions_that_the_config_does_not_say(tmp_path: Path) -> None:
    path = change(make(("GPT2LMHeadModel", "GPT2Config", GPT2), tmp_path / "model"), dict, n_positions=64)
    refused(path, "wpe.weight: axis 0 is 'n_positions' = 64 by the config, got 32")


# --- weights that the class does not read ---------------------------------------------------------------------


def test_half_a_model_under_the_name_of_the_other_half_is_remarked(tmp_path: Path) -> None:
    path = make(("T5ForConditionalGeneration", "T5Config", T5), tmp_path / "model")
    decoder = [name for name in load_file(path / WEIGHTS) if name.startswith("decoder.")]
    report = locks(change(path, dict, architectures=["T5EncoderModel"]))
    remarks = [(site, reason) for _, site, reason in report.refused if "not locked" in reason]
    said = f"loaders of T5EncoderModel drop what is here, so it is not locked: {len(decoder)} tensors"
    assert remarks == [("decoder", said)]
    before, after = (load_file(each / WEIGHTS) for each in (path, tmp_path / "model-locked"))
    assert all(torch.equal(before[name], after[name]) for name in decoder)
    alone = locks(make(("T5EncoderModel", "T5Config", T5), tmp_path / "alone"))
    assert not any("not locked" in reason for *_, reason in alone.refused)


def test_masks_of_old_files_are_no_weights(tmp_path: Path) -> None:
    path = make(("GPT2LMHeadModel", "GPT2Config", GPT2), tmp_path / "model")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(2)}
    report = locks(change(path, lambda tensors: tensors.update(masks)))
    assert not any("not locked" in reason for *_, reason in report.refused)


# --- parts of a pipeline -------------------------------------------------------------------------------------


def pipeline(root: Path) -> tuple[Path, Path]:
    """A pipeline of two text encoders, and the folder of the second."""
    case = ("CLIPTextModel", "CLIPTextConfig", {**TEXT, **CLIP})
    index = {"_class_name": "Pipe"}
    for name in ("one", "two"):
        make(case, root / name)
        index |= {name: ["transformers", "CLIPTextModel"]}
    (root / "model_index.json").write_text(json.dumps(index))
    return root, root / "two"


def test_a_part_that_contradicts_its_config_is_not_passed_through(tmp_path: Path) -> None:
    root, part = pipeline(tmp_path / "pipe")
    change(part, dict, vocab_size=100)
    assert "two" in refused(root, "axis 0 is 'vocab_size' = 100 by the config, got 96")
    change(part, dict, vocab_size=96, model_type="bert")
    refused(root, "name different models")
    change(part, lambda tensors: tensors.popitem(), model_type="clip_text_model")
    refused(root, "missing")


def test_a_part_with_other_names_is_passed_through(tmp_path: Path) -> None:
    """Names that no spec knows say nothing of damage."""
    root, part = pipeline(tmp_path / "pipe")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "self_attn" in name:
                tensors[name.replace("self_attn", "attention")] = tensors.pop(name)

    change(part, rename)
    report = um.lock(root, tmp_path / "locked", key=toy.key())
    assert list(report.passed_through) == ["two"]


# --- the spec ------------------------------------------------------------------------------------------------


def toy_with(**rest: Rest) -> Spec:
    return replace(
        Spec.from_dict(toy.spec_dict()), rest={name.replace("__", "."): one for name, one in rest.items()}
    )


def test_what_is_known_of_the_rest_is_kept_and_no_part_of_the_digest() -> None:
    plain = toy_with()
    more = toy_with(embed=Rest("", "", False, {0: "vocab | other"}))
    again = Spec.from_dict(json.loads(json.dumps(more.as_dict())))
    assert again == more
    assert again.untouched == plain.untouched
    assert again.digest == plain.digest


def test_fields_that_the_config_lacks_are_not_compared() -> None:
    shapes = {name: array.shape for name, array in toy.tensors().items()}
    match_spec(toy_with(embed=Rest(sizes={0: "nothing"})), shapes, toy.CONFIG)
    match_spec(toy_with(embed=Rest(sizes={0: "kv | heads | v"})), shapes, {**toy.CONFIG, "v": toy.VOCAB})
    with pytest.raises(Contradiction, match="axis 0"):
        match_spec(toy_with(embed=Rest(sizes={0: "v"})), shapes, {**toy.CONFIG, "v": toy.VOCAB + 1})
