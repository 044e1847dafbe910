"""The tensors of a site as rows, and what no inner element can change of them.

Everything is read through the spec's table. `rows` are what a solver aligns: [b, n, width] by power.
`tables` are what heads, groups and experts are told apart by: at every inner site the products of its slots,
contracted over the dim that the inner group acts on, so that they are the same whatever element a lock drew
there (W_qᵀ W_k of a head, the sum of up ⊗ down of an expert). Wide rows are projected on random directions,
the same for both models: distances of products are kept to a few per cent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from math import prod
from string import ascii_lowercase

import numpy as np

from ..errors import InputError
from ..groups import Floats
from ..match import Instance, Match, MatchedSite
from ..spec import Slot
from ..transform import unfold
from .rows import Pair

Tensors = Mapping[str, Floats]

FEATURES = 4096  # of a table's cell, at most about
MOST, FEWEST = 64, 6  # random directions of one side


@dataclass(frozen=True)
class Place:
    """One tensor's part in one instance of a site."""

    name: str
    slot: Slot
    dims: Mapping[str, int]


@dataclass(frozen=True)
class Cells:
    """An array over named dims, its last axis being features."""

    dims: tuple[str, ...]
    values: Floats


@dataclass(frozen=True)
class Layout:
    """A match read by sites: which tensors each instance has."""

    match: Match
    places: Mapping[tuple[int, Instance], Sequence[Place]] = field(init=False)

    def __post_init__(self) -> None:
        found: dict[tuple[int, Instance], list[Place]] = {}
        for name, parts in self.match.parts.items():
            for part in parts:
                dims = self.match.sites[part.site].site.name_dims
                instance = tuple(part.dims[dim] for dim in dims)
                found.setdefault((part.site, instance), []).append(Place(name, part.slot, part.dims))
        for places in found.values():
            places.sort(key=lambda place: place.name)
        object.__setattr__(self, "places", found)

    def outer(self, number: int) -> bool:
        """Whether a site exchanges whole blocks, heads or experts, that other sites act inside of."""
        return self.match.sites[number].site.kind in ("heads", "experts")

    def inner(self, number: int) -> list[int]:
        """The sites whose instances or coordinates a permuting site moves about: those before it that it holds."""
        match = self.match
        site = match.sites[number].site
        mine = {slot.tensor for slot in site.slots}
        found = []
        for k in range(number):
            other = match.sites[k].site
            dims = {*other.per, *(d for slot in other.slots for i in slot.axes.values() for d in i.dims)}
            if site.acts in dims - {other.acts} and mine & {slot.tensor for slot in other.slots}:
                found.append(k)
        return found

    def rows(self, number: int, instance: Instance, own: Tensors, other: Tensors) -> list[Pair]:
        """What a solver for one instance of a site compares: rows of both models by power.

        Raises:
            InputError: the anchor has another shape there, or weights are not finite.
        """
        matched = self.match.sites[number]
        parts: dict[int, list[tuple[Floats, Floats]]] = {}
        for place in self.places[number, instance]:
            x, y = (slot_rows(v, place.slot, matched) for v in read_both(place.name, own, other))
            parts.setdefault(place.slot.power, []).append((x, y))
        return [
            (
                power,
                np.concatenate([x for x, _ in found], axis=2),
                np.concatenate([y for _, y in found], axis=2),
            )
            for power, found in sorted(parts.items())
        ]

    def check(self, number: int, instance: Instance, own: Tensors, other: Tensors) -> None:
        """Raises InputError as `rows` does."""
        for place in self.places[number, instance]:
            read_both(place.name, own, other)


def read_both(name: str, own: Tensors, other: Tensors) -> tuple[Floats, Floats]:
    """A tensor of both models in float64, checked.

    Raises:
        InputError: the anchor has not this tensor or has it in another shape; NaN or infinity in one of them.
    """
    x = np.asarray(own[name], dtype=np.float64)
    if name not in other:
        raise InputError(
            "the anchor lacks a tensor", where=name, hint="give a model of the same architecture"
        )
    y = np.asarray(other[name], dtype=np.float64)
    if x.shape != y.shape:
        raise InputError(
            "the anchor has another shape here", where=name, expected=list(x.shape), got=list(y.shape)
        )
    for which, values in (("attacked model", x), ("anchor", y)):
        if not np.isfinite(values).all():
            raise InputError(f"NaN or infinity in the {which}", where=name)
    return x, y


def fold(values: Floats, slot: Slot, sizes: Mapping[str, int]) -> Cells:
    """The view of a slot with one axis for each of its dims, and all else as features."""
    values, names = unfold(values, slot, sizes)
    dims = tuple(name for name in names if name is not None)
    order = [k for k, name in enumerate(names) if name is not None]
    rest = [k for k, name in enumerate(names) if name is None]
    moved = values.transpose([*order, *rest])
    return Cells(dims, moved.reshape(*moved.shape[: len(order)], -1))


def slot_rows(values: Floats, slot: Slot, matched: MatchedSite) -> Floats:
    """The rows of one tensor that a site acts on: [instances of the batch, coordinates, all else]."""
    cells = _arrange(fold(values, slot, matched.sizes), (*matched.site.batch_dims, matched.site.acts))
    return cells.reshape(prod(matched.batch), matched.acted, -1)


def _arrange(cells: Cells, lead: tuple[str, ...]) -> Floats:
    """The dims of `lead` first, all others behind them."""
    order = [cells.dims.index(dim) for dim in lead]
    rest = [k for k in range(len(cells.dims)) if k not in order]
    return cells.values.transpose([*order, *rest, len(cells.dims)])


# --- invariants ---------------------------------------------------------------------------------------------


def tables(layout: Layout, number: int, instance: Instance, tensors: Tensors, seed: int) -> Iterator[Cells]:
    """What one instance of a permuting site is told apart by, whatever was drawn at the sites inside of it."""
    match = layout.match
    site = match.sites[number].site
    inner = layout.inner(number)
    moving = {match.sites[k].site.acts for k in inner if layout.outer(k)}
    covered: set[str] = set()
    known = dict(zip(site.name_dims, instance, strict=True))
    own = {slot.tensor for slot in site.slots}

    def counts(place: Place) -> bool:
        """Of a site of all layers, tensors that others of this one's instances exchange are in another order."""
        mine = all(known.get(dim, number) == number for dim, number in place.dims.items())
        return mine or place.slot.tensor not in own

    for k in inner:
        if layout.outer(k):
            continue
        dims = match.sites[k].site.name_dims
        members = [
            at
            for at in match.sites[k].instances
            if all(known.get(dim, value) == value for dim, value in zip(dims, at, strict=True))
        ]
        for at in members:
            covered |= {place.name for place in layout.places[k, at]}
        keep = {site.acts, *site.batch_dims, *moving}
        if site.acts in dims:  # one instance for each value: they become a dim
            position = dims.index(site.acts)
            for group in _by(members, position).values():
                stacks = [list(_contracted(layout, k, at, tensors, keep, seed, counts)) for at in group]
                for same in zip(*stacks, strict=True):
                    yield Cells((site.acts, *same[0].dims), np.stack([cells.values for cells in same]))
            continue
        for at in members:
            yield from _contracted(layout, k, at, tensors, keep, seed, counts)
    yield from _direct(layout, number, instance, tensors, covered, {site.acts, *site.batch_dims, *moving})


def _by(members: Sequence[Instance], position: int) -> dict[Instance, list[Instance]]:
    """Instances that differ in one number alone, in its order."""
    found: dict[Instance, list[Instance]] = {}
    for at in sorted(members):
        found.setdefault(at[:position] + at[position + 1 :], []).append(at)
    return found


def _direct(
    layout: Layout, number: int, instance: Instance, tensors: Tensors, covered: set[str], keep: set[str]
) -> Iterator[Cells]:
    """The slots of a permuting site that no inner site acts on: a router, a sink, a table of biases."""
    matched = layout.match.sites[number]
    acts = matched.site.acts
    named: dict[str, list[tuple[int, Floats]]] = {}
    for place in layout.places[number, instance]:
        if place.name in covered:
            continue
        cells = fold(np.asarray(tensors[place.name], dtype=np.float64), place.slot, matched.sizes)
        if acts in place.slot.name_dims:
            named.setdefault(place.slot.tensor, []).append((place.dims[acts], cells.values.reshape(-1)))
        else:
            yield _flatten(cells, keep)
    for found in named.values():
        yield Cells((acts,), np.stack([values for _, values in sorted(found, key=lambda item: item[0])]))


def _contracted(
    layout: Layout,
    number: int,
    instance: Instance,
    tensors: Tensors,
    keep: set[str],
    seed: int,
    counts: Callable[[Place], bool],
) -> Iterator[Cells]:
    """The invariant products of one instance of an inner site, over the dims in `keep`, of places that count."""
    matched = layout.match.sites[number]
    site = matched.site
    parts: dict[tuple[int, tuple[str, ...]], list[Floats]] = {}
    for place in filter(counts, layout.places[number, instance]):
        cells = fold(np.asarray(tensors[place.name], dtype=np.float64), place.slot, matched.sizes)
        parts.setdefault((place.slot.power, cells.dims), []).append(cells.values)
    own = {dim for _, dims in parts for dim in dims} - keep - {site.acts}
    count = prod(matched.sizes[dim] for dim in own)
    most = int(np.clip(np.sqrt(FEATURES / max(count, 1)), FEWEST, MOST))
    sides = []
    for k, ((power, dims), found) in enumerate(sorted(parts.items())):
        values = np.concatenate(found, axis=-1)
        if values.shape[-1] > most:
            rng = np.random.default_rng([seed, k, values.shape[-1]])
            values = values @ (rng.standard_normal((values.shape[-1], most)) / np.sqrt(most))
        sides.append((power, Cells(dims, values)))
    planar = site.group in ("complex", "rotation")
    for (p, x), (q, y) in combinations_with_replacement(sides, 2):
        if not _free(site.group, p, q):
            continue
        yield _flatten(_contract(x, y, site.acts), keep)
        if planar:
            yield _flatten(_contract(x, _quarter_turn(y, site.acts), site.acts), keep)


def _free(group: str, p: int, q: int) -> bool:
    """Whether Σ over the acted dim of x ⊗ y, of powers p and q, is the same under every element."""
    if group in ("orthogonal", "rotation", "permutation"):
        return True
    if group in ("sign", "negation"):
        return (p + q) % 2 == 0
    return p + q == 0


def _quarter_turn(cells: Cells, acts: str) -> Cells:
    axis = cells.dims.index(acts)
    sign = np.array([1.0, -1.0]).reshape([-1 if k == axis else 1 for k in range(cells.values.ndim)])
    return Cells(cells.dims, np.flip(cells.values, axis) * sign)


def _contract(x: Cells, y: Cells, acts: str) -> Cells:
    every = tuple(dict.fromkeys((*x.dims, *y.dims)))
    letter = dict(zip(every, ascii_lowercase, strict=False))
    out = tuple(dim for dim in every if dim != acts)
    left, right, kept = ("".join(letter[dim] for dim in dims) for dims in (x.dims, y.dims, out))
    values = np.einsum(f"{left}Y,{right}Z->{kept}YZ", x.values, y.values, optimize=True)
    return Cells(out, values.reshape(*values.shape[:-2], -1))


def _flatten(cells: Cells, keep: set[str]) -> Cells:
    """All dims but those in `keep` as features."""
    dims = tuple(dim for dim in cells.dims if dim in keep)
    moved = _arrange(cells, dims)
    return Cells(dims, moved.reshape(*moved.shape[: len(dims)], -1))
