"""Inputs of every modality, made from the signature of a model's forward, and the outputs that are compared.

Two seeds; text with and without padding on either side. Lengths are odd numbers so that no axis of an
output is mistaken for another.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from unmergeable.config import lookup
from unmergeable.prove import stages
from unmergeable.prove.shrink import FIRST_FREE_TOKEN, SPECIAL_TOKENS

TEXT_LENGTH = 27
DECODER_LENGTH = 25
#: Patches of an image that is given as a row of them, the longest of a batch.
PATCHES = 12
#: Tokens that the padded inputs lose.
PADDING = 5

#: Outputs that a symmetry may change, or that repeat others.
NOT_COMPARED = ("past", "cache", "attentions", "loss", "router", "state", "mems", "rope_deltas")
COMPARED = ("last_hidden_state", "encoder_last_hidden_state", "hidden_states")


@dataclass(frozen=True)
class InputSet:
    """Arguments of one forward.

    Args:
        label: what it exercises, for messages.
        arguments: keyword arguments of `forward`.
        masks: {length of an axis: boolean tensor (batch, length)}, True at real positions.
    """

    label: str
    arguments: dict[str, Any]
    masks: dict[int, torch.Tensor] = field(default_factory=dict)


def make_inputs(model: Any, config: Mapping[str, Any]) -> list[InputSet]:
    """Input sets for this model, the most informative first; an empty list where no modality is known.

    Args:
        model: a transformers model; only its signature is read.
        config: its configuration as nested plain values.
    """
    names = inspect.signature(model.forward).parameters
    sets: list[InputSet] = []
    if "input_ids" in names:
        for label, seed, side in (
            ("plain", 0, None),
            ("left padding", 1, "left"),
            ("right padding", 1, "right"),
        ):
            if side is None or "attention_mask" in names:
                sets.append(_with_text(config, names, label, seed, side))
    if "pixel_values" in names:
        if not sets:
            sets = [InputSet(f"images {seed}", {}) for seed in (0, 1)]
            if "decoder_input_ids" in names:
                for seed, entry in enumerate(sets):
                    entry.arguments["decoder_input_ids"] = _tokens(config, DECODER_LENGTH, seed + 10)
        needed = names["pixel_values"].default is inspect.Parameter.empty
        if needed or "input_ids" not in names or _stand_in(config, "image") is None:
            for index, entry in enumerate(sets):
                arguments, masks = _images(config, names, index)
                entry.arguments.update(arguments)
                entry.masks.update(masks)
                _seen(config, entry)
    if "input_features" in names and not (sets and _stand_in(config, "audio") is not None):
        sets = []
        for seed in (0, 1):
            arguments = _features(config, seed)
            if "decoder_input_ids" in names:
                arguments["decoder_input_ids"] = _tokens(config, DECODER_LENGTH, seed + 10)
            sets.append(InputSet(f"features {seed}", arguments))
    if "input_values" in names and not sets:
        # Mel bins in the config without features among the inputs: a spectrogram takes the waveform's place.
        mels, length = lookup(config, "num_mel_bins"), lookup(config, "max_length")
        shape = (2, 4000) if mels is None or length is None else (2, int(length), int(mels))
        label = "waveform" if len(shape) == 2 else "spectrogram"
        sets = [InputSet(f"{label} {seed}", {"input_values": _normal(shape, seed)}) for seed in (0, 1)]
    return sets


def flatten_outputs(output: Any, masks: Mapping[int, torch.Tensor] | None = None) -> list[torch.Tensor]:
    """The float tensors of a model's output that its function is made of, padded positions left out.

    Caches, attention maps, router logits and losses are not part of it.
    """
    tensors: list[torch.Tensor] = []
    _collect(output, masks or {}, tensors)
    return tensors


def _collect(value: Any, masks: Mapping[int, torch.Tensor], into: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            mask = masks.get(value.shape[1]) if value.dim() >= 2 else None
            into.append(value[mask] if mask is not None and mask.shape == value.shape[:2] else value)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name in COMPARED or not any(word in name for word in NOT_COMPARED):
                _collect(item, masks, into)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, masks, into)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)


def _normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


def _tokens(config: Mapping[str, Any], length: int, seed: int) -> torch.Tensor:
    """Two rows of ordinary tokens, each with one end token at its end: some heads pool there."""
    vocabulary = int(lookup(config, "vocab_size") or FIRST_FREE_TOKEN + SPECIAL_TOKENS + 64)
    high = max(FIRST_FREE_TOKEN + 1, vocabulary - SPECIAL_TOKENS)
    ids = torch.randint(FIRST_FREE_TOKEN, high, (2, length), generator=_generator(seed))
    ids[:, -1] = _special(config, "eos_token_id", FIRST_FREE_TOKEN)
    return ids


def _special(config: Mapping[str, Any], name: str, default: int) -> int:
    """A special token, or the default where the class brings one that the vocabulary does not have."""
    token = lookup(config, name)
    if isinstance(token, list):
        token = token[0] if token else None
    if token is None or not 0 <= int(token) < int(lookup(config, "vocab_size") or 0):
        return default
    return int(token)


def _with_text(
    config: Mapping[str, Any], names: Mapping[str, Any], label: str, seed: int, side: str | None
) -> InputSet:
    length = TEXT_LENGTH
    ids = _tokens(config, length, seed)
    arguments: dict[str, Any] = {"input_ids": ids}
    masks: dict[int, torch.Tensor] = {}
    if side is not None:
        mask = torch.ones_like(ids)
        pad = _special(config, "pad_token_id", 0)
        kept = length - PADDING
        if side == "left":
            mask[0, :PADDING] = 0
        else:
            mask[0, kept:] = 0
            ids[0, kept - 1] = _special(config, "eos_token_id", FIRST_FREE_TOKEN)
        ids[mask == 0] = pad
        arguments["attention_mask"] = mask
        masks[length] = mask.bool()
    if "token_type_ids" in names and int(lookup(config, "type_vocab_size") or 0) > 1:
        types = torch.zeros_like(ids)
        types[:, length // 2 :] = 1
        arguments["token_type_ids"] = types
    if "bbox" in names:
        # left, top, right, bottom of each word, in thousandths of its page
        corners = torch.randint(0, 1000, (2, length, 2, 2), generator=_generator(seed + 40))
        arguments["bbox"] = corners.sort(dim=2).values.flatten(2)
    if "decoder_input_ids" in names:
        arguments["decoder_input_ids"] = _tokens(config, DECODER_LENGTH, seed + 10)
    if "qformer_input_ids" in names:
        arguments["qformer_input_ids"] = _tokens(config, DECODER_LENGTH, seed + 50)
    return InputSet(label, arguments, masks)


def _seen(config: Mapping[str, Any], entry: InputSet) -> None:
    """Tokens in whose places what was read out of an image stands: as many as there are queries for it."""
    count, token = lookup(config, "num_query_tokens"), _stand_in(config, "image")
    ids = entry.arguments.get("input_ids")
    if ids is not None and count and token is not None and PADDING + int(count) < ids.shape[1] - PADDING:
        ids[:, PADDING : PADDING + int(count)] = token


def _stand_in(config: Mapping[str, Any], kind: str) -> int | None:
    """The token of a text that stands for an image, or for sound; where there is one, text alone is an input, too."""
    tokens = (lookup(config, f"{kind}_token_{name}") for name in ("id", "index"))
    return next((int(token) for token in tokens if token is not None), None)


def _pair(value: Any, default: int) -> tuple[int, int]:
    if isinstance(value, Mapping):
        return int(value.get("height", default)), int(value.get("width", default))
    if isinstance(value, list | tuple):
        return int(value[-2]), int(value[-1])
    return (int(value), int(value)) if value is not None else (default, default)


def _images(
    config: Mapping[str, Any], names: Mapping[str, Any], seed: int
) -> tuple[dict[str, Any], dict[int, torch.Tensor]]:
    """Arguments and masks: images of one size, films where the config counts frames, or rows of patches."""
    channels = int(lookup(config, "num_channels") or 3)
    if "spatial_shapes" in names:
        grids = torch.tensor([[3, 4], [2, 5]])
        mask = torch.arange(PATCHES) < grids.prod(dim=1, keepdim=True)
        pixels = channels * int(lookup(config, "patch_size") or 16) ** 2
        arguments = {
            "pixel_values": _normal((2, PATCHES, pixels), seed + 20),
            "spatial_shapes": grids,
            "pixel_attention_mask": mask.long(),
        }
        return arguments, {PATCHES: mask}
    height, width = _pair(lookup(config, "image_size") or lookup(config, "input_size"), stages.side(config))
    frames = lookup(config, "num_frames")
    shape = (channels, height, width) if frames is None else (int(frames), channels, height, width)
    return {"pixel_values": _normal((2, *shape), seed + 20)}, {}


def _features(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    mels = int(lookup(config, "num_mel_bins") or 80)
    # two convolutions, the second with stride two, come before the encoder's positions
    frames = 2 * int(lookup(config, "max_source_positions") or 30)
    return {"input_features": _normal((2, mels, frames), seed + 30)}
