"""What is behind the end of a text, where a batch has longer ones: nothing that is learnt from it is of use."""

from __future__ import annotations

import torch

from .task import IGNORED, Examples


def masks(batch: Examples) -> list[torch.Tensor]:
    """Of labels and of inputs, the positions that are no padding, (n, positions) each; none where nothing is padded."""
    found = [batch.labels != IGNORED] if batch.labels.ndim > 1 else []
    if "attention_mask" in batch.inputs:
        found.append(batch.inputs["attention_mask"].bool())
    return [mask for mask in found if not bool(mask.all())]
