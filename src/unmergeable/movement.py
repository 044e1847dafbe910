"""How far a lock moved the weights of every site, measured on what was written.

‖θ' − θ‖ / ‖θ‖ over the tensors of each instance of a site, on a grid of at most 64 × 64 entries a tensor: the
error of a ratio of norms over 4,096 entries is about two per cent, the cost next to nothing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from math import fsum, sqrt

import numpy as np

from .groups import Ints
from .match import Instance, Match
from .transform import Array, Elements

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Sample:
    """Values of one tensor, float64, on a grid: `axes` are the positions on each axis, ascending."""

    axes: tuple[Ints, ...]
    before: Array
    after: Array


def grid(shape: tuple[int, ...]) -> tuple[Ints, ...]:
    """Positions on each axis, about evenly spread: 64 × 64 of a matrix, 16 on each axis of larger arrays.

    The step varies by the golden ratio, for an even one would meet heads and pairs always at the same place.
    """
    most = 64 if len(shape) == 2 else 16
    return tuple(_spread(size, most) for size in shape)


def _spread(size: int, most: int) -> Ints:
    if size <= most:
        return np.arange(size, dtype=np.int64)
    k = np.arange(most)
    return ((k + (k * _GOLDEN) % 1.0) * (size / most)).astype(np.int64)


class Movement:
    """Sums over the tensors of every instance that has an element; samples are not kept."""

    def __init__(self, match: Match, elements: Elements) -> None:
        self._match, self._elements = match, elements
        self._sums: dict[tuple[int, Instance], list[tuple[float, float]]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, sample: Sample) -> None:
        """Count a tensor's sample; from any thread."""
        for part in self._match.parts.get(name, ()):
            matched = self._match.sites[part.site]
            instance = tuple(part.dims[dim] for dim in matched.site.name_dims)
            if (part.site, instance) not in self._elements:
                continue
            chosen = []
            for axis, positions in enumerate(sample.axes):
                index = part.slot.axes.get(axis)
                inside = np.ones(len(positions), dtype=bool)
                if index is not None:
                    inside = np.isin(positions, index.view(matched.sizes).positions().reshape(-1))
                chosen.append(np.flatnonzero(inside))
            picked = np.ix_(*chosen)
            before, after = sample.before[picked], sample.after[picked]
            finite = np.isfinite(before) & np.isfinite(after)
            moved = float(((after[finite] - before[finite]) ** 2).sum())
            norm = float((before[finite] ** 2).sum())
            with self._lock:
                self._sums.setdefault((part.site, instance), []).append((moved, norm))

    def measured(self) -> dict[tuple[int, Instance], float | None]:
        """Relative movement by (number of the site, instance).

        None where nothing can move: no tensor was sampled, for all are one-dimensional, or all weights are zero.
        """
        out: dict[tuple[int, Instance], float | None] = {}
        for key in self._elements:
            sums = self._sums.get(key)
            norm = fsum(n for _, n in sums) if sums else 0.0
            moved = fsum(m for m, _ in sums) if sums else 0.0  # fsum: the same in any order
            out[key] = None if sums is None else sqrt(moved / norm) if norm else None
        return out
