"""What a chain costs: its last step, what was done to the model before it, and the search for what is repaired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..attacks.merges import PROBE_MERGE
from ..attacks.prepare import one_by_one
from .jobs import PROOF
from .rows import Cost, Row, Side

Known = Mapping[tuple[Side, tuple[str, ...]], Row]


def in_full(rows: Sequence[Row]) -> list[Row]:
    """Rows with the whole of their chains on their bill.

    A preparation is made once and used by many rows. It takes no passes, and the time by which the probe after it
    took longer than the probe of the model as it was. Of a repair every start counts with the search that found it.
    """
    known: dict[tuple[Side, tuple[str, ...]], Row] = {(row.side, row.chain): row for row in rows}
    return [replace(row, cost=_in_full(row, known)) for row in rows]


def _in_full(row: Row, known: Known) -> Cost:
    cost = replace(row.cost, seconds=row.cost.seconds + _preparing(row, known))
    starts = row.facts.get("starts", ())
    for chain in dict.fromkeys((*one_by_one(start["prepared"]), start["attack"]) for start in starts):
        if (found := known.get((row.side, chain))) is not None:
            before = _in_full(found, known)
            cost = replace(
                cost, forwards=cost.forwards + before.forwards, seconds=cost.seconds + before.seconds
            )
    return cost


def _preparing(row: Row, known: Known) -> float:
    """Seconds; those of a probe, and of a known case, are on their own bill."""
    *names, last = row.chain
    raw = known.get((row.side, (PROBE_MERGE.name,)))
    if last in (PROBE_MERGE.name, PROOF) or raw is None:
        return 0.0
    probes = (known.get((row.side, (name, PROBE_MERGE.name))) for name in names)
    return sum(max(0.0, probe.cost.seconds - raw.cost.seconds) for probe in probes if probe is not None)
