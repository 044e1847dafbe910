"""What the report's tables show: records of any kind, attacks beside their controls, heat maps, what did not run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .numerals import Cell, cell, known
from .words import header

Row = Mapping[str, Any]

PROOF = "proof"  # how the chain of a known case ends


@dataclass(frozen=True)
class Records:
    """Named records as a table: a column for every key that one of them has."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers and nothing else but gaps."""
        cells = [cells[column] for _, cells in self.rows]
        return any(one.number for one in cells) and all(one.number or one == cell(None) for one in cells)


def records(found: Mapping[str, Mapping[str, Any]]) -> Records:
    """The table of named records, such as models or tasks."""
    keys = list(dict.fromkeys(key for record in found.values() for key in record))
    return Records(
        tuple(header(key) for key in keys),
        tuple((name, tuple(entry(key, record.get(key)) for key in keys)) for name, record in found.items()),
    )


def entry(key: str, value: Any) -> Cell:
    """The cell of a key: as any other, but that an interval has two ends."""
    if key == "interval" and isinstance(value, list | tuple) and len(value) == 2:
        return Cell(" to ".join(cell(end).text for end in value), None, True)
    return cell(value)


def known_cases(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Preparations on their known cases, which are no merges; and all other rows."""
    cases: list[Row] = []
    others: list[Row] = []
    for row in rows:
        (cases if row["chain"][-1] == PROOF else others).append(row)
    return cases, others


@dataclass(frozen=True)
class Pair:
    """An attack on the protected model, and its control on the unprotected one.

    own: whether the control is of the same chain. If that was not tried, a prepared attack stands beside the same
    merge without its first preparations, or without any: there is nothing to undo on that side.
    """

    row: Row
    control: Row | None
    own: bool


def pairs(rows: Iterable[Row]) -> tuple[dict[int, list[Pair]], list[Row]]:
    """Rows of the protected side with their controls, by level, best first; and all rows that are in no pair.

    A chain that was tried more than once has its controls in the order of the document.
    """
    controls: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    targets, alone = [], []
    for row in rows:
        if row["side"] == "plain":
            controls[tuple(row["chain"])].append(row)
        elif row["side"] == "protected":
            targets.append(row)
        else:
            alone.append(row)
    shorter = {chain: found[0] for chain, found in controls.items()}
    levels: dict[int, list[Pair]] = defaultdict(list)
    for row in targets:
        chain = tuple(row["chain"])
        if controls[chain]:
            pair = Pair(row, controls[chain].pop(0), True)
        else:
            ends = (chain[begin:] for begin in range(1, len(chain)))
            pair = Pair(row, next((shorter[end] for end in ends if end in shorter), None), False)
        levels[row["level"]].append(pair)
    alone = [row for left in controls.values() for row in left] + alone
    ordered = {
        level: sorted(levels[level], key=lambda pair: joint(pair.row), reverse=True)
        for level in sorted(levels)
    }
    return ordered, sorted(alone, key=lambda row: (row["side"], row["level"], -joint(row)))


def joint(row: Row) -> float:
    """The worse of protected and own of a row's best merge, on test examples; −∞ where it has none."""
    value: float | None = row["test"]["joint"] if row["test"] else None
    return value if value is not None and known(value) else float("-inf")


@dataclass(frozen=True)
class Trouble:
    """An attack that did not simply run: on which sides, at which level, what came of it, and why."""

    attack: str
    level: int
    state: str
    reason: str | None
    sides: tuple[str, ...]


def troubles(rows: Iterable[Row], left_out: Iterable[Row]) -> list[Trouble]:
    """What was unreliable, failed, refused or left out; the same on several sides is said once."""
    order = ("unreliable", "failed", "refused", "left out")
    found: dict[tuple[str, int, str, str | None], list[str]] = defaultdict(list)
    for row in rows:
        if row["state"] != "done":
            name = (
                f"{' > '.join(row['chain'][:-1])}, known case" if row["chain"][-1] == PROOF else row["attack"]
            )
            found[name, row["level"], row["state"], row["reason"]].append(row["side"])
    for one in left_out:
        reason = one.get("reason") or "the budget did not allow it"
        found[one["attack"], one["level"], "left out", reason].append(one["side"])
    made = [
        Trouble(attack, level, state, reason, tuple(dict.fromkeys(sides)))
        for (attack, level, state, reason), sides in found.items()
    ]
    return sorted(made, key=lambda one: (order.index(one.state) if one.state in order else -1, one.level))


@dataclass(frozen=True)
class HeatCell:
    """A value of a heat map: mix is how much of its colour it has, in percent; best, whether none is higher."""

    value: Any
    mix: int
    best: bool


@dataclass(frozen=True)
class Heat:
    """A heat map of one side: a row for each of `ys`."""

    side: str
    rows: tuple[tuple[HeatCell, ...], ...]
    best: tuple[Any, Any, Any] | None  # value, x, y


def heats(grid: Mapping[str, Any]) -> list[Heat]:
    """The heat maps of a grid, the protected model's first. No colour at 0 and below, all of it at 1 and above."""
    made = []
    for side in ("protected", "plain"):
        values: Sequence[Sequence[Any]] | None = grid.get(side)
        if values is None:
            continue
        places = [
            (value, x, y)
            for y, line in zip(grid["ys"], values, strict=True)
            for x, value in zip(grid["xs"], line, strict=True)
            if known(value)
        ]
        best = max(places, key=lambda place: place[0], default=None)
        rows = tuple(
            tuple(
                HeatCell(value, _mix(value), best is not None and known(value) and value == best[0])
                for value in line
            )
            for line in values
        )
        made.append(Heat(side, rows, best))
    return made


def _mix(value: Any) -> int:
    return round(100 * min(1.0, max(0.0, value))) if known(value) else 0
