"""What is behind the end of a text, where a batch has longer ones: nothing that is learnt from it is of use."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .task import IGNORED, Examples


def masks(batch: Examples) -> list[torch.Tensor]:
    """Of labels and of inputs, the positions that are no padding, (n, positions) each; none where nothing is padded."""
    found = [batch.labels != IGNORED] if batch.labels.ndim > 1 else []
    if "attention_mask" in batch.inputs:
        found.append(batch.inputs["attention_mask"].bool())
    return [mask for mask in found if not bool(mask.all())]


def without_padding(values: torch.Tensor, counted: Iterable[torch.Tensor]) -> torch.Tensor:
    """Values (n, positions, …) at the positions that count, (number of them, …); as they are where no mask fits.

    Args:
        values: logits, or hidden states. counted: as `masks` gives them.
    """
    return next((values[mask] for mask in counted if mask.shape == values.shape[:2]), values)
