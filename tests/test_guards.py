"""Checkpoints that say two things of themselves, and symmetries that a small model hides: wrong locks, all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import toy
import unmergeable as um
from unmergeable.errors import InputError
from unmergeable.methods import context as methods_context
from unmergeable.spec import Spec
from unmergeable.specs import shipped
from unmergeable.specs.guards import check_agrees
from unmergeable.stock import load_module

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_cache")]
TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def saved(module: Any, folder: Path, scale: float = 1.0, **fields: Any) -> Path:
    """A model with random weights, and with fields of its config.json changed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in module.parameters():
            width = one.shape[-1] if one.ndim > 1 else 10
            start = one if one.ndim < 2 else torch.zeros_like(one)
            one.copy_(start + scale * torch.randn(one.shape, generator=generator) / width**0.5)
    module.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def llama(folder: Path, layers: int = 3, **fields: Any) -> Path:
    config = transformers.LlamaConfig(**TINY, num_hidden_layers=layers)
    return saved(transformers.LlamaForCausalLM(config), folder, **fields)


def whisper(folder: Path, encoder: int = 4, decoder: int = 4, heads: Any = None) -> Path:
    config = transformers.WhisperConfig(
        vocab_size=120, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=encoder,
        decoder_attention_heads=decoder, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16,
        max_source_positions=50, max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3,
    )  # fmt: skip
    module = transformers.WhisperForConditionalGeneration(config)
    if heads is not None:
        module.generation_config.alignment_heads = heads
    return saved(module, folder)


def apart(one: Path, other: Path, inputs: Mapping[str, torch.Tensor]) -> float:
    """How far the outputs of two checkpoints are, relatively, in fp64."""
    found = []
    for path in (one, other):
        module = load_module(path).double()
        with torch.no_grad():
            found.append(module(**inputs).logits)
    return float((found[0] - found[1]).norm() / found[0].norm())


def refused(path: Path, text: str, **options: Any) -> None:
    target = path.with_name("locked")
    with pytest.raises(InputError, match=text):
        um.lock(path, target, key=toy.key(), **options)
    assert not target.exists()


TOKENS = {"input_ids": torch.arange(3, 21).reshape(2, 9)}
SPEECH = {
    "input_features": torch.randn(1, 16, 100, generator=torch.Generator().manual_seed(1)).double(),
    "decoder_input_ids": torch.tensor([[3, 5, 7]]),
}


# --- refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 2), (2, 4)])
def test_towers_with_different_numbers_of_heads(heads: tuple[int, int], tmp_path: Path) -> None:
    refused(whisper(tmp_path / "model", *heads), "different numbers of heads")


def test_a_spec_of_ones_own_is_no_way_around(tmp_path: Path) -> None:
    path = whisper(tmp_path / "model", 4, 2)
    (spec,) = shipped("WhisperForConditionalGeneration")
    (tmp_path / "spec.json").write_text(json.dumps(spec.as_dict()))
    for own in (tmp_path / "spec.json", spec):
        refused(path, "different numbers of heads", spec=own)
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    refused(saved(bert, tmp_path / "bert"), "another configuration|not what its config says", spec=spec)


def test_a_spec_of_ones_own_reads_other_spellings(tmp_path: Path) -> None:
    """Where the class takes a field by another name, its default is not what counts."""
    config = transformers.DistilBertConfig(
        dim=96, hidden_dim=64, n_layers=1, n_heads=8, vocab_size=50, max_position_embeddings=32
    )
    path = saved(transformers.DistilBertForMaskedLM(config), tmp_path / "model")
    fields = json.loads((path / "config.json").read_text())
    fields["num_attention_heads"] = fields.pop("n_heads")
    (path / "config.json").write_text(json.dumps(fields))
    (spec,) = shipped("DistilBertForMaskedLM")
    um.lock(path, tmp_path / "locked", key=toy.key(), spec=spec)
    assert apart(path, tmp_path / "locked", TOKENS) < 1e-9


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"decoder": {"encoder_attention_heads": 16, "decoder_attention_heads": 4}},
            "decoder.encoder_attention_heads",
        ),
        ({"text": {"num_heads": 4}, "image": {"num_heads": [2, 8]}}, "text.num_heads = image.num_heads[0]"),
    ],
)
def test_numbers_of_heads_that_no_proof_told_apart(config: dict[str, Any], said: str) -> None:
    alike = {"alike": [["text.num_heads", "image.num_heads[0]", "sound.num_heads"]]}
    spec = Spec.from_dict({**toy.spec_dict(), "evidence": alike})
    same = {
        "text": {"num_heads": 4},
        "image": {"num_heads": [4, 8]},
        "decoder": {"decoder_attention_heads": 4},
    }
    check_agrees(spec, {}, same, "config.json")
    with pytest.raises(InputError, match="different numbers of heads") as caught:
        check_agrees(spec, {}, config, "config.json")
    assert said in str(caught.value)


def test_a_type_that_the_class_is_not_of(tmp_path: Path) -> None:
    """Loaders go by model_type: what they open is not what was proven."""
    helium = transformers.HeliumForCausalLM(
        transformers.HeliumConfig(**TINY, num_hidden_layers=2, head_dim=8)
    )
    path = saved(helium, tmp_path / "model", architectures=["LlamaForCausalLM"])
    refused(path, "name different models")


def test_code_of_its_own(tmp_path: Path) -> None:
    own = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    refused(llama(tmp_path / "model", auto_map=own), "code of its own")
    path = llama(tmp_path / "tokenizer", auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]})
    um.lock(path, tmp_path / "locked", key=toy.key())


@pytest.mark.parametrize(("given", "other"), [("num_attention_heads", 2), ("hidden_size", 64)])
def test_spellings_that_disagree(given: str, other: int, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    path = saved(transformers.GPT2LMHeadModel(config), tmp_path / "model", **{given: other})
    refused(path, "two spellings of one field disagree")


@pytest.mark.parametrize("said", [5, 7])
def test_layers_that_the_config_does_not_say(said: int, tmp_path: Path) -> None:
    refused(llama(tmp_path / "model", num_hidden_layers=said), "3 layers of model.layers.")


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    path = llama(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(rest, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, r"no tensor of model.layers.1\b")


def test_a_module_of_a_class_of_ones_own() -> None:
    class Mine(transformers.LlamaForCausalLM):
        pass

    config = transformers.LlamaConfig(**TINY, num_hidden_layers=2, architectures=["LlamaForCausalLM"])
    with pytest.raises(InputError, match="a class that is not one of transformers'"):
        um.lock_module(Mine(config), key=toy.key())
    um.lock_module(transformers.LlamaForCausalLM(config), key=toy.key())


# --- right ---------------------------------------------------------------------------------------------------


def test_heads_that_are_called_by_their_numbers_keep_them(tmp_path: Path) -> None:
    """Whisper's word timestamps are read off heads of the decoder's cross-attention, by number."""
    path = whisper(tmp_path / "model", heads=[[1, 2], [1, 0]])
    report = um.lock(path, tmp_path / "locked", key=toy.key())
    assert any("alignment_heads" in reason for *_, reason in report.refused)
    assert apart(path, tmp_path / "locked", SPEECH) < 1e-9
    query = "model.decoder.layers.1.encoder_attn.q_proj.weight"
    before, after = (load_file(one / "model.safetensors")[query] for one in (path, tmp_path / "locked"))
    assert not torch.equal(before, after)
    # What the lock does to a head's rows stays within them: their sums of squares are where they were.
    sums = [tensor.double().square().reshape(4, 8, 32).sum((1, 2)) for tensor in (before, after)]
    assert torch.allclose(*sums, rtol=1e-6)
    um.unlock(tmp_path / "locked", tmp_path / "again", key=toy.key())
    one, two = (load_file(each / "model.safetensors") for each in (path, tmp_path / "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    plain = um.lock(whisper(tmp_path / "plain"), tmp_path / "locked-plain", key=toy.key())
    assert not any("alignment_heads" in reason for *_, reason in plain.refused)


def test_heads_of_a_module_that_are_called_by_their_numbers_keep_them(tmp_path: Path) -> None:
    named = [[1, 2], [1, 0]]
    module = transformers.WhisperForConditionalGeneration.from_pretrained(
        whisper(tmp_path / "model"), attn_implementation="eager"
    )
    module = module.double().eval()
    module.generation_config.alignment_heads = named

    def maps() -> torch.Tensor:
        with torch.no_grad():
            found = module(**SPEECH, output_attentions=True).cross_attentions
        return torch.stack([found[layer][:, head] for layer, head in named])

    before = maps()
    um.lock_module(module, key=toy.key())
    assert torch.allclose(maps(), before, atol=1e-9)


@pytest.mark.parametrize("method", [{"scales": True}, {"method": "gauge"}], ids=["scales", "gauge"])
def test_activations_that_are_cut_off(method: dict[str, Any], tmp_path: Path) -> None:
    """A bound that a small model never reaches allows more than the real one does."""
    config = transformers.OlmoConfig(**TINY, num_hidden_layers=2, clip_qkv=8.0)
    path = saved(transformers.OlmoForCausalLM(config), tmp_path / "model", scale=4.0)
    um.lock(path, tmp_path / "locked", key=toy.key(), **method)
    assert apart(path, tmp_path / "locked", TOKENS) < 1e-4


def test_numbers_that_differ_from_layer_to_layer(tmp_path: Path) -> None:
    """Layers without positions first, others after: a miniature needs some of both."""
    config = transformers.GraniteSWAConfig(
        **TINY,
        num_hidden_layers=8,
        layer_types=["full_attention"] * 8,
        layer_rope_theta=[0.0] * 4 + [1e4] * 4,
    )
    path = saved(transformers.GraniteSWAForCausalLM(config), tmp_path / "model")
    um.lock(path, tmp_path / "locked", key=toy.key())
    assert apart(path, tmp_path / "locked", TOKENS) < 1e-6  # angles are in float32 there


def test_two_sites_in_one_place_have_choices_of_their_own(tmp_path: Path) -> None:
    """Where a part of a head is rotated: what cannot be scaled in one part is no matter of the other."""
    config = transformers.PhiConfig(**TINY, num_hidden_layers=2, partial_rotary_factor=0.5)
    path = saved(transformers.PhiForCausalLM(config).half(), tmp_path / "model")
    report = um.lock(path, tmp_path / "locked", key=toy.key(), scales=True)
    names = [site.site for site in report.sites]
    assert len(names) == len(set(names))
    assert {"model.layers.{l}.self_attn.qk", "model.layers.{l}.self_attn.qk.n"} <= set(names)
    assert apart(path, tmp_path / "locked", TOKENS) < 1e-6
    um.unlock(tmp_path / "locked", tmp_path / "again", key=toy.key())
    assert (path / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_sites_of_one_name_are_refused(tmp_path: Path) -> None:
    """They would draw from one stream, and the choices of one would be recorded in the place of the other's."""
    data = toy.spec_dict()
    data["sites"][1]["name"] = data["sites"][0]["name"]
    path = toy.write(tmp_path / "model", toy.tensors())
    refused(path, "two sites of the spec have one name", spec=Spec.from_dict(data))


def test_no_shipped_spec_has_two_sites_of_one_name() -> None:
    for spec in shipped(""):
        names = [site.name for site in spec.sites]
        assert len(names) == len(set(names)), spec.architecture


def test_a_lock_with_sites_of_one_name_is_undone_as_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = toy.spec_dict()
    data["sites"][1]["name"] = data["sites"][0]["name"]
    path = toy.write(tmp_path / "model", toy.tensors())
    with monkeypatch.context() as patched:
        patched.setattr(methods_context, "_check_names", lambda match: None)
        um.lock(path, tmp_path / "locked", key=toy.key(), spec=Spec.from_dict(data))
    um.unlock(tmp_path / "locked", tmp_path / "again", key=toy.key())
    assert toy.tree(path) == toy.tree(tmp_path / "again")


def test_a_module_whose_class_is_proven_now_and_has_labels() -> None:
    """Its config in memory has numbers for keys, which config.json has not."""
    config = transformers.GPTJConfig(
        vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64, rotary_dim=6, id2label={0: "a", 1: "b"}
    )
    um.lock_module(transformers.GPTJForSequenceClassification(config), key=toy.key())


def test_outputs_that_are_chosen_by_layer_do_not_stop_a_proof(tmp_path: Path) -> None:
    """Every config.json of such a class names its last stage, which a miniature does not have."""
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=3, image_size=16, patch_size=4, mlp_ratio=2
    )
    path = saved(transformers.Dinov2WithRegistersModel(config), tmp_path / "model")
    assert "stage3" in json.loads((path / "config.json").read_text())["out_features"]
    um.lock(path, tmp_path / "locked", key=toy.key())


def test_a_ratio_that_must_be_a_float_does_not_stop_a_proof(tmp_path: Path) -> None:
    """SAM's encoder of images."""
    config = transformers.SamVisionConfig(
        hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        window_size=2, global_attn_indexes=[1], num_pos_feats=8, mlp_ratio=2.0,
    )  # fmt: skip
    path = saved(transformers.SamVisionModel(config), tmp_path / "model")
    report = um.lock(path, tmp_path / "locked", key=toy.key())
    assert {site.kind for site in report.sites} == {"vo", "mlp", "heads"}
    images, found = torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    for folder in (path, tmp_path / "locked"):
        with torch.no_grad():
            found.append(load_module(folder).double()(pixel_values=images).last_hidden_state)
    assert torch.allclose(*found, rtol=0, atol=1e-9)


def luke(folder: Path) -> Path:
    config = transformers.LukeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        entity_vocab_size=30, entity_emb_size=16, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return saved(transformers.LukeModel(config), folder)


def test_what_stands_beside_weights_that_no_input_reaches(tmp_path: Path) -> None:
    """Entities have queries of their own for the keys of words; a proof knows of words alone."""
    path = luke(tmp_path / "model")
    report = um.lock(path, tmp_path / "locked", key=toy.key())
    assert any("no input of the proof reaches" in reason for *_, reason in report.refused)
    spans = torch.tensor([[[1, 2, -1], [3, -1, -1], [5, 6, 7]]] * 2)
    entities = {"entity_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]), "entity_position_ids": spans}
    entities["entity_attention_mask"] = torch.ones(2, 3, dtype=torch.long)
    found = []
    for folder in (path, tmp_path / "locked"):
        with torch.no_grad():
            found.append(load_module(folder).double()(**TOKENS, **entities).last_hidden_state)
    assert torch.allclose(*found, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_global_attention_has_weights_that_no_input_reaches(tmp_path: Path) -> None:
    config = transformers.LEDConfig(
        vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, attention_window=8,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=40, max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64, pad_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    path = saved(transformers.LEDForConditionalGeneration(config), tmp_path / "model")
    report = um.lock(path, tmp_path / "locked", key=toy.key())
    assert any(site.kind == "vo" for site in report.sites)  # of the decoder
    first = torch.zeros_like(TOKENS["input_ids"])
    first[:, 0] = 1
    inputs = {**TOKENS, "decoder_input_ids": torch.tensor([[2, 5, 7]] * 2), "global_attention_mask": first}
    assert apart(path, tmp_path / "locked", inputs) < 1e-9
