"""What a group leaves unchanged: polynomials of sketches that every element keeps, for every named group.

A slot's sketch is an array over named dims with a few features a cell. A group acts on one of the dims; the
functions here combine the slots of a site to tables that no element of the group can change, except for the
order of rows where the group permutes. Equal tables mean equal functions of the weights: the scores of a
query-key site, the products of a value-output site, the rows of an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import gcd
from string import ascii_lowercase

import numpy as np

from .errors import InputError
from .groups import Floats

PERMUTING = ("permutation", "monomial", "positive_monomial")
MAX_OUTER = 64  # features of a product before one side is projected


@dataclass(frozen=True)
class Cells:
    """Features over named dims.

    Attributes:
        dims: names of the dims.
        values: [the dims…, features].
        norms: [the dims…], what errors of a cell are measured against.
    """

    dims: tuple[str, ...]
    values: Floats
    norms: Floats


def invariants(group: str, acts: str, slots: Sequence[tuple[int, Cells]], where: str) -> list[Cells]:
    """The tables of one site.

    Args:
        group: name of the group.
        acts: the dim that it acts on.
        slots: power and sketch of every slot.
        where: name of the site, for errors.

    Raises:
        InputError: slots with powers that the group cannot have.
    """
    if group in ("general_linear", "orthogonal", "complex", "rotation"):
        return _contractions(group, acts, slots, where)
    if group in ("negation", "scalar"):
        slots = [(power, _fold(cells, acts)) for power, cells in slots]
    even = [cells for power, cells in slots if power == 0]
    odd = [(power, cells) for power, cells in slots if power != 0]
    if group == "permutation":
        return even + [cells for _, cells in odd]
    if group in ("sign", "negation"):
        free = [cells for power, cells in odd if power % 2 == 0]
        signed = [cells for power, cells in odd if power % 2]
        pairs = combinations_with_replacement(signed, 2)
        return even + free + [table for x, y in pairs for table in _product(x, y)]
    if group in ("diagonal", "scalar", "monomial", "positive_monomial"):
        return even + _scaled(odd, group == "positive_monomial", where)
    raise InputError("no identities are known for this group", where=where, got=group)


def _contractions(group: str, acts: str, slots: Sequence[tuple[int, Cells]], where: str) -> list[Cells]:
    """⟨A⁻ᵀ x, A y⟩ = ⟨x, y⟩; in the plane also x₀y₁ − x₁y₀, with which scores at every distance are told.

    Orthogonal elements keep the products of two slots of the same power as well.
    """
    if any(abs(power) != 1 for power, _ in slots):
        raise InputError("a slot that the group cannot act on", where=where, expected="powers 1 and -1")
    lower = [cells for power, cells in slots if power < 0]
    upper = [cells for power, cells in slots if power > 0]
    if not lower or not upper:
        raise InputError(
            "a site without a counterpart", where=where, expected="slots of power 1 and of power -1"
        )
    pairs = [(x, y) for x in lower for y in upper]
    if group in ("orthogonal", "rotation"):
        pairs = list(combinations_with_replacement([*lower, *upper], 2))
    tables = []
    for x, y in pairs:
        tables.append(_contract(x, y, acts))
        if group in ("complex", "rotation"):
            tables.append(_contract(x, _quarter_turn(y, acts), acts))
    return tables


def _quarter_turn(cells: Cells, acts: str) -> Cells:
    """(y₀, y₁) -> (y₁, −y₀)."""
    axis = cells.dims.index(acts)
    sign = np.array([1.0, -1.0]).reshape([-1 if k == axis else 1 for k in range(cells.values.ndim)])
    return Cells(cells.dims, np.flip(cells.values, axis) * sign, np.flip(cells.norms, axis))


def _scaled(slots: Sequence[tuple[int, Cells]], positive: bool, where: str) -> list[Cells]:
    """Products in which the scale of a row cancels: xᵃ ⊗ yᵇ for powers p, −q with a p = b q."""
    upper = [(power, cells) for power, cells in slots if power > 0]
    lower = [(power, cells) for power, cells in slots if power < 0]
    if slots and (not lower or not upper):
        raise InputError(
            "a site without a counterpart", where=where, expected="slots of a positive and a negative power"
        )
    tables: list[Cells] = []
    for p, x in upper:
        for q, y in lower:
            common = gcd(p, q)
            left, right = _lift(x, -q // common), _lift(y, p // common)
            if not positive and (p + q) % 2 == 0:
                tables += _product(left, right)
                continue
            # a positive scale keeps the signs of both sides, an odd sum of powers those of the even side
            if positive or p % 2 == 0:
                tables += _product(left, _sizes(right))
            if positive or q % 2 == 0:
                tables += _product(_sizes(left), right)
            if not positive:
                odd, other = (left, right) if p % 2 else (right, left)
                tables += [
                    table
                    for square in _product(odd, odd)
                    for table in _product(square, _sizes(_lift(other, 2)))
                ]
    return tables


def _lift(cells: Cells, degree: int) -> Cells:
    """Features of this degree in the scale: x · ‖x‖ᵈ⁻¹."""
    if degree == 1:
        return cells
    return Cells(cells.dims, cells.values * (cells.norms ** (degree - 1))[..., None], cells.norms**degree)


def _sizes(cells: Cells) -> Cells:
    return Cells(cells.dims, cells.norms[..., None], cells.norms)


def _fold(cells: Cells, acts: str) -> Cells:
    """All coordinates of the acted dim as features of one cell."""
    axis = cells.dims.index(acts)
    values = np.moveaxis(cells.values, axis, -2)
    norms = np.sqrt((cells.norms**2).sum(axis=axis))
    dims = tuple(dim for dim in cells.dims if dim != acts)
    return Cells(dims, values.reshape(*values.shape[:-2], -1), norms)


def _contract(x: Cells, y: Cells, acts: str) -> Cells:
    """Σ over the acted dim of x ⊗ y, [all other dims of both…, features of x × features of y]."""
    every = tuple(dict.fromkeys((*x.dims, *y.dims)))
    letter = dict(zip(every, ascii_lowercase, strict=False))
    out = [dim for dim in every if dim != acts]
    left, right, kept = ("".join(letter[dim] for dim in dims) for dims in (x.dims, y.dims, out))
    values = np.einsum(f"{left}Y,{right}Z->{kept}YZ", x.values, y.values, optimize=True)
    norms = np.asarray(np.einsum(f"{left},{right}->{kept}", x.norms, y.norms, optimize=True))
    return Cells(tuple(out), values.reshape(*values.shape[:-2], -1), norms)


def _product(x: Cells, y: Cells) -> list[Cells]:
    """x ⊗ y cell by cell; where that is too large, each side against random sums of the other."""
    fx, fy = x.values.shape[-1], y.values.shape[-1]
    if fx * fy > MAX_OUTER and min(fx, fy) > 4:
        return [_outer(x, _mixed(y)), _outer(_mixed(x), y)]
    return [_outer(x, y)]


def _mixed(cells: Cells) -> Cells:
    count = cells.values.shape[-1]
    weights = np.random.default_rng(count).standard_normal((count, 3)) / np.sqrt(count)
    return Cells(cells.dims, cells.values @ weights, cells.norms)


def _outer(x: Cells, y: Cells) -> Cells:
    dims = tuple(dict.fromkeys((*x.dims, *y.dims)))
    a, b = _spread(x.values, x.dims, dims), _spread(y.values, y.dims, dims)
    values = a[..., :, None] * b[..., None, :]
    norms = _spread(x.norms, x.dims, dims) * _spread(y.norms, y.dims, dims)
    return Cells(dims, values.reshape(*values.shape[:-2], -1), norms)


def _spread(array: Floats, own: tuple[str, ...], dims: tuple[str, ...]) -> Floats:
    """Axes in the order of `dims`, of length one where the array has none; further axes stay behind."""
    order = [own.index(dim) for dim in dims if dim in own]
    moved = np.transpose(array, [*order, *range(len(own), array.ndim)])
    sizes = iter(moved.shape)
    shape = [next(sizes) if dim in own else 1 for dim in dims]
    return moved.reshape(*shape, *moved.shape[len(own) :])
