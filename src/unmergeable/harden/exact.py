"""Arithmetic of weights, in their own precision: passes may be run in a lower one, what is done to weights never is."""

from __future__ import annotations

import torch


def exact(like: torch.Tensor) -> torch.autocast:
    """Inside, nothing on this tensor's device is cast by itself: decompositions know no bfloat16."""
    return torch.autocast(like.device.type, enabled=False)


def wide(one: torch.Tensor) -> torch.Tensor:
    """The same numbers in float32 at least, for decompositions of weights that are stored in less."""
    return one.to(torch.promote_types(one.dtype, torch.float32))
