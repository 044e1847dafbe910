"""Checkpoints as they lie about: single files, other heads, old names and buffers, weights that are zero."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import toy
import unmergeable as um
from test_guards import TINY, apart, llama, saved, whisper
from unmergeable.config import canonical_config
from unmergeable.errors import InputError
from unmergeable.match import match_spec
from unmergeable.prove.miniature import _real_config
from unmergeable.specs import shipped
from unmergeable.stock import load_module
from unmergeable.whole import spellings

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_cache")]
WEIGHTS = "model.safetensors"
TEXT = {"input_ids": torch.arange(3, 20)[None]}


def test_a_file_by_itself_heeds_what_lies_beside_it(tmp_path: Path) -> None:
    """Heads that generation_config.json calls by their numbers keep them, in the folder and in the file alone."""
    path = whisper(tmp_path / "model", heads=[[1, 2], [1, 0]])
    one = um.lock(path / WEIGHTS, tmp_path / "one.safetensors", key=toy.key(), config=path / "config.json")
    folder = um.lock(path, tmp_path / "folder", key=toy.key())
    for report in (one, folder):
        assert any("alignment_heads" in reason for *_, reason in report.refused)
        assert not any("encoder_attn.heads" in site.site for site in report.sites)


def test_a_head_of_another_name_does_not_stop_unlock(tmp_path: Path) -> None:
    """A licensed user's classifier on a locked language model: the weights that the lock knows are undone."""
    path = llama(tmp_path / "model")
    um.lock(path, tmp_path / "locked", key=toy.key())
    tuned: Any = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "locked")
    tuned.save_pretrained(tmp_path / "tuned")
    shutil.copy(tmp_path / "locked" / "unmergeable.json", tmp_path / "tuned")
    with pytest.raises(InputError, match="accept"):
        um.unlock(tmp_path / "tuned", tmp_path / "no", key=toy.key())
    um.unlock(tmp_path / "tuned", tmp_path / "out", key=toy.key(), accept_changed=True)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("model", "out"))
    assert torch.equal(after["score.weight"], tuned.score.weight)
    assert all(torch.equal(before[name], after[name]) for name in after if name != "score.weight")
    assert apart(tmp_path / "tuned", tmp_path / "out", TEXT) < 1e-9


def test_a_base_model_that_was_given_a_head_is_unlocked(tmp_path: Path) -> None:
    """Its tensors have the name of the body in front then."""
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=40,
    )  # fmt: skip
    path = saved(transformers.BertModel(config), tmp_path / "model")
    um.lock(path, tmp_path / "locked", key=toy.key())
    tuned: Any = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "locked")
    tuned.save_pretrained(tmp_path / "tuned")
    shutil.copy(tmp_path / "locked" / "unmergeable.json", tmp_path / "tuned")
    um.unlock(tmp_path / "tuned", tmp_path / "out", key=toy.key(), accept_changed=True)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("model", "out"))
    assert all(torch.equal(tensor, after[f"bert.{name}"]) for name, tensor in before.items())
    assert apart(tmp_path / "tuned", tmp_path / "out", TEXT) < 1e-9


def test_a_lost_layer_stops_unlock(tmp_path: Path) -> None:
    path = llama(tmp_path / "model")
    um.lock(path, tmp_path / "locked", key=toy.key())
    file = tmp_path / "locked" / WEIGHTS
    rest = {name: one for name, one in load_file(file).items() if "layers.1.self_attn.q_proj" not in name}
    save_file(rest, file, {"format": "pt"})
    with pytest.raises(InputError, match="q_proj"):
        um.unlock(tmp_path / "locked", tmp_path / "out", key=toy.key(), accept_changed=True)
    assert not (tmp_path / "out").exists()


def test_a_module_whose_config_names_where_it_came_from(tmp_path: Path) -> None:
    """As the usual classifier: loaded from a language model's checkpoint, and not saved yet."""
    config = transformers.LlamaConfig(**TINY, num_hidden_layers=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    module: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert module.config.architectures == ["LlamaForCausalLM"]
    module = module.double().eval()
    with torch.no_grad():
        before = module(**TEXT).logits
        name = "model.layers.0.self_attn.q_proj.weight"
        weight = module.state_dict()[name].clone()
        um.lock_module(module, key=toy.key())
        assert not torch.equal(module.state_dict()[name], weight)
        assert torch.allclose(module(**TEXT).logits, before, rtol=1e-9)


def test_weights_that_are_all_zero_hide_nothing(tmp_path: Path) -> None:
    """A layer that was pruned away: there is nothing that could move."""
    module: Any = load_module(llama(tmp_path / "plain"))
    with torch.no_grad():
        for one in module.model.layers[1].mlp.parameters():
            one.zero_()
    module.save_pretrained(tmp_path / "model")
    um.lock(tmp_path / "model", tmp_path / "locked", key=toy.key())
    assert apart(tmp_path / "model", tmp_path / "locked", TEXT) < 1e-9
    um.unlock(tmp_path / "locked", tmp_path / "again", key=toy.key())
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("model", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_causal_masks_of_old_files() -> None:
    """Classes stored them with the weights once; anything else that is not known is refused as before."""
    spec = next(iter(shipped("LlamaForCausalLM")))
    config = transformers.LlamaConfig(**TINY, num_hidden_layers=2)
    shapes = {n: tuple(t.shape) for n, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    canonical = canonical_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, spec.defaults)
    for name in ("model.layers.0.attn.bias", "model.layers.1.self_attn.causal_mask"):
        match_spec(spec, {**shapes, name: (1, 1, 64, 64)}, canonical)
        with pytest.raises(InputError, match="unexpected"):
            match_spec(spec, {**shapes, name: (64, 64)}, canonical)
    with pytest.raises(InputError, match="unexpected"):
        match_spec(spec, {**shapes, "model.layers.0.attn.weight": (1, 1, 64, 64)}, canonical)


def test_names_of_normed_weights() -> None:
    for old, new in (("weight_g", "parametrizations.weight.original0"), ("gamma", "weight")):
        assert spellings(f"a.{old}") == {f"a.{old}", f"a.{new}"}


@pytest.mark.slow
@pytest.mark.parametrize("names", ["today's", "old"])
def test_speech_models_whose_groups_are_as_many_as_layers(names: str, tmp_path: Path) -> None:
    """hidden / 16 columns of a convolution: in a miniature that is the number of its layers."""
    config = transformers.Wav2Vec2Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, conv_dim=(16, 16),
        conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=16,
        num_feat_extract_layers=2, vocab_size=32,
    )  # fmt: skip
    path = saved(transformers.Wav2Vec2ForCTC(config), tmp_path / "model")
    if names == "old":
        state = load_file(path / WEIGHTS)
        start = "parametrizations.weight.original"
        renamed = {
            name.replace(f"{start}0", "weight_g").replace(f"{start}1", "weight_v"): one
            for name, one in state.items()
        }
        assert renamed.keys() != state.keys()
        save_file(renamed, path / WEIGHTS, {"format": "pt"})
    um.lock(path, tmp_path / "locked", key=toy.key())
    sound = {
        "input_values": torch.randn(1, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    }
    assert apart(path, tmp_path / "locked", sound) < 1e-9
    um.unlock(tmp_path / "locked", tmp_path / "again", key=toy.key())
    assert (path / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()


def test_another_head_lies_beside_and_is_said(tmp_path: Path) -> None:
    """As in BERT's first release: a masked language model's config, and what pretraining had beside it."""
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=40,
    )  # fmt: skip
    path = saved(
        transformers.BertForPreTraining(config), tmp_path / "model", architectures=["BertForMaskedLM"]
    )
    state = load_file(path / WEIGHTS)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): one
           for name, one in state.items()}  # fmt: skip
    save_file(old, path / WEIGHTS, {"format": "pt"})
    report = um.lock(path, tmp_path / "locked", key=toy.key())
    said = {name for _, name, _ in report.refused}
    assert any("pooler" in name for name in said)
    assert any("seq_relationship" in name for name in said)
    for kind in (transformers.BertForMaskedLM, transformers.BertForPreTraining, transformers.BertModel):
        found = [
            kind.from_pretrained(one, dtype=torch.float64).eval()(**TEXT)
            for one in (path, tmp_path / "locked")
        ]
        for name, tensor in found[0].items():
            assert torch.allclose(found[1][name], tensor, rtol=1e-9), name
    um.unlock(tmp_path / "locked", tmp_path / "again", key=toy.key())
    assert (path / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    # Inside a block it could be anything.
    save_file({**old, "bert.encoder.layer.0.scale": torch.ones(2)}, path / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"unexpected bert.encoder.layer.0.scale"):
        um.lock(path, tmp_path / "no", key=toy.key())


@pytest.mark.slow
def test_one_key_for_all_heads_beside_a_tower_that_sees(tmp_path: Path) -> None:
    """PaliGemma: the miniature's towers have to differ in their numbers of heads as the model's do."""
    text = {
        "model_type": "gemma", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 8, "image_size": 24, "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=48, image_token_index=95, hidden_size=48
    )
    path = saved(transformers.PaliGemmaForConditionalGeneration(config), tmp_path / "model")
    report = um.lock(path, tmp_path / "locked", key=toy.key())
    assert any("language_model" in site.site for site in report.sites)
    assert apart(path, tmp_path / "locked", TEXT) < 1e-9
    um.unlock(tmp_path / "locked", tmp_path / "again", key=toy.key())
    assert (path / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()


def test_a_part_of_a_config_may_say_little() -> None:
    """LLaVA 1.5: of its language model no width is said, for all are Llama's own."""
    text = {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}
    config = {
        "model_type": "llava",
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model"},
    }
    defaults, real = _real_config(transformers.LlavaForConditionalGeneration, config)
    wanted = transformers.LlavaConfig.from_dict(config).to_dict()
    for part, names in (
        ("text_config", ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
        ("vision_config", ("hidden_size", "num_hidden_layers")),
    ):
        assert {name: real[part][name] for name in names} == {name: wanted[part][name] for name in names}
    whole = canonical_config({**config, "text_config": {**text, "hidden_size": 4096}}, defaults)
    assert canonical_config(config, defaults) == whole
