"""The element of a site's group that brings one model nearest to another, group by group.

`solve` returns B with B x ≈ y. `Aim` says how much of the group is used: all of it, what keeps lengths
(Procrustes), canonical forms, or orders alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np

from ..groups import Element, Floats, Monomial
from . import rows
from .dense import Side, as_dense, canonical, general_linear, planar, procrustes
from .rows import Pair

# An element this near to signed permutations times powers of two is taken to be one (root mean squares):
OFF_SCALE = 0.1  # log₂ of the scales, from whole numbers
OFF_ROW = 0.3  # a row's other entries, relative to its largest


class Aim(Enum):
    """Which part of a group an attack uses."""

    FULL = "full"
    LENGTHS = "lengths"  # orthogonal elements alone
    POLAR = "polar"  # canonical forms, joined by a rotation
    SVD = "svd"  # canonical forms, singular directions as coordinates
    ORDER = "order"  # permutations alone


def solve(group: str, pairs: Sequence[Pair], aim: Aim = Aim.FULL) -> Element | None:
    """The element of a group for rows of both models; None where the aim leaves nothing to choose.

    Args:
        pairs: power, rows of the attacked model and of the anchor [b, n, width].

    Raises:
        ValueError: a group that no solver is known for.
    """
    b, n, _ = pairs[0][1].shape
    if aim is Aim.ORDER:
        return _order(group, pairs)
    if group in ("general_linear", "orthogonal", "complex", "rotation"):
        return as_dense(_matrices(group, _side(pairs, 1), _side(pairs, -1), aim))
    if group == "permutation":
        perm = rows.pair_rows(pairs, scaled=False, signed=False)
        return Monomial(perm, np.ones(perm.shape))
    if group in ("monomial", "positive_monomial"):
        return rows.monomial(pairs, signed=group == "monomial")
    if group not in ("diagonal", "sign", "negation", "scalar"):
        raise ValueError(f"no solver for the group '{group}'")
    whole = group in ("negation", "scalar")
    if group in ("sign", "negation") or aim is Aim.LENGTHS:
        scale = rows.best_signs(pairs, whole=whole)
    else:
        scale = rows.best_scales(pairs, signed=True, whole=whole, canonical_form=aim in (Aim.POLAR, Aim.SVD))
    return Monomial(rows.identity(b, n), np.ascontiguousarray(scale))


def _order(group: str, pairs: Sequence[Pair]) -> Element | None:
    if group not in ("permutation", "monomial", "positive_monomial"):
        return None
    perm = rows.pair_rows(pairs, scaled=group != "permutation", signed=group == "monomial")
    return Monomial(perm, np.ones(perm.shape))


def _side(pairs: Sequence[Pair], power: int) -> Side:
    for found, x, y in pairs:
        if found == power:
            return Side.of(x, y)
    return Side.none(*pairs[0][1].shape[:2])


def _matrices(group: str, plus: Side, minus: Side, aim: Aim) -> Floats:
    form = aim in (Aim.POLAR, Aim.SVD)
    if group in ("complex", "rotation"):
        scaled = group == "complex" and aim is not Aim.LENGTHS
        return planar(plus, minus, scaled=scaled, canonical_form=form)
    if group == "orthogonal" or aim is Aim.LENGTHS:
        return procrustes(plus, minus)
    if form:
        return canonical(plus, minus, form=aim.value)
    return general_linear(plus, minus)


def snap(element: Element) -> Element:
    """The exact lock's element, where the whole batch is near to signed permutations times powers of two.

    A lock that moves bits is undone bit for bit then. A batch drawn from a continuous group is not that near by
    chance: log₂ of its scales lies .29 from whole numbers in the mean, and its rows are not of one entry.
    """
    if isinstance(element, Monomial):
        perm, scale, rest = element.perm, element.scale, np.zeros(1)
    else:
        matrix = element.matrix(1)
        columns = np.sqrt(
            (matrix**2).sum(axis=1, keepdims=True)
        )  # (1 + noise) · scales · order: columns first
        perm = np.abs(matrix / columns).argmax(axis=2).astype(np.int64)
        if not np.array_equal(np.sort(perm, axis=1), rows.identity(*perm.shape)):
            return element
        scale = np.take_along_axis(matrix, perm[:, :, None], axis=2)[:, :, 0]
        own = np.take_along_axis(np.abs(scale), np.argsort(perm, axis=1), axis=1)  # by column
        rest = ((matrix / own[:, None]) ** 2).sum(axis=2) - 1.0
    if not np.all(np.abs(scale) > 0):
        return element
    exponent = np.log2(np.abs(scale))
    whole = np.rint(exponent)
    if np.sqrt(np.mean((exponent - whole) ** 2)) > OFF_SCALE or np.sqrt(np.mean(rest)) > OFF_ROW:
        return element
    return Monomial(perm, np.sign(scale) * np.exp2(whole))
