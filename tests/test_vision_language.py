"""Models of images, sound and text: the language model is locked, whatever it reads; the rest stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from round_trip import locks
from unmergeable.prove.inputs import make_inputs
from unmergeable.stock import load_module

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_cache"), pytest.mark.slow]
Inputs = dict[str, torch.Tensor]

IMAGE = 90  # the token in whose place a part of an image stands
TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = {**TEXT, "head_dim": 16}
EYES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24,
    "patch_size": 8,
}  # fmt: skip
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4, "depth": 2}


def sections(*sizes: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": list(sizes), "rope_theta": 10000.0}}


def picture(size: int, tokens: int) -> Inputs:
    """An image, and text with so many of its parts in it."""
    random = torch.Generator().manual_seed(3)
    return {"pixel_values": torch.randn(1, 3, size, size, generator=random), **text(tokens)}


def text(tokens: int = 0) -> Inputs:
    ids = torch.randint(5, IMAGE, (1, 30), generator=torch.Generator().manual_seed(1))
    ids[0, 3 : 3 + tokens] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def rows() -> Inputs:
    """Four by four patches, of which two by two become a token."""
    words = text(4)
    return {
        **words, "pixel_values": torch.randn(16, 96, generator=torch.Generator().manual_seed(3)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (words["input_ids"] == IMAGE).long(),
    }  # fmt: skip


def llava() -> tuple[Any, Inputs]:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**EYES), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), picture(24, 9)


def llava_next() -> tuple[Any, Inputs]:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**EYES), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE, image_grid_pinpoints=[[24, 48]],
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config), text()


def llava_onevision() -> tuple[Any, Inputs]:
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**EYES), text_config=transformers.Qwen2Config(**TEXT),
        image_token_index=IMAGE, image_grid_pinpoints=[[24, 48]],
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config), text()


def paligemma() -> tuple[Any, Inputs]:
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**EYES).to_dict(),
        text_config=transformers.GemmaConfig(**WIDE).to_dict(), image_token_index=IMAGE, projection_dim=64,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config), picture(24, 9)


def gemma3() -> tuple[Any, Inputs]:
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**{**EYES, "image_size": 32}).to_dict(),
        text_config=transformers.Gemma3TextConfig(**WIDE, sliding_window=8).to_dict(), image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config), picture(32, 4)


def internvl() -> tuple[Any, Inputs]:
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**{**EYES, "image_size": [32, 32]}).to_dict(),
        text_config=transformers.Qwen2Config(**TEXT).to_dict(), image_token_id=IMAGE, downsample_ratio=0.5,
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config), picture(32, 4)


def mistral3() -> tuple[Any, Inputs]:
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**EYES).to_dict(),
        text_config=transformers.MistralConfig(**TEXT).to_dict(), image_token_index=IMAGE, spatial_merge_size=1,
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(config), text()


def idefics3() -> tuple[Any, Inputs]:
    config = transformers.Idefics3Config(
        vision_config={**EYES, "image_size": 32}, text_config=transformers.LlamaConfig(**TEXT).to_dict(),
        image_token_id=IMAGE, scale_factor=2,
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config), text()


def qwen2_vl() -> tuple[Any, Inputs]:
    eyes = {**PATCHES, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, **sections(2, 3, 3)}, vision_config=eyes, **TOKENS
    )
    return transformers.Qwen2VLForConditionalGeneration(config), rows()


def qwen2_5_vl() -> tuple[Any, Inputs]:
    eyes = {
        **PATCHES, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 16,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, **sections(2, 3, 3)}, vision_config=eyes, **TOKENS
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), rows()


def qwen3_vl() -> tuple[Any, Inputs]:
    eyes = {
        **PATCHES, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config={**WIDE, **sections(3, 3, 2)}, vision_config=eyes, **TOKENS
    )
    return transformers.Qwen3VLForConditionalGeneration(config), rows()


def voxtral() -> tuple[Any, Inputs]:
    ears = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "num_mel_bins": 16, "max_source_positions": 32,
    }  # fmt: skip
    config = transformers.VoxtralConfig(
        audio_config=ears, text_config=transformers.LlamaConfig(**TEXT).to_dict(), audio_token_id=IMAGE
    )
    sound = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(3))
    return transformers.VoxtralForConditionalGeneration(config), {"input_features": sound, **text(8)}


def qwen2_audio() -> tuple[Any, Inputs]:
    ears = {
        "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 16,
        "max_source_positions": 32,
    }  # fmt: skip
    config = transformers.Qwen2AudioConfig(
        audio_config=ears, text_config=transformers.Qwen2Config(**TEXT).to_dict(), audio_token_index=IMAGE
    )
    return transformers.Qwen2AudioForConditionalGeneration(config), text()


READER = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "encoder_hidden_size": 32, "cross_attention_frequency": 2, "max_position_embeddings": 64,
}  # fmt: skip


def blip2() -> tuple[Any, Inputs]:
    language = transformers.OPTConfig(
        vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
        max_position_embeddings=128,
    )  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=EYES, qformer_config=READER, text_config=language.to_dict(), num_query_tokens=8,
        image_token_index=IMAGE,
    )  # fmt: skip
    return transformers.Blip2ForConditionalGeneration(config), picture(24, 8)


def instructblip() -> tuple[Any, Inputs]:
    config = transformers.InstructBlipConfig(
        vision_config=EYES, qformer_config=READER, text_config=transformers.LlamaConfig(**TEXT).to_dict(),
        num_query_tokens=8, image_token_index=IMAGE,
    )  # fmt: skip
    inputs = {**picture(24, 8), "qformer_input_ids": torch.arange(5, 14)[None]}
    return transformers.InstructBlipForConditionalGeneration(config), inputs


MADE = (
    blip2, instructblip, voxtral, qwen2_audio, llava, llava_next, llava_onevision, paligemma, gemma3, internvl,
    mistral3, idefics3, qwen2_vl, qwen2_5_vl, qwen3_vl,
)  # fmt: skip


@pytest.mark.parametrize("made", [blip2, instructblip])
def test_a_proof_has_tokens_where_the_image_is_read(made: Callable[[], tuple[Any, Inputs]]) -> None:
    module, _ = made()
    config = {**module.config.to_dict(), "num_query_tokens": 3}
    for one in make_inputs(module, config):
        assert (one.arguments["input_ids"] == IMAGE).sum(1).tolist() == [3, 3]
        assert "pixel_values" in one.arguments


@pytest.mark.parametrize("made", MADE)
def test_the_language_model_is_locked(made: Callable[[], tuple[Any, Inputs]], tmp_path: Path) -> None:
    check_locks(tmp_path, saved(made, tmp_path / "model"))


def saved(made: Callable[[], tuple[Any, Inputs]], path: Path) -> Inputs:
    """A model of which no tensor is as it begins, on disk; its inputs."""
    torch.manual_seed(0)
    module, inputs = made()
    with torch.no_grad():
        for one in (one for one in module.parameters() if one.requires_grad):
            one.add_((0.3 if one.ndim < 2 else 0.12) * torch.randn(one.shape))
    module.save_pretrained(path)
    return inputs


def check_locks(folder: Path, inputs: Inputs) -> None:
    """Locks of the model in a folder act on its language model, and it answers as before."""
    expected = logits(folder / "model", inputs)
    for method, report in locks(folder):
        assert {"qk", "vo", "mlp", "heads"} <= {site.kind for site in report.sites if site.acted}
        away = float((logits(folder / method, inputs) - expected).abs().max() / expected.std())
        assert away < (1e-11 if method == "exact" else 2e-5), method
        before, after = (folder / name / "config.json" for name in ("model", method))
        assert after.read_bytes() == before.read_bytes()


def flattened(written: Mapping[str, Any]) -> dict[str, Any]:
    """As Qwen2-VL was published: what its language model is stands at the top, in names of then."""
    nested = {name: value for name, value in written.items() if name != "text_config"}
    part = {n: v for n, v in written["text_config"].items() if n not in ("model_type", "layer_types")}
    rotary = part.pop("rope_parameters")
    old = {
        "rope_theta": rotary["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rotary["mrope_section"]},
    }
    return {**part, **old, **nested}


@pytest.mark.parametrize("made", [qwen2_vl, qwen2_5_vl])
def test_a_language_model_described_at_the_top_is_locked(
    made: Callable[[], tuple[Any, Inputs]], tmp_path: Path
) -> None:
    inputs = saved(made, tmp_path / "model")
    nested = logits(tmp_path / "model", inputs)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(flattened(json.loads(config.read_text()))))
    assert torch.equal(logits(tmp_path / "model", inputs), nested)
    check_locks(tmp_path, inputs)


def logits(path: Path, inputs: Inputs) -> torch.Tensor:
    module = load_module(path).double()
    given = {name: one.double() if one.is_floating_point() else one for name, one in inputs.items()}
    with torch.no_grad():
        found: torch.Tensor = module(**given).logits
    assert bool(torch.isfinite(found).all())
    for name in given.keys() & {"pixel_values", "input_features"}:  # they are seen, or heard
        given[name] = -given[name]
        with torch.no_grad():
            assert not torch.allclose(module(**given).logits, found)
    return found
