"""Which row of one table is which row of another: exact copies by sorting, noisy ones by their neighbours.

A wrong answer can only make a comparison fail that would have held, never the other way round.
"""

from __future__ import annotations

import numpy as np

from .groups import Floats, Ints

SAME = 1e-7  # rows closer than this, relative to their largest feature, are copies
CHUNK = 1 << 16  # distances computed at once: in a core's cache, and too few for BLAS to start threads
MAX_GREEDY = 2048  # rows that are paired by all of their distances


def match_rows(a: Floats, b: Floats) -> Ints:
    """A permutation p with b[p] ≈ a, for finite [n, m] arrays with equal rows up to order and noise.

    Equal rows are exchanged freely. Where rows have no counterpart the answer is still a permutation.
    """
    weights = np.random.default_rng(a.shape[1]).standard_normal(a.shape[1])
    perm = np.empty(len(a), dtype=np.int64)
    perm[np.argsort((a * weights).sum(axis=1), kind="stable")] = np.argsort(
        (b * weights).sum(axis=1), kind="stable"
    )
    size = np.maximum(np.abs(a).max(axis=1, initial=0.0), np.abs(b[perm]).max(axis=1, initial=0.0))
    rest = np.flatnonzero(np.abs(a - b[perm]).max(axis=1, initial=0.0) > SAME * size)
    if len(rest) > 1:
        perm[rest] = perm[rest][_match_noisy(a[rest], b[perm[rest]])]
    return perm


def _match_noisy(a: Floats, b: Floats) -> Ints:
    """Nearest neighbours where they are mutual; what is left by the shortest distances, pair by pair."""
    nearest = _nearest(a, b)
    clear = _nearest(b, a)[nearest] == np.arange(len(a))
    perm = np.full(len(a), -1, dtype=np.int64)
    perm[clear] = nearest[clear]
    free = np.ones(len(b), dtype=bool)
    free[nearest[clear]] = False
    left, open_ = np.flatnonzero(~clear), np.flatnonzero(free)
    if len(left) > MAX_GREEDY:
        perm[left] = open_  # far more than noise makes: the comparison will say so
    elif len(left):
        perm[left] = open_[_greedy(a[left], b[open_])]
    return perm


def _nearest(a: Floats, b: Floats) -> Ints:
    """For each row of `a` the number of the nearest row of `b`."""
    # |a − b|² / 2 is |b|² / 2 − ⟨a, b⟩ but for a constant: one product with a column of ones
    left = np.concatenate([a, np.ones((len(a), 1))], axis=1)
    right = np.concatenate([-b, 0.5 * np.einsum("ij,ij->i", b, b)[:, None]], axis=1).T.copy()
    out = np.empty(len(a), dtype=np.int64)
    step = max(1, CHUNK // len(b))
    for start in range(0, len(a), step):
        out[start : start + step] = (left[start : start + step] @ right).argmin(axis=1)
    return out


def _greedy(a: Floats, b: Floats) -> Ints:
    distance = np.stack([((row - b) ** 2).sum(axis=1) for row in a])
    perm = np.full(len(a), -1, dtype=np.int64)
    taken = np.zeros(len(b), dtype=bool)
    missing = len(a)
    for flat in np.argsort(distance, axis=None, kind="stable"):
        i, j = divmod(int(flat), len(b))
        if perm[i] < 0 and not taken[j]:
            perm[i], taken[j] = j, True
            missing -= 1
            if not missing:
                break
    return perm
