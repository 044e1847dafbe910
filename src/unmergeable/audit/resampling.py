"""Examples drawn anew, and what thieves choose on them: arrays over candidates, examples and resamples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .rows import Floats


def drawn(
    held: Sequence[tuple[Floats, Floats, Floats]], floor: Floats, alone: NDArray[np.bool_] | None
) -> tuple[Floats, NDArray[np.bool_]]:
    """As scores' `_choose`, for every resample: the value of what is taken, 0 where nothing is, and whether any is.

    Args:
        held: of every pool: values and least own values on validation examples, values on test examples.
        floor: of own values, by resample.
        alone: where a thief takes something without the model, if that is asked for.
    """
    nothing = floor <= 0
    if not held:
        return np.zeros(len(floor)), ~nothing & False
    value, own, tested = (np.concatenate(parts) for parts in zip(*held, strict=True))
    # Of merges that are as good, the one that gives more of the rest.
    worth = np.where((own >= floor) & np.isfinite(value), value + 1e-9 * (value + own), -np.inf)
    best = worth.argmax(axis=0)
    every = np.arange(len(floor))
    taken = np.isfinite(worth[best, every])
    if alone is not None:
        nothing = nothing | ~alone
    taken &= ~nothing | (value[best, every] > 0)
    return np.where(taken, tested[best, every], 0.0), taken


def shares_of(count: int, seed: int, resamples: int) -> Floats:
    """How much of a mean every example is, [count, resamples]."""
    draws = resample(count, seed, resamples)
    found = np.zeros((count, resamples))
    np.add.at(found, (draws, np.arange(resamples)[:, None]), 1 / count)
    return found


def resample(count: int, seed: int, resamples: int) -> NDArray[np.int64]:
    """Examples drawn with replacement, [resamples, count]."""
    return np.random.default_rng([seed, count]).integers(0, count, (resamples, count))
