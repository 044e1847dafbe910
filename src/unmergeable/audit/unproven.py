"""Rows that count on no side: those of attacks that an error stopped, and of attacks that did not prove themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from .rows import Row, Side
from .uneven import uneven

if TYPE_CHECKING:
    from .scores import Reference

# Which attacks that did not prove themselves are counted: all, none, or those that get as much from the protected
# model as from the other.
Unproven = Literal["all", "none", "as good"]


def uncounted(
    rows: Sequence[Row], reference: Reference, level: int, unproven: Unproven
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Rows that count on no side, by their place, and the names of those of attacks that an error stopped."""
    without, names = uneven(rows, level)
    if unproven == "all":
        return without, names
    doubted = {
        number: row for number, row in enumerate(rows) if row.state == "unreliable" and row.level <= level
    }
    worth: dict[tuple[str, Side], float] = {}
    for row in doubted.values():
        merge = row.chain[-1], row.side
        worth[merge] = max(worth.get(merge, 0.0), reference.worth(row))
    kept = {
        name
        for name, side in worth
        if unproven == "as good"
        and side == "protected"
        and worth[name, side] >= worth.get((name, "plain"), 0.0)
    }
    return without | {number for number, row in doubted.items() if row.chain[-1] not in kept}, names
