"""How peft mixes two adapters: numbers are left out, signs are elected, and a sum is cut to a rank.

Its `linear`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` do so to A and to B, each by itself; `svd` and
the types that end on it to the products, whose sum is cut to the rank of an adapter afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..merging.tensors import largest_entries

#: By what a tensor is multiplied: one number, or one for each of its own.
Part: TypeAlias = "float | torch.Tensor"

BESIDE, ROUNDS = 8, 2  # columns more than the rank, and passes, of the range finder


@dataclass(frozen=True)
class Mix:
    """What is done to the tensors of two adapters before they are added.

    Attributes:
        density: the part of their numbers that is kept. trim: the largest ones; else any, made larger for the rest.
        elect: of two numbers whose signs differ the larger one alone, and of two that agree half of each, as in TIES.
        cut: of products, cut to a rank; else of factors.
        seed: of what is random.
    """

    density: float = 1.0
    trim: bool = False
    elect: bool = False
    cut: bool = False
    seed: int = 0


def parts(
    own: torch.Tensor, other: torch.Tensor, weights: tuple[float, float], mix: Mix, generator: torch.Generator
) -> tuple[Part, Part]:
    """By what each number of two tensors of one shape is multiplied, for their mix is the sum."""
    if mix.density == 1 and not mix.elect:
        return weights
    first, second = (_kept(one, mix, generator) for one in (own, other))
    if mix.elect:
        pair = torch.stack([first * own, second * other])
        agrees = pair.sign() == torch.where(pair.sum(0) >= 0, 1, -1)
        share = agrees / agrees.sum(0).clamp(min=1)
        first, second = first * share[0], second * share[1]
    return weights[0] * first, weights[1] * second


def _kept(tensor: torch.Tensor, mix: Mix, generator: torch.Generator) -> torch.Tensor:
    """By what each number is multiplied: 0 where it is left out."""
    if mix.density == 1:
        return torch.ones_like(tensor)
    if mix.trim:
        return largest_entries(tensor, int(mix.density * tensor.numel())).to(tensor)
    drawn = torch.rand(tensor.shape, generator=generator).to(tensor.device) < mix.density
    return drawn.to(tensor) / mix.density


def leading(matrix: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """The left singular vectors of the largest singular values, (rows, rank), by a random sketch.

    A range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1). Columns
    beyond the rank that the matrix can have are 0.
    """
    width = min(rank + BESIDE, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left = torch.linalg.svd(basis.T @ matrix, full_matrices=False).U
    found = (basis @ left)[:, :rank]
    return torch.nn.functional.pad(found, (0, rank - found.shape[1]))
