"""How far two checkpoints' cells are apart, and how far rounding alone may put them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .groups import Floats
from .invariants import Cells
from .sketch import Noise, Sketch, shake

__all__ = ["EXACT_BOUND", "Finding", "Judged", "Limits", "errors", "errors_of_zeros", "limits", "worst_of"]

EXACT_BOUND = 1e-10
NOISE_FACTOR = 4.0
DRAWS = 8


class Judged(NamedTuple):
    """Cells of a table, the number of its site, and whether they must be the same, whatever is rounded."""

    cells: Cells
    site: int
    strict: bool


@dataclass(frozen=True)
class Finding:
    """How one site compares within one component; errors are relative to the size of what is compared."""

    site: int
    label: str  # of the first cell that differs, else of the worst
    measured: float
    bound: float

    @property
    def held(self) -> bool:
        return self.measured <= self.bound


class Limits(NamedTuple):
    """By table: bounds of errors, and what rounding makes of a cell of zeros; both in the shape of its cells."""

    bounds: list[Floats]
    steps: list[Floats]


def limits(
    source: Sequence[Judged],
    tables: Callable[[Mapping[str, Sketch]], Sequence[Cells]],
    before: Mapping[str, Sketch],
    noise: Mapping[str, Noise],
    seed: int,
) -> Limits:
    """Four times what rounding does to every cell of every table.

    At its site; where a dtype's smallest step is much of a row, to that row alone. One such row must not be an excuse
    for all the others, and nothing is large beside zeros.

    Args:
        source: the tables of a checkpoint. tables: makes their cells of sketches of its tensors.
        before: these sketches. noise: the rounding of every tensor. seed: of the noise.
    """
    sites = {one.site: EXACT_BOUND for one in source}
    own, steps = ([np.zeros(one.cells.norms.shape) for one in source] for _ in range(2))
    random = np.random.default_rng(seed)
    for _ in range(DRAWS):
        for floor in (False, True):
            shaken = {
                name: shake(one, noise[name] if floor else replace(noise[name], floor=0.0), random)
                for name, one in before.items()
            }
            for k, (judged, moved) in enumerate(zip(source, tables(shaken), strict=True)):
                found = errors(judged.cells, moved)
                if floor:
                    own[k] = np.maximum(own[k], found)
                    steps[k] = np.maximum(steps[k], _gaps(judged.cells, moved))
                else:
                    worst = NOISE_FACTOR * float(found.max(initial=0.0))
                    sites[judged.site] = max(sites[judged.site], worst)
    bounds = [
        np.full(cells.shape, EXACT_BOUND)
        if one.strict
        else np.maximum(sites[one.site], NOISE_FACTOR * np.where(one.cells.norms > 0.0, cells, 1.0))
        for one, cells in zip(source, own, strict=True)
    ]
    return Limits(bounds, steps)


def errors(a: Cells, b: Cells) -> Floats:
    """Largest difference of a cell's features, relative to the cell's size; one where only `b` has a size."""
    gap = _gaps(a, b)
    size = np.where(a.norms > 0.0, a.norms, b.norms)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(
            np.where(gap == 0.0, 0.0, np.where(size > 0.0, gap / np.where(size > 0, size, 1.0), np.inf))
        )


def errors_of_zeros(found: Floats, a: Cells, b: Cells, steps: Floats) -> Floats:
    """Errors of cells that are zero in `a` in what rounding makes of zeros, all others as they are."""
    with np.errstate(invalid="ignore", divide="ignore"):
        of_zeros = np.where(found == 0.0, 0.0, _gaps(a, b) / steps)
    return np.where(a.norms > 0.0, found, of_zeros)


def worst_of(apart: Floats, bounds: Floats) -> tuple[int, float, float]:
    """Of [n] errors: the number of the first that is over its bound, with the largest and the least bound of those.

    If none is, the one that comes nearest to its bound. What may be anything is no evidence.
    """
    held = (apart <= bounds) & np.isfinite(bounds)
    if held.all():
        at = int((apart / bounds).argmax())
        return at, float(apart[at]), float(bounds[at])
    bad = ~held
    worst = float("inf") if not np.isfinite(apart[bad]).all() else float(apart[bad].max())
    bound = float(np.where(np.isfinite(bounds), bounds, EXACT_BOUND)[bad].min())
    return int(np.flatnonzero(bad)[0]), worst if worst > bound else float("inf"), bound


def _gaps(a: Cells, b: Cells) -> Floats:
    """Largest difference of a cell's features."""
    return np.asarray(np.abs(a.values - b.values).max(axis=-1, initial=0.0))
