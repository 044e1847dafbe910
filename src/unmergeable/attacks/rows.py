"""Solves for orders, signs and scales of rows: the assignment problem, and one number a row.

Rows are [b, n, width] by power, of the attacked model (x) and the anchor (y). A row of power p is multiplied
by sᵖ. Before rows are paired, both models' are brought to the scale at which their sides are of one size, so
that what is compared does not depend on the scales that a lock has drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..groups import Floats, Ints, Monomial
from .dense import bracket, minimise

Pair = tuple[int, Floats, Floats]  # power, x [b, n, width], y of the same shape

EXACT = 2048  # rows up to which the assignment is solved as a whole


def assign(similarity: Floats) -> Ints:
    """For each row of a square matrix the column that it takes, for the largest sum: int64 [n].

    Beyond `EXACT` rows those that are each other's best are paired first, and the rest as a whole.
    """
    from scipy.optimize import linear_sum_assignment

    n = len(similarity)
    if n <= EXACT:
        return np.asarray(linear_sum_assignment(similarity, maximize=True)[1], dtype=np.int64)
    forth, back = similarity.argmax(axis=1), similarity.argmax(axis=0)
    sure = back[forth] == np.arange(n)
    out = np.full(n, -1, dtype=np.int64)
    out[sure] = forth[sure]
    rest = np.flatnonzero(~sure)
    free = np.setdiff1d(np.arange(n), forth[sure])
    if len(rest):
        part = np.ascontiguousarray(similarity[np.ix_(rest, free)], dtype=np.float64)
        out[rest] = free[linear_sum_assignment(part, maximize=True)[1]]
    return out


def pair_rows(pairs: Sequence[Pair], *, scaled: bool, signed: bool) -> Ints:
    """The order in which x is most like y: row j of the anchor is row perm[b, j] of the attacked model.

    Args:
        scaled: rows may differ by positive scales. signed: and by signs.
    """
    b, n, _ = pairs[0][1].shape
    own = other = None
    if scaled:
        own = [_balanced([(p, _squares(x)[e]) for p, x, _ in pairs]) for e in range(b)]
        other = [_balanced([(p, _squares(y)[e]) for p, _, y in pairs]) for e in range(b)]
    perm = np.empty((b, n), dtype=np.int64)
    kind = np.float64 if n <= EXACT else np.float32
    for e in range(b):
        fixed, turning = np.zeros((n, n), dtype=kind), np.zeros((n, n), dtype=kind)
        for power, x, y in pairs:
            left, right = y[e], x[e]
            if own is not None and other is not None:
                left, right = left * other[e][:, None] ** power, right * own[e][:, None] ** power
            target = turning if signed and power % 2 else fixed
            target += left.astype(kind) @ right.astype(kind).T
        perm[e] = assign(fixed + np.abs(turning))
    return perm


def best_scales(
    pairs: Sequence[Pair], *, signed: bool, whole: bool = False, canonical_form: bool = False
) -> Floats:
    """The scale s of every row for which sᵖ x is nearest to y over all powers, [b, n].

    Args:
        signed: s may be negative. whole: one s for all rows of an instance.
        canonical_form: |s| from the sizes of the rows alone, as the ratio of both models' balanced scales.
    """
    sides = [(p, _squares(x), (x * y).sum(axis=2), _squares(y)) for p, x, y in pairs]
    if whole:
        sides = [(p, _whole(g), _whole(c), _whole(h)) for p, g, c, h in sides]
    low, high = bracket([(p, g, h) for p, g, _, h in sides])
    even = [side for side in sides if side[0] % 2 == 0]
    odd = [side for side in sides if side[0] % 2]

    def turn(u: Floats) -> Floats:
        zero = np.zeros_like(u)
        return sum((np.exp(p * u) * c for p, _, c, _ in odd), zero)

    def cost(u: Floats) -> Floats:
        value = sum((np.exp(2 * p * u) * g for p, g, _, _ in sides), np.zeros_like(u))
        value = value - sum((2 * np.exp(p * u) * c for p, _, c, _ in even), np.zeros_like(u))
        along = turn(u)
        return value - 2.0 * (np.abs(along) if signed else along)

    if canonical_form:
        own = _balanced([(p, g) for p, g, _, _ in sides])
        other = _balanced([(p, h) for p, _, _, h in sides])
        u = np.log(own) - np.log(other)
    else:
        u = minimise(cost, low, high)
    scale = np.exp(u)
    return np.where(turn(u) < 0, -scale, scale) if signed else scale


def best_signs(pairs: Sequence[Pair], *, whole: bool = False) -> Floats:
    """The sign of every row (with `whole`, one of all rows of an instance) that brings x nearest to y, [b, n]."""
    along = sum(((x * y).sum(axis=2) for p, x, y in pairs if p % 2), np.zeros(pairs[0][1].shape[:2]))
    if whole:
        along = _whole(along)
    return np.where(along < 0, -1.0, 1.0)


def monomial(pairs: Sequence[Pair], *, signed: bool) -> Monomial:
    """Order, and best scale of each row: row j of the anchor ← scale[j] · x[perm[j]]."""
    perm = pair_rows(pairs, scaled=True, signed=signed)
    ordered = [(p, np.take_along_axis(x, perm[:, :, None], axis=1), y) for p, x, y in pairs]
    return Monomial(perm, best_scales(ordered, signed=signed))


def identity(b: int, n: int) -> Ints:
    """Rows as they stand, int64 [b, n]."""
    return np.broadcast_to(np.arange(n, dtype=np.int64), (b, n)).copy()


def _whole(a: Floats) -> Floats:
    return np.broadcast_to(a.sum(axis=1, keepdims=True), a.shape)


def _squares(x: Floats) -> Floats:
    return np.asarray(np.einsum("bnw,bnw->bn", x, x))


def _balanced(sides: Sequence[tuple[int, Floats]]) -> Floats:
    """The scale at which Σ s²ᵖ ‖x‖² is least: the sides of a row are of one size there."""
    used = [(p, g) for p, g in sides if p]
    if not any(p > 0 for p, _ in used) or not any(p < 0 for p, _ in used):
        return np.ones_like(sides[0][1])
    up, down = [s for s in used if s[0] > 0], [s for s in used if s[0] < 0]
    if {p for p, _ in used} == {1, -1}:
        high, low = sum(g for _, g in up), sum(g for _, g in down)
        known = (high > 0) & (low > 0)
        return np.where(known, np.where(known, low, 1.0) / np.where(known, high, 1.0), 1.0) ** 0.25
    known = np.logical_and.reduce([np.logical_or.reduce([g > 0 for _, g in part]) for part in (up, down)])
    spread = [np.abs(np.log(np.where(g > 0, g, 1.0))) for _, g in used]
    bound = np.where(known, np.max(spread, axis=0) + 1.0, 0.0)

    def cost(u: Floats) -> Floats:
        return sum((np.exp(2 * p * u) * g for p, g in used), np.zeros_like(u))

    return np.asarray(np.exp(minimise(cost, -bound, bound)))
