"""Whether anything can be measured: a fine-tune must beat its base clearly, on every half of the examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .rows import Floats
from .scores import Reference

SEPARATION = 5.0  # standard errors by which a fine-tune must beat its base for a task to count


@dataclass(frozen=True)
class Separation:
    """How far apart base and fine-tune are on a task, all examples together."""

    base: float
    plain: float
    error: float

    @property
    def times(self) -> float:
        """In standard errors of the paired difference."""
        gap = abs(self.plain - self.base)
        return gap / self.error if self.error else (np.inf if gap else 0.0)

    @property
    def enough(self) -> bool:
        """Whether values on this task mean anything."""
        return self.plain > self.base and self.times >= SEPARATION


def separation(base: Floats, plain: Floats) -> Separation:
    """Base and fine-tune on the same examples."""
    difference = plain - base
    return Separation(
        float(base.mean()), float(plain.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))
    )


def check_separation(found: Mapping[str, Separation]) -> None:
    """Refuse tasks on which base and fine-tune cannot be told apart.

    Raises:
        InputError: for all such tasks at once.
    """
    close = {task: one for task, one in found.items() if not one.enough}
    if close:
        raise InputError(
            "the fine-tune does not beat its base clearly enough to measure anything between them",
            where=", ".join(close),
            expected=f"{SEPARATION:g} standard errors of the paired difference",
            got="; ".join(
                f"{one.plain:.4f} against {one.base:.4f}, {one.times:.1f} standard errors of {one.error:.4f}"
                for one in close.values()
            ),
            hint="give it more evaluation examples, or a task that the fine-tune has learnt",
        )


def check_halves(reference: Reference) -> None:
    """Refuse tasks whose fine-tune beats its base on all examples, but not on those that are chosen or reported on.

    Raises:
        InputError: for all such tasks at once; their values would be upside down, or no numbers.
    """
    below = []
    for half in ("validation", "test"):
        for task in reference.tasks:
            base, plain = (float(scores[half][task].mean()) for scores in (reference.base, reference.plain))
            if not plain > base:
                below.append((task, half, base, plain))
    if below:
        halves = " and the ".join(dict.fromkeys(half for _, half, *_ in below))
        raise InputError(
            f"the fine-tune does not beat its base on the {halves} half of the examples",
            where=", ".join(dict.fromkeys(task for task, *_ in below)),
            expected="; ".join(f"a score above {base:.4f}" for *_, base, _ in below),
            got="; ".join(f"{plain:.4f}" for *_, plain in below),
            hint="give it more evaluation examples",
        )
