"""Whether a merge is one: a tool can return without an error and have copied, dropped or ignored its inputs.

Everything is reported as facts; what to make of them is for the caller. `Facts.problems` says in words what
an audit should not take for a merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from . import State

# A merge that moved less than this part of the mean task vector's length is near the base: `model_stock`
# and `nearswap` do so by design (0.02 and 0.1 measured), and its base's capability says nothing about a lock.
NEAR_BASE = 0.15
# A model whose task vector takes part with a coefficient below this was left out.
LEFT_OUT = 0.01
# The part of the numbers that may be copies of one input before the merge counts as a copy.
MOSTLY = 0.5
BASE = "base"


@dataclass(frozen=True)
class Facts:
    """A merge beside its inputs.

    Attributes:
        tensors: shared tensors in which any model differs from the base.
        mixed: those of them that are none of the inputs, bit for bit.
        copies: by input, the tensors that are a copy of it.
        copied: the part of the numbers that copies make up.
        dropped: tensors that the inputs have and the result lacks, or has in another shape.
        broken: tensors with a NaN or an infinity.
        moved: ‖merge − base‖ over the mean ‖model − base‖.
        shares: by model, its coefficient in the sum of task vectors nearest to the merge (least squares).
        fit: how well that sum explains the merge, 0 to 1; low for methods that drop or rotate.
    """

    tensors: int
    mixed: int
    copies: Mapping[str, tuple[str, ...]]
    copied: float
    dropped: tuple[str, ...]
    broken: tuple[str, ...]
    moved: float
    shares: Mapping[str, float]
    fit: float

    @property
    def near_base(self) -> bool:
        """Whether the merge hardly left the base."""
        return self.moved < NEAR_BASE

    @property
    def left_out(self) -> list[str]:
        """Models that take no part in the result."""
        return [name for name, share in self.shares.items() if abs(share) < LEFT_OUT]

    @property
    def problems(self) -> list[str]:
        """Why this is no merge of its inputs, in words; empty if it is one."""
        found = []
        if self.broken:
            found.append(f"{len(self.broken)} tensors are not finite, the first is {self.broken[0]}")
        if self.dropped:
            found.append(f"{len(self.dropped)} tensors were dropped, the first is {self.dropped[0]}")
        if self.copied > MOSTLY:
            most = max(self.copies, key=lambda name: len(self.copies[name]))
            found.append(f"{self.copied:.0%} of it is copied from one input, mostly from {most}")
        if not self.tensors:
            found.append("the models do not differ from the base")
        return found

    @property
    def is_mix(self) -> bool:
        """Whether this is a merge of its inputs."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON; long lists of names as they are."""
        return {
            **asdict(self),
            "near_base": self.near_base,
            "left_out": self.left_out,
            "problems": self.problems,
        }


def facts(base: State, models: Mapping[str, State], merged: State) -> Facts:
    """Compare a merge with its inputs, tensor by tensor, in float64.

    A tensor that no model changed (a frozen one) is not looked at: its copy is the only merge there is.

    Args:
        base: what they were fine-tuned from; names as in `merged`.
        models: the inputs by name.
        merged: the result.
    """
    names = list(models)
    dropped, broken = [], []
    copies: dict[str, list[str]] = {}
    gram = torch.zeros(len(names), len(names), dtype=torch.float64)
    inner = torch.zeros(len(names), dtype=torch.float64)
    count = mixed = numbers = copied = 0
    length = 0.0
    for name, origin in base.items():
        result = merged.get(name)
        if result is None or result.shape != origin.shape:
            dropped.append(name)
            continue
        if not origin.is_floating_point():
            continue
        if not bool(torch.isfinite(result).all()):
            broken.append(name)
            continue
        inputs = {
            one: model[name]
            for one, model in models.items()
            if name in model and model[name].shape == origin.shape
        }
        if all(torch.equal(tensor.to(origin), origin) for tensor in inputs.values()):
            continue
        count += 1
        numbers += origin.numel()
        source = _copy_of(result, {BASE: origin, **inputs})
        if source is None:
            mixed += 1
        else:
            copies.setdefault(source, []).append(name)
            copied += origin.numel()
        start = origin.double().flatten()
        delta = result.to(origin.device).double().flatten() - start
        length += float(delta @ delta)
        rows = torch.zeros(len(names), start.numel(), dtype=torch.float64, device=start.device)
        for one, tensor in inputs.items():
            rows[names.index(one)] = tensor.to(start.device).double().flatten() - start
        gram += (rows @ rows.T).cpu()
        inner += (rows @ delta).cpu()
    shares, fit = _explain(gram, inner, length)
    mean = float(gram.diagonal().clamp(min=0).sqrt().mean()) if names else 0.0
    return Facts(
        tensors=count,
        mixed=mixed,
        copies={name: tuple(found) for name, found in copies.items()},
        copied=copied / numbers if numbers else 0.0,
        dropped=tuple(dropped),
        broken=tuple(broken),
        moved=length**0.5 / mean if mean else 0.0,
        shares=dict(zip(names, shares, strict=True)),
        fit=fit,
    )


def _copy_of(result: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> str | None:
    """The input that this tensor is a copy of, in the result's dtype; None if there is none."""
    for name, tensor in inputs.items():
        if torch.equal(tensor.to(result), result):
            return name
    return None


def _explain(gram: torch.Tensor, inner: torch.Tensor, length: float) -> tuple[list[float], float]:
    """Least squares of the merged difference on the task vectors: coefficients, and the part explained."""
    scale = gram.diagonal().clamp(min=1e-300).sqrt()
    # Models that are the same up to rounding share their coefficient: the pseudo-inverse is defined then too.
    solved = torch.linalg.pinv(gram / scale / scale[:, None], rcond=1e-10, hermitian=True) @ (inner / scale)
    part = float((solved * inner / scale).sum())
    return [float(x) for x in solved / scale], max(0.0, min(1.0, part / length)) if length else 0.0
