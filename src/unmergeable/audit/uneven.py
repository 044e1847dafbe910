"""Attacks that an error kept from being tried on the protected model alone, whose controls must not count either.

What such an attack gets from the unprotected model would stand in the sum that is recovered *from*, against
nothing, and pass for protection. So the rows that it is compared with, with the unprotected model and without
either, are taken out.
"""

from __future__ import annotations

from collections.abc import Sequence

from .rows import Row


def uneven(rows: Sequence[Row], level: int) -> tuple[frozenset[int], tuple[str, ...]]:
    """Rows to be taken out at a level of access, by their place, and the names of the attacks.

    The control of an attack is the row of the same chain. Sides may differ in what they do to the model first: of a
    merge that failed after a preparation which the unprotected model does not need, the merge by itself is the control,
    also where it was tried on the protected model as it is, for that is what a lock breaks. Where it failed after every
    preparation that was tried on the protected model, all its rows are controls.
    """
    within = [row for row in rows if row.level <= level]
    failed = {row.chain for row in within if row.side == "protected" and row.errored}
    tried = {row.chain[-1] for row in within if row.side == "protected" and not row.errored}
    never = {chain[-1] for chain in failed} - tried
    # What fails on both models shows nothing of either, and leaves nothing to take out.
    held = {row.chain for row in within if row.side == "plain"}
    wanted = {chain if chain in held else chain[-1:] for chain in failed}
    controls = {
        row.chain
        for row in within
        if row.side == "plain" and row.points and (row.chain in wanted or row.chain[-1] in never)
    }
    numbers = frozenset(
        number
        for number, row in enumerate(rows)
        if row.level <= level and row.side != "protected" and row.points and row.chain in controls
    )
    return numbers, tuple(dict.fromkeys(row.attack for row in within if row.chain in controls))
