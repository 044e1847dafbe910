"""Simulated merges whose matrices have even singular values, as Iso-C makes them (arXiv 2502.04959).

The part of every matrix that is made even is written as a direction beside the task vector, so that the rest of a merge
is as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..merging.spectral import as_matrix
from .draws import Draw
from .exact import exact

if TYPE_CHECKING:
    from ..merging import State

# A polar factor by Newton–Schulz iterations, which are matrix products alone: nine that grow what is small, those of
# the optimiser Muon (K. Jordan and others, 2024), and three that settle at 1.
TURNS = (*[(3.4445, -4.7750, 2.0315)] * 9, *[(1.5, -0.5, 0.0)] * 3)


def evened(draw: Draw, direction: State, vector: State) -> tuple[Draw, Mapping[str, torch.Tensor]]:
    """The draw and the direction with which an even merge is base + own ∘ vector + other ∘ direction.

    A matrix that is made even is the gradient of a convex function of the sum, half of the square of its nuclear
    norm over its rank: passed through as if it were the sum times a number, a gradient still goes downhill.

    Args:
        draw: coefficients of both task vectors. direction: the other one. vector: the fine-tune's.
    """
    other, found = dict(draw.other), dict(direction)
    for name, own in draw.own.items():
        if vector[name].ndim < 2:
            continue
        delta, added = vector[name], draw.other[name] * direction[name].to(vector[name])
        found[name] = even(own * delta + added) - own * delta
        other[name] = 1.0
    return replace(draw, other=other, even=False), found


def even(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix, or a stack of them, with its singular values made about equal to their mean.

    Args:
        matrix: (…, rows, columns); of a convolution (out, in, height, width), as (out, everything else).
    """
    flat = as_matrix(matrix)
    wide = flat.shape[-2] <= flat.shape[-1]
    found = flat if wide else flat.mT
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    with exact(matrix):
        for first, second, third in TURNS:
            square = found @ found.mT
            found = first * found + (second * square + third * square @ square) @ found
    factor = found if wide else found.mT
    mean = (factor * flat).sum((-2, -1), keepdim=True) / min(flat.shape[-2:])
    return (mean * factor).reshape(matrix.shape)
