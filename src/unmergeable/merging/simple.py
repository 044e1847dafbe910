"""The merges that everybody tries first: task arithmetic, TIES, and one model at nearly its full dose.

All work tensor by tensor in float32 on task vectors, expert minus base, and return the base's dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError
from . import Merged
from .tensors import largest_entries, merge_deltas

if TYPE_CHECKING:
    from . import State

# The coefficients of the full-dose grid: the protected model's, and the others' (suite v1, docs/demo.md).
DOSES_PROTECTED = (0.3, 0.5, 0.7, 0.85, 1.0, 1.15)
DOSES_OTHERS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
FULL_DOSE_GRID = tuple(product(DOSES_PROTECTED, DOSES_OTHERS))


def task_arithmetic(
    base: State, experts: Mapping[str, State], *, weight: float | Mapping[str, float]
) -> Merged:
    """base + Σ weight · (expert − base), Ilharco et al., arXiv 2212.04089.

    Args:
        base: the model that the experts were fine-tuned from.
        experts: their state dicts by name.
        weight: one coefficient for all, or one for each by name.

    Raises:
        UsageError: no experts, or a weight is missing.
        InputError: an expert lacks a tensor of the base.
    """
    weights = _weights(weight, experts)

    def mix(deltas: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([weights[name] * delta for name, delta in deltas.items()]).sum(0)

    return _merge(base, experts, mix)


def full_dose(
    base: State, experts: Mapping[str, State], *, protected: str, dose: float, others: float
) -> Merged:
    """Task arithmetic of a thief who wants one model nearly whole: `dose` of it and `others` of all the rest.

    Raises:
        UsageError: `protected` is not one of the experts.
        InputError: as `task_arithmetic`.
    """
    if protected not in experts:
        raise UsageError("no such expert", where=f"'{protected}'", expected=" | ".join(experts))
    weight = {name: dose if name == protected else others for name in experts}
    return task_arithmetic(base, experts, weight=weight)


def ties(base: State, experts: Mapping[str, State], *, weight: float = 1.0, density: float = 0.2) -> Merged:
    """Trim, elect sign, merge disjointly, Yadav et al., arXiv 2306.01708; trimmed tensor by tensor.

    Args:
        base: the model that the experts were fine-tuned from.
        experts: their state dicts by name.
        weight: coefficient of the merged task vector.
        density: the part of each task vector's entries that is kept, those of largest magnitude.

    Raises:
        UsageError: no experts, or a density outside (0, 1].
        InputError: an expert lacks a tensor of the base.
    """
    if not 0 < density <= 1:
        raise UsageError("the density of TIES is out of range", expected="0 < density <= 1", got=density)

    def mix(deltas: Mapping[str, torch.Tensor]) -> torch.Tensor:
        trimmed = torch.stack([_trim(delta, density) for delta in deltas.values()])
        sign = trimmed.sum(0).sign()
        sign[sign == 0] = 1
        agree = trimmed.sign() == sign
        return weight * (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)

    return _merge(base, experts, mix)


def _trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The tensor with all but its largest entries set to zero."""
    keep = int(density * delta.numel())
    return delta if keep == delta.numel() else torch.where(largest_entries(delta, keep), delta, 0)


def _weights(weight: float | Mapping[str, float], experts: Mapping[str, State]) -> dict[str, float]:
    if not isinstance(weight, Mapping):
        return dict.fromkeys(experts, float(weight))
    if weight.keys() != experts.keys():
        raise UsageError("weights and experts differ", expected=", ".join(experts), got=", ".join(weight))
    return dict(weight)


def _merge(
    base: State, experts: Mapping[str, State], mix: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
) -> Merged:
    """Mix the task vectors of every tensor, over the experts that have it in the base's shape."""
    return merge_deltas(base, experts, lambda _, deltas: mix(deltas))
