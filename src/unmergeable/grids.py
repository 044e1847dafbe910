"""The tensors of a slot as a grid, with an axis for every number in their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from .errors import InputError
from .match import Match
from .spec import Slot


@dataclass(frozen=True)
class Grid:
    """One slot's tensors in a component: names by the values of the dims in the name.

    Attributes:
        dims: of the names, told apart where other slots of the site have other values of one.
        values: of each dim. names: row-major over them.
    """

    slot: Slot
    dims: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]


def grids(match: Match, number: int, names: Iterable[str]) -> list[Grid]:
    """Those of every slot of a site.

    Args:
        number: of the site. names: of the tensors that are meant.

    Raises:
        InputError: tensors that are no full grid.
    """
    names = list(names)
    return _told_apart([_grid(match, number, slot, names) for slot in match.sites[number].site.slots])


def _grid(match: Match, number: int, slot: Slot, names: Iterable[str]) -> Grid:
    dims = tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", slot.tensor)))
    found = {
        tuple(part.dims[dim] for dim in dims): name
        for name in names
        for part in match.parts[name]
        if part.site == number and part.slot is slot
    }
    values = tuple(tuple(sorted({key[k] for key in found})) for k in range(len(dims)))
    if not found or prod(len(value) for value in values) != len(found):
        raise InputError(
            "a slot whose tensors are not a full grid", where=slot.tensor, got=f"{len(found)} tensors"
        )
    return Grid(slot, dims, values, tuple(found[key] for key in sorted(found)))


def _told_apart(every: Sequence[Grid]) -> list[Grid]:
    """Dims with a stroke where a slot has other values than the one with most tensors.

    Where layers take the keys of others there are more queries than keys, and each is a counterpart of each.
    """
    known: dict[str, list[tuple[int, ...]]] = {}
    for one in sorted(every, key=lambda one: -len(one.names)):
        for dim, values in zip(one.dims, one.values, strict=True):
            others = known.setdefault(dim, [])
            if values not in others:
                others.append(values)
    return [
        replace(
            one,
            dims=tuple(
                dim + "'" * known[dim].index(values) for dim, values in zip(one.dims, one.values, strict=True)
            ),
        )
        for one in every
    ]
