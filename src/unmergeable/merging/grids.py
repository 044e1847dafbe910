"""Coefficient grids, merged in memory: base + Σ coefficient · task vector, again and again, in one buffer.

The buffer and the task vectors lie on the device where merges are evaluated, in float32, and are made once.
What is yielded is the same buffer every time: evaluate it, or copy it, before the next one is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from ..errors import RunError, UsageError
from . import Merged
from .blocks import Unit, layout
from .simple import DOSES_OTHERS, DOSES_PROTECTED, FULL_DOSE_GRID
from .tensors import possible, split

if TYPE_CHECKING:
    from . import State

__all__ = [
    "DOSES_OTHERS",
    "DOSES_PROTECTED",
    "FULL_DOSE_GRID",
    "LAMBDAS",
    "SUBSTITUTE_WEIGHTS",
    "Mixer",
    "arithmetic_grid",
    "dose_grid",
    "substitute",
]

# Suite v1. Task arithmetic: one coefficient for all.
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Block substitution: the coefficient of the others where nothing is taken whole; 0 leaves the base there.
SUBSTITUTE_WEIGHTS = (0.3, 0.5, 0.7, 1.0)

Coefficients: TypeAlias = Mapping[str, float]


def arithmetic_grid(models: Iterable[str]) -> list[dict[str, float]]:
    """The λ grid: the same coefficient for all models."""
    models = list(models)
    return [dict.fromkeys(models, value) for value in LAMBDAS]


def dose_grid(protected: str, others: Iterable[str]) -> list[dict[str, float]]:
    """The full-dose grid: one coefficient for the protected model, one for all others."""
    others = list(others)
    return [{protected: dose, **dict.fromkeys(others, other)} for dose, other in FULL_DOSE_GRID]


class Mixer:
    """Models ready to be merged with any coefficients, per model or per tensor.

    Args:
        base: the model that they were fine-tuned from.
        models: state dicts by name.
        device: where merges are evaluated.

    Raises:
        InputError: models that do not fit together. RunError: not enough memory on the device.
    """

    def __init__(
        self, base: State, models: Mapping[str, State], *, device: torch.device | str = "cpu"
    ) -> None:
        self.parts = split(base, models)
        self.device = torch.device(device)
        self.models = tuple(models)
        needed, free = self.estimate(base, models), free_memory(self.device)
        if needed > free:
            got, hint = f"{free} bytes", "merge fewer models at a time, or on another device"
            raise RunError(
                "not enough memory to merge", where=device, expected=f"{needed} bytes", got=got, hint=hint
            )
        self._base = {name: self._place(base[name]) for name in self.parts.shared}
        self._deltas = {
            name: {model: self._place(models[model][name]).sub_(self._base[name]) for model in who}
            for name, who in self.parts.shared.items()
        }
        kept = {name: base[name].to(self.device) for name in self.parts.kept}
        self.buffer: dict[str, torch.Tensor] = {
            name: kept[name] if name in kept else self._base[name].clone() for name in base
        }
        # What every tensor of the buffer holds now: unchanged ones are not computed again.
        self._held: dict[str, tuple[float, ...]] = {
            name: (0.0,) * len(deltas) for name, deltas in self._deltas.items()
        }
        self.private = {
            model: {name: tensor.to(self.device) for name, tensor in state.items()}
            for model, state in self.parts.private.items()
        }

    @staticmethod
    def estimate(base: State, models: Mapping[str, State]) -> int:
        """Bytes that a mixer of these models takes: task vectors, base and buffer, in float32."""
        numbers = sum(tensor.numel() for tensor in base.values())
        return 4 * numbers * (len(models) + 2)

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self.device, torch.float32, copy=True)

    def delta(self, model: str, name: str) -> torch.Tensor:
        """A model's difference to the base in one tensor; not to be changed."""
        return self._deltas[name][model]

    def mix(self, coefficients: Coefficients | Callable[[str], Coefficients]) -> Merged:
        """Fill the buffer with base + Σ coefficient · task vector.

        Args:
            coefficients: by model, a missing one is 0; or a function that gives them for a tensor's name.

        Returns: the buffer, which the next call overwrites.

        Raises:
            UsageError: a coefficient of a model that is not there.
        """
        chosen = coefficients if callable(coefficients) else None
        with torch.no_grad():
            for name, deltas in self._deltas.items():
                wanted = chosen(name) if chosen is not None else coefficients
                assert isinstance(wanted, Mapping)
                if unknown := wanted.keys() - set(self.models):
                    got, expected = ", ".join(sorted(unknown)), ", ".join(self.models)
                    raise UsageError("a coefficient of no model", where=name, expected=expected, got=got)
                weights = tuple(float(wanted.get(model, 0.0)) for model in deltas)
                if weights == self._held[name]:
                    continue
                self._fill(self.buffer[name], name, weights)
                self._held[name] = weights
        return Merged(self.buffer, self.private)

    def _fill(self, out: torch.Tensor, name: str, weights: tuple[float, ...]) -> None:
        out.copy_(self._base[name])
        for delta, weight in zip(self._deltas[name].values(), weights, strict=True):
            if weight:
                out.add_(delta, alpha=weight)
        if (kept := possible(name, out)) is not out:
            out.copy_(kept)

    def run(self, points: Iterable[Coefficients]) -> Iterator[tuple[Coefficients, Merged]]:
        """Every point of a grid and its merge, one at a time, always in the same buffer."""
        for point in points:
            yield point, self.mix(point)

    def substitute(
        self, protected: str, taken: Collection[Unit], others: Coefficients, *, dose: float = 1.0
    ) -> Merged:
        """Some blocks or kinds of tensors whole from one model, everything else from the others.

        Args:
            protected: the model that units are taken from.
            taken: units of `blocks.layout(mixer.parts.shared)`.
            others: coefficients of the other models where nothing is taken.
            dose: coefficient of the protected model in what is taken; 1 is its weights as they are.
        """
        names = layout(self.parts.shared).names(taken)
        whole = {protected: dose}
        return self.mix(lambda name: whole if name in names else others)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        with suppress(OSError, StopIteration):
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sys.maxsize  # not known: the allocator says so


def substitute(
    base: State,
    experts: Mapping[str, State],
    *,
    protected: str,
    blocks: Iterable[str] = (),
    kinds: Iterable[str] = (),
    weight: float = 0.5,
    dose: float = 1.0,
) -> Merged:
    """Blocks and kinds of tensors whole from one model, the others merged with one weight in the rest.

    Args:
        base: the model that they were fine-tuned from.
        experts: state dicts by name.
        protected: the one that is taken from.
        blocks, kinds: what is taken, as `blocks.layout` names it.
        weight: coefficient of all others elsewhere.
        dose: coefficient of the protected model in what is taken.

    Returns: the merge in the base's dtypes.

    Raises:
        UsageError: no such model, block or kind. InputError: models that do not fit together.
    """
    if protected not in experts:
        raise UsageError("no such expert", where=f"'{protected}'", expected=" | ".join(experts))
    mixer = Mixer(base, experts)
    grid = layout(mixer.parts.shared)
    blocks, kinds = list(blocks), list(kinds)
    if unknown := [one for one in (*blocks, *kinds) if one not in (*grid.blocks, *grid.kinds)]:
        got, expected = ", ".join(unknown), ", ".join((*grid.blocks, *grid.kinds))
        raise UsageError("no such block or kind of tensors", expected=expected, got=got)
    taken = grid.block(*blocks) | grid.kind(*kinds)
    others = {name: weight for name in experts if name != protected}
    merged = mixer.substitute(protected, taken, others, dose=dose)
    shared = {name: tensor.to(base[name].device, base[name].dtype) for name, tensor in merged.shared.items()}
    return Merged(shared, mixer.parts.private)
