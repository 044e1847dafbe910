"""Classes that take more than tokens or one image: proven on what they take, locked, and compared on other inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from round_trip import locks
from unmergeable.prove.inputs import flatten_outputs, make_inputs
from unmergeable.stock import load_module

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_cache")]
Inputs = dict[str, torch.Tensor]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
IMAGE = {**TOWER, "image_size": 24, "patch_size": 8}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def captions() -> tuple[Any, Inputs]:
    """TrOCR: an image in, text out."""
    decoder = transformers.TrOCRConfig(
        vocab_size=96, d_model=40, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=56,
        cross_attention_hidden_size=32, max_position_embeddings=64,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**IMAGE), decoder, decoder_start_token_id=2, pad_token_id=1
    )
    tokens = torch.arange(3, 10)[None]
    return transformers.VisionEncoderDecoderModel(config), {
        "pixel_values": normal(1, 3, 24, 24),
        "decoder_input_ids": tokens,
    }


def patches() -> tuple[Any, Inputs]:
    """SigLIP 2: images as rows of patches, of shapes that differ; text beside them."""
    config = transformers.Siglip2Config(
        text_config={
            **TOWER, "vocab_size": 96, "max_position_embeddings": 16, "projection_size": 32,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        vision_config={**TOWER, "patch_size": 4, "num_patches": 16},
    )  # fmt: skip
    grids = torch.tensor([[4, 4], [2, 3]])
    inputs = {
        "input_ids": torch.arange(3, 35).reshape(2, 16), "pixel_values": normal(2, 16, 48),
        "spatial_shapes": grids, "pixel_attention_mask": (torch.arange(16) < grids.prod(1, keepdim=True)).long(),
    }  # fmt: skip
    return transformers.Siglip2Model(config), inputs


def sounds() -> tuple[Any, Inputs]:
    """AST: a spectrogram."""
    config = transformers.ASTConfig(**TOWER, patch_size=8, max_length=40, num_mel_bins=24)
    return transformers.ASTForAudioClassification(config), {"input_values": normal(2, 40, 24)}


def films() -> tuple[Any, Inputs]:
    """TimeSformer: frames of a film."""
    config = transformers.TimesformerConfig(**IMAGE, num_frames=3)
    return transformers.TimesformerForVideoClassification(config), {"pixel_values": normal(2, 3, 3, 24, 24)}


def masked_films() -> tuple[Any, Inputs]:
    """VideoMAE: biases of queries and values that the attention itself has."""
    config = transformers.VideoMAEConfig(**IMAGE, num_frames=4, tubelet_size=2)
    return transformers.VideoMAEForVideoClassification(config), {"pixel_values": normal(2, 4, 3, 24, 24)}


def questions() -> tuple[Any, Inputs]:
    """BLIP with images wider than its text: its class overrules what the config says of the width of the keys."""
    text = {**TOWER, "vocab_size": 96, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.BlipConfig(
        text_config=text | {"pad_token_id": 0, "sep_token_id": 2}, vision_config={**IMAGE, "hidden_size": 40}
    )
    inputs = {"input_ids": torch.arange(3, 35).reshape(2, 16), "pixel_values": normal(2, 3, 24, 24)}
    return transformers.BlipForConditionalGeneration(config), inputs


def pages() -> tuple[Any, Inputs]:
    """LayoutLMv3: words, where they stand on their page, and its image."""
    config = transformers.LayoutLMv3Config(
        **TOWER, vocab_size=96, max_position_embeddings=32, input_size=24, patch_size=8, coordinate_size=6,
        shape_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    corners = torch.tensor([[10, 20, 30, 40], [500, 600, 900, 999]]).repeat(2, 8, 1)
    inputs = {
        "input_ids": torch.arange(3, 35).reshape(2, 16),
        "bbox": corners,
        "pixel_values": normal(2, 3, 24, 24),
    }
    return transformers.LayoutLMv3ForTokenClassification(config), inputs


def regions() -> tuple[Any, Inputs]:
    """SegFormer: stages with keys and values of fewer places, and a head that reads all of them."""
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[2, 1], sr_ratios=[4, 2], hidden_sizes=[16, 40], num_attention_heads=[2, 5],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=24, num_labels=3,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config), {"pixel_values": normal(2, 3, 64, 64)}


def documents() -> tuple[Any, Inputs]:
    """Donut: an encoder of stages with shifted windows, and a decoder of text."""
    encoder = transformers.DonutSwinConfig(
        embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=2, image_size=[16, 24], patch_size=2
    )
    decoder = transformers.MBartConfig(
        vocab_size=96, d_model=32, decoder_layers=2, decoder_attention_heads=4, encoder_attention_heads=4,
        decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=2, pad_token_id=1
    )
    inputs = {"pixel_values": normal(1, 3, 16, 24), "decoder_input_ids": torch.arange(3, 10)[None]}
    return transformers.VisionEncoderDecoderModel(config), inputs


def translations() -> tuple[Any, Inputs]:
    """Marian: tables of sines, which its checkpoints leave out."""
    config = transformers.MarianConfig(
        vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=56, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.arange(3, 21).reshape(2, 9),
        "decoder_input_ids": torch.arange(3, 13).reshape(2, 5),
    }
    return transformers.MarianMTModel(config), inputs


GATED = {
    "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 4, "use_swiglu_ffn": True,
    "image_size": 24, "patch_size": 8, "num_labels": 3,
}  # fmt: skip


def gated() -> tuple[Any, Inputs]:
    """DINOv2-giant's MLP: as wide as a formula says, with a rest that it rounds up."""
    config = transformers.Dinov2Config(**GATED)
    return transformers.Dinov2ForImageClassification(config), {"pixel_values": normal(2, 3, 24, 24)}


def registers() -> tuple[Any, Inputs]:
    """The same beside registers."""
    config = transformers.Dinov2WithRegistersConfig(**GATED, num_register_tokens=2)
    inputs = {"pixel_values": normal(2, 3, 24, 24)}
    return transformers.Dinov2WithRegistersForImageClassification(config), inputs


QUICK = (sounds, gated)
SLOW = (captions, patches, films, masked_films, questions, pages, translations, regions, documents, registers)


@pytest.mark.parametrize(
    "made",
    [
        *QUICK,
        *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW),
    ],
)
def test_locked_and_undone(made: Callable[[], tuple[Any, Inputs]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = made()
    with torch.no_grad():
        for one in (one for one in module.parameters() if one.requires_grad):
            one.add_(torch.randn(one.shape) / 8)
    module.save_pretrained(tmp_path / "model")
    expected = outputs(tmp_path / "model", inputs)
    for method, report in locks(tmp_path):
        acted = [site for site in report.sites if site.acted]
        assert {"qk", "vo", "mlp"} <= {site.kind for site in acted}
        assert all(site.moved > 0.5 for site in acted if site.moved is not None)
        found = outputs(tmp_path / method, inputs)
        worst = max(float((a - b).norm() / a.norm()) for a, b in zip(expected, found, strict=True))
        assert worst < (1e-12 if method == "exact" else 1e-5), method


def outputs(path: Path, inputs: Inputs) -> list[torch.Tensor]:
    module = load_module(path).double()
    with torch.no_grad():
        return flatten_outputs(module(**inputs))


def test_inputs_are_those_that_a_class_takes() -> None:
    for made in (*QUICK, *SLOW):
        module, inputs = made()
        sets = make_inputs(module, module.config.to_dict())
        assert sets
        for one in sets:
            assert set(inputs) <= set(one.arguments)
            assert all(one.arguments[name].dim() == value.dim() for name, value in inputs.items())
