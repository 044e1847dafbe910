"""What happens to one tensor: the elements of its sites, compiled to steps along its axes.

`compile_tensor` turns a match and drawn elements into the source tensor and a list of steps. `Take` steps
(reorder, flip signs, multiply) of one axis are composed into one, so an exact lock is at most one gather an
axis and works on raw bits; `Mix` steps multiply blocks by matrices and need floating point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .groups import Dense, Element, Floats, Ints, Monomial
from .match import Instance, Match, Part
from .spec import Slot

Elements = Mapping[tuple[int, Instance], Element]
Array = NDArray[Any]


@dataclass(frozen=True)
class Take:
    """out[j] = factor[j] · in[take[j]] along `axis`; per position of axis `outer` where that is given.

    take: int64 [L], or [E, L] with an outer axis; factor: float64 of the same shape, None for all ones.
    """

    axis: int
    take: Ints
    factor: Floats | None
    outer: int | None = None

    @property
    def exact(self) -> bool:
        return self.factor is None or bool(np.all(np.abs(np.frexp(self.factor)[0]) == 0.5))

    def after(self, first: Take) -> Take:
        """One step that does `first`, then this one."""
        take = np.take_along_axis(first.take, self.take, axis=-1)
        if self.factor is None and first.factor is None:
            return replace(self, take=take)
        factor = np.ones(take.shape) if self.factor is None else self.factor
        if first.factor is not None:
            factor = factor * np.take_along_axis(first.factor, self.take, axis=-1)
        return replace(self, take=take, factor=factor)

    def inverse(self) -> Take:
        back = np.argsort(self.take, axis=-1, kind="stable")
        factor = None if self.factor is None else 1.0 / np.take_along_axis(self.factor, back, axis=-1)
        return replace(self, take=back, factor=factor)


@dataclass(frozen=True)
class Mix:
    """Blocks of `axis` multiplied by matrices.

    positions: int64 [b, n, r], for every block its n coordinates, r times; matrix: float64 [b, n, n], with a
    leading [E] on both the matrix alone where an outer axis chooses it.
    """

    axis: int
    positions: Ints
    matrix: Floats
    undo: Floats
    outer: int | None = None

    exact = False

    def inverse(self) -> Mix:
        return replace(self, matrix=self.undo, undo=self.matrix)


Step = Take | Mix


@dataclass(frozen=True)
class TensorPlan:
    """Where a tensor of the destination comes from and what is done on the way."""

    source: str
    steps: tuple[Step, ...]

    @property
    def exact(self) -> bool:
        """Whether raw bits can be moved and flipped without any rounding."""
        return all(step.exact for step in self.steps)


def unfold(values: Array, slot: Slot, sizes: Mapping[str, int]) -> tuple[Array, list[str | None]]:
    """The part of a tensor that a slot views, with one axis for each of its dims.

    Returns: the array, and the dim on each of its axes; None for an axis of the tensor that the slot leaves whole.
    """
    shape: list[int] = []
    names: list[str | None] = []
    for axis in range(values.ndim):
        index = slot.axes.get(axis)
        if index is None:
            shape.append(values.shape[axis])
            names.append(None)
            continue
        view = index.view(sizes)
        positions = view.positions().reshape(-1)
        if len(positions) != values.shape[axis] or not np.array_equal(positions, np.arange(len(positions))):
            values = np.take(values, positions, axis=axis)
        shape += [size for _, size, _ in view.dims]
        names += list(view.names)
    return values.reshape(shape), names


def compile_tensor(match: Match, elements: Elements, name: str, *, undo: bool = False) -> TensorPlan:
    """The plan of one destination tensor under the drawn elements, or under their inverses with `undo`."""
    moved = _moved_name(match, elements, name, undo)
    own = name if undo else moved
    steps = _merge(
        [
            _step(
                part.slot, match.sites[part.site].sizes, match.sites[part.site].site.batch_dims, acts, element
            )
            for part, acts, element in _acting(match, elements, own)
        ]
    )
    if undo:
        steps = [step.inverse() for step in reversed(steps)]
    return TensorPlan(moved, tuple(steps))


def _acting(match: Match, elements: Elements, name: str) -> list[tuple[Part, str, Element]]:
    """The elements that act along an axis of this tensor, inner sites first."""
    found = []
    for part in match.parts.get(name, ()):
        site = match.sites[part.site].site
        element = elements.get((part.site, tuple(part.dims[dim] for dim in site.name_dims)))
        if element is not None and site.acts not in part.slot.name_dims:
            found.append((part, site.acts, element))
    return found


def _moved_name(match: Match, elements: Elements, name: str, undo: bool) -> str:
    """Which tensor this one is made from: a site that acts on a dim of the name exchanges whole tensors."""
    for part in reversed(match.parts.get(name, ())):
        site = match.sites[part.site].site
        if site.acts not in part.slot.name_dims:
            continue
        element = elements.get((part.site, tuple(part.dims[dim] for dim in site.name_dims)))
        if element is None:
            continue
        assert isinstance(element, Monomial)  # only permutations act on names: Site.check
        perm = element.inverse().perm if undo else element.perm
        name = match.name(part.slot.tensor, {**part.dims, site.acts: int(perm[0, part.dims[site.acts]])})
    return name


def _step(
    slot: Slot, sizes: Mapping[str, int], batch_dims: Sequence[str], acts: str, element: Element
) -> Step:
    axis = slot.axis_of(acts)
    assert axis is not None
    view = slot.axes[axis].view(sizes)
    here = [dim for dim in batch_dims if dim in view.names]
    outside = [dim for dim in batch_dims if dim not in view.names]
    rest = [dim for dim in view.names if dim not in here and dim != acts]
    positions = view.positions((*here, acts, *rest)).reshape(
        int(np.prod([sizes[dim] for dim in here], dtype=np.int64)), sizes[acts], -1
    )
    outer = slot.axis_of(outside[0]) if outside else None
    if outside:
        outer_view = slot.axes[outer].view(sizes) if outer is not None else None
        if outer_view is None or outer_view.names != tuple(outside) or outer_view.offset:
            raise AssertionError(
                f"{slot.tensor}: {outside} must be one whole axis"
            )  # Site.check refuses these

    def arrange(values: Array) -> Array:
        """[b, …] in the order of the site's batch dims -> [E, blocks here, …]."""
        shaped = values.reshape(*(sizes[dim] for dim in batch_dims), *values.shape[1:])
        order = [*outside, *here]
        lead = [list(batch_dims).index(dim) for dim in order]
        shaped = shaped.transpose(*lead, *range(len(batch_dims), shaped.ndim))
        count = int(np.prod([sizes[dim] for dim in outside], dtype=np.int64))
        return shaped.reshape(count, positions.shape[0], *values.shape[1:])

    if isinstance(element, Dense):
        forward = arrange(element.matrix(slot.power))
        undo = arrange(element.inverse().matrix(slot.power))
        if outer is None:
            forward, undo = forward[0], undo[0]
        return Mix(axis, positions, forward, undo, outer)
    perm, factors = arrange(element.perm), arrange(element.factors(slot.power))
    take = np.broadcast_to(np.arange(view.total, dtype=np.int64), (perm.shape[0], view.total)).copy()
    factor = np.ones(take.shape)
    blocks = np.arange(positions.shape[0])[:, None]
    for e in range(perm.shape[0]):
        take[e][positions] = positions[blocks, perm[e]]
        factor[e][positions] = factors[e][:, :, None]
    scaled = None if bool(np.all(factor == 1.0)) else factor
    if outer is None:
        return Take(axis, take[0], None if scaled is None else scaled[0])
    return Take(axis, take, scaled, outer)


def _merge(steps: Sequence[Step]) -> list[Step]:
    """Compose neighbouring takes. Steps on different axes commute, unless one is the other's outer axis."""
    merged: list[Step] = []
    for step in steps:
        at = len(merged)
        while at and _commute(merged[at - 1], step):
            at -= 1
        last = merged[at - 1] if at else None
        if (
            isinstance(step, Take)
            and isinstance(last, Take)
            and (last.axis, last.outer) == (step.axis, step.outer)
        ):
            merged[at - 1] = step.after(last)
        else:
            merged.append(step)
    return merged


def _commute(a: Step, b: Step) -> bool:
    return a.axis != b.axis and a.axis != b.outer and b.axis != a.outer


# --- applying -----------------------------------------------------------------------------------------------

_MANTISSA_BITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}


def apply_bits(bits: Array, dtype: str, steps: Sequence[Step]) -> Array:
    """Apply exact steps to raw bits: gather, flip sign bits, add to exponents. No rounding in any dtype.

    Zeros, infinities and NaNs keep their magnitude under powers of two, as lossless needs.
    """
    for step in steps:
        assert isinstance(step, Take)
        if step.outer is None:
            bits = _take_bits(bits, dtype, step.axis, step.take, step.factor)
            continue
        axis = step.axis - (step.axis > step.outer)
        bits = np.stack(
            [
                _take_bits(part, dtype, axis, step.take[e], None if step.factor is None else step.factor[e])
                for e, part in enumerate(np.moveaxis(bits, step.outer, 0))
            ],
            axis=step.outer,
        )
    return bits


def _take_bits(bits: Array, dtype: str, axis: int, take: Ints, factor: Floats | None) -> Array:
    out = np.empty_like(bits, order="C")
    np.take(bits, take, axis=axis, out=out, mode="clip")
    if factor is None:
        return out
    along = [1] * bits.ndim
    along[axis] = -1
    top = out.dtype.itemsize * 8 - 1
    if np.any(factor < 0):
        out ^= ((factor < 0).astype(out.dtype) << out.dtype.type(top)).reshape(along)
    exponent = np.frexp(np.abs(factor))[1] - 1
    if np.any(exponent):
        _add_exponents(out, dtype, exponent.reshape(along))
    return out


def _add_exponents(bits: Array, dtype: str, exponent: Ints) -> None:
    """Multiply by powers of two in place. Zeros, infinities and NaNs stay; what leaves the normal numbers rounds.

    A lock scales nothing that would round; weights that were trained since may.
    """
    from .checkpoint.numeric import to_bits, to_float64

    mantissa = _MANTISSA_BITS[dtype]
    top = bits.dtype.itemsize * 8 - 1
    field = bits.dtype.type((1 << top) - (1 << mantissa))
    highest = (1 << (top - mantissa)) - 1
    now = ((bits & field) >> bits.dtype.type(mantissa)).astype(np.int64)
    after = now + exponent
    normal = (now > 0) & (now < highest)
    safe = normal & (after >= 1) & (after < highest)
    magnitude = bits & bits.dtype.type((1 << top) - 1)
    rounds = (magnitude != 0) & (now < highest) & ~safe & (exponent != 0)
    rounded = None
    if np.any(rounds):
        scale = np.ldexp(1.0, np.broadcast_to(exponent, bits.shape)[rounds].astype(np.int32))
        with np.errstate(over="ignore", under="ignore"):
            rounded = to_bits(to_float64(bits[rounds], dtype) * scale, dtype)
    add = (exponent.astype(np.int64) << mantissa).astype(bits.dtype)
    bits += np.where(safe, add, bits.dtype.type(0))
    if rounded is not None:
        bits[rounds] = rounded


def apply_floats(values: Array, steps: Sequence[Step]) -> Array:
    """Apply any steps to a float32 or float64 array of the tensor's shape."""
    for step in steps:
        if step.outer is None:
            values = _apply_one(values, step.axis, step, None)
            continue
        axis = step.axis - (step.axis > step.outer)
        parts = np.moveaxis(values, step.outer, 0)
        values = np.stack([_apply_one(part, axis, step, e) for e, part in enumerate(parts)], axis=step.outer)
    return values


def _apply_one(values: Array, axis: int, step: Step, e: int | None) -> Array:
    along = [1] * values.ndim
    along[axis] = -1
    if isinstance(step, Take):
        take = step.take if e is None else step.take[e]
        out = np.take(values, take, axis=axis, mode="clip")
        if step.factor is not None:
            factor = step.factor if e is None else step.factor[e]
            out *= factor.reshape(along).astype(values.dtype)
        return out
    matrix = (step.matrix if e is None else step.matrix[e]).astype(values.dtype)
    blocks, n, repeats = step.positions.shape
    first = np.moveaxis(values, axis, 0)
    gathered = first[step.positions.transpose(0, 2, 1)]  # [b, r, n, …]
    flat = gathered.reshape(blocks, repeats, n, -1)
    mixed = np.matmul(matrix[:, None], flat).reshape(gathered.shape)
    out = first.copy()
    out[step.positions.transpose(0, 2, 1)] = mixed
    return np.ascontiguousarray(np.moveaxis(out, 0, axis))
