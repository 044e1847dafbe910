"""results.json: everything that an audit found, as one versioned document. `report` is drawn from it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import __version__
from .rows import LEVELS, Row
from .scores import FLOORS, Level, Reference
from .suite import RULES, STANDS_ON

DOCUMENT, DOCUMENT_VERSION = "unmergeable.audit", 1


@dataclass(frozen=True)
class Requirement:
    """What was asked for: protection at a level, and whether its lower 95 % limit reaches it."""

    level: int
    protection: float
    found: float | None

    @property
    def holds(self) -> bool:
        """Whether it is met; what cannot be measured is not."""
        return self.found is not None and self.found >= self.protection

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "level": self.level, "protection": self.protection, "found": self.found, "holds": self.holds
        }  # fmt: skip


@dataclass(frozen=True)
class AuditResult:
    """What an audit found; `as_dict` is results.json.

    Attributes:
        suite: version of the attack suite.
        config: the configuration as it was read.
        machine: what it ran on.
        models: by name: role, path, SHA-256 of its weights, parameters, distance to the base, lock's method.
        tasks: by name: kind, metric, role, how many examples, scores of base and fine-tune, standard errors.
        standalone: the protected task's score of the plain and of the released model, with an interval.
        levels: what thieves at each level of access get.
        rows: every attack on every side; reference: what their values are relative to.
        curve: by side, (forward passes, mean G) of a thief who spends no more.
        grid: the full-dose grid as a heat map; None if it was not tried.
        left_out: attacks that the budget did not allow, with their level and side.
        notes: sentences that the reader should know.
        requirements: what was asked for, and whether it holds.
        command: how to do it again.
        files: what was written.
    """

    suite: int
    seed: int
    levels: tuple[Level, ...]
    rows: tuple[Row, ...]
    reference: Reference
    config: Mapping[str, Any]
    machine: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]
    standalone: Mapping[str, Any]
    curve: Mapping[str, Sequence[tuple[float, float]]]
    grid: Mapping[str, Any] | None
    left_out: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    requirements: Sequence[Requirement]
    command: str
    seconds: float
    files: tuple[str, ...] = field(default=())

    @property
    def holds(self) -> bool:
        """Whether everything that was required holds."""
        return all(requirement.holds for requirement in self.requirements)

    def level(self, level: int) -> Level:
        """What was found for a level of access. Raises KeyError for one that was not audited."""
        for found in self.levels:
            if found.level == level:
                return found
        raise KeyError(level)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        rows = [row_document(number, row, self.reference) for number, row in enumerate(self.rows)]
        return {
            "document": DOCUMENT,
            "version": DOCUMENT_VERSION,
            "tool": __version__,
            "suite": self.suite,
            "rules": RULES,
            "seed": self.seed,
            "command": self.command,
            "seconds": self.seconds,
            "machine": dict(self.machine),
            "config": dict(self.config),
            "models": {name: dict(model) for name, model in self.models.items()},
            "tasks": {name: dict(task) for name, task in self.tasks.items()},
            "standalone": dict(self.standalone),
            "floors": list(FLOORS),
            "levels": [
                {
                    **level.as_dict(),
                    "verdict": verdict(level, rows),
                    "stands_on": [ground(rows[number]) for number in level.stands_on],
                }
                for level in self.levels
            ],
            "rows": rows,
            "curve": {side: [list(point) for point in points] for side, points in self.curve.items()},
            "grid": None if self.grid is None else dict(self.grid),
            "left_out": [dict(one) for one in self.left_out],
            "notes": list(self.notes),
            "requirements": [requirement.as_dict() for requirement in self.requirements],
            "holds": self.holds,
        }


def row_document(number: int, row: Row, reference: Reference) -> dict[str, Any]:
    """A row for JSON: what it is, and its best merge (the worse of protected and own, on validation examples)."""
    best = max(
        row.points, key=lambda point: min(reference.pair("validation", point.validation)), default=None
    )
    found: dict[str, Any] = {"id": number, **row.summary(), "options": None, "validation": None, "test": None}
    if best is not None:
        found["options"] = dict(best.options)
        for half, scores in (("validation", best.validation), ("test", best.test)):
            value, own = reference.pair(half, scores)
            found[half] = {"protected": value, "own": own, "joint": min(value, own)}
        found["scores"] = {task: float(best.test[task].mean()) for task in reference.tasks}
    return found


def ground(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row that a level's figure stands on, for JSON."""
    return {"level": row["level"], "row": row["id"], "attack": row["attack"]}


def verdict(level: Level, rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence for one level of access, for somebody who reads nothing else."""
    who = f"Level {level.level} ({LEVELS[level.level]})"
    if level.reason is not None:
        return f"{who}: not judged. {level.reason[:1].upper()}{level.reason[1:]}."
    # What he gets by leaving the protected model alone says nothing about it.
    with_it = [
        floor.chosen["protected"]
        for floor in sorted(level.floors, key=lambda floor: -floor.gain("protected"))
        if floor.chosen["protected"].row not in (None, floor.chosen["without"].row)
    ]
    how = ""
    if level.recovered > 0 and with_it:
        best = with_it[0]
        assert best.row is not None
        how = (
            f" Best: {rows[best.row]['attack']}, {percent(best.value)} of the task "
            f"with {percent(best.own)} of his own."
        )
    # The best of all may be of a level below: then what this level adds is named as well.
    own = [number for number in level.stands_on if rows[number]["level"] == level.level]
    if level.level > max(STANDS_ON) and own and f"Best: {rows[own[0]]['attack']}, " not in how:
        values = rows[own[0]]["test"]
        how += (
            f" Best of its own attacks: {rows[own[0]]['attack']}, {percent(values['protected'])} of the task "
            f"with {percent(values['own'])} of his own."
        )
    left_out = "".join(f" {note[:1].upper()}{note[1:]}." for note in level.notes)
    share = "nothing" if level.recovered <= 0 else percent(level.recovered)
    low, high = (percent(limit) for limit in level.interval)
    return (
        f"{who}: a thief gets {share} of what the unprotected model would give him "
        f"(95 % interval {low} to {high}).{how}{left_out}"
    )


def percent(value: float) -> str:
    """A share for people: whole per cent, and no minus before a zero."""
    return f"{round(100 * value) + 0} %"
