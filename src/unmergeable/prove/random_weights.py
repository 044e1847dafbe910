"""Random weights for miniatures: everything random, nothing so extreme that a part falls silent."""

from __future__ import annotations

import torch
from torch import nn


def randomize(model: nn.Module, seed: int) -> None:
    """Make every parameter and every saved float buffer random: norms, biases, gates and tables too.

    Matrices are scaled by their fan-in so that attention scores spread over about one unit. What starts at
    one stays positive, what starts at zero (biases, sinks) becomes small.
    """
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(seed)
    inputs_first = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # Tables that loaders make anew, of sines for instance, are no part of a checkpoint: they stay as they are made.
    made = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name, parameter in model.named_parameters():
        if name in made or not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if id(parameter) in embeddings:
            parameter.data.copy_(0.7 * noise)
        elif parameter.dim() >= 2 and not _is_constant(parameter):
            if parameter.dim() == 3:
                fan_in = min(parameter.shape[1:])
            else:
                fan_in = parameter.shape[0] if id(parameter) in inputs_first else parameter[0].numel()
            parameter.data.copy_(1.2 * noise / max(fan_in, 1) ** 0.5)
        else:
            parameter.data.copy_(_around(parameter, noise))
    saved = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            noise = torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
            # A limit that nothing ever reaches would hide what real ones do.
            held = torch.where(torch.isfinite(buffer), buffer, 0.5 * buffer.sign())
            buffer.copy_(held * (1 + 0.25 * noise) if bool((held > 0).all()) else held + 0.1 * noise)


def _is_constant(parameter: torch.Tensor) -> bool:
    return bool((parameter == parameter.flatten()[0]).all()) if parameter.numel() else True


def _around(parameter: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    if not parameter.numel():
        return parameter
    first = float(parameter.flatten()[0])
    if not _is_constant(parameter):
        return parameter + 0.1 * noise
    if parameter.numel() == 1 and first:
        return torch.full_like(parameter, first) * (1 + 0.05 * noise)
    return (1 + 0.25 * noise).abs() if first > 0 else 0.3 * noise
