"""One attack on one side: look at everything on a few examples, score the best in full, say what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attacks.merges import Coefficients, Method
from ..attacks.thief import MergeAttack, Pair, Subject, Thief
from ..errors import InputError, RunError
from ..merging import Merged
from ..merging.check import facts
from .bench import Bench
from .rows import Cost, Look, Point, Row, Scores, Side
from .scores import Reference

# What torch and numpy raise where memory, or a decomposition, fails them.
FAILURES = (RunError, MemoryError, RuntimeError, np.linalg.LinAlgError)
LEAST = 3  # merges of an attack that are scored on all validation examples, if it has so many
Starts = Callable[[], Sequence[tuple[Mapping[str, Any], Merged]]]


@dataclass(eq=False)
class Explorer:
    """Looks at merges for an attack, and remembers them.

    Attributes:
        looks: everything that was looked at, in order.
        kept: merges that are held in memory, by their place in `looks`: the best ones so far.
        broken: merges whose answers are no numbers.
        forwards: passes that looking took.
    """

    bench: Bench
    reference: Reference

    def __post_init__(self) -> None:
        self.looks: list[Look] = []
        self.kept: dict[int, Subject] = {}
        self.broken = 0
        self.forwards = 0.0

    def __call__(self, options: Mapping[str, Any], subject: Subject, *, kept: Subject | None = None) -> Pair:
        pair = self.peek(subject)
        if not np.isfinite(pair).all():
            self.broken += 1
            return pair
        self.looks.append(Look(dict(options), *pair))
        if kept is not None:
            self.kept[len(self.looks) - 1] = kept
            wanted = set(finalists(self.looks, self.reference.floors))
            self.kept = {number: one for number, one in self.kept.items() if number in wanted}
        return pair

    def peek(self, subject: Subject) -> Pair:
        """Values on a few examples; minus infinity where the answers are no numbers."""
        self.forwards += self.examples("screen")
        try:
            return self.reference.pair("screen", self.bench.measure(subject, "screen"))
        except InputError:
            return -np.inf, -np.inf

    def examples(self, half: str) -> int:
        """How many examples all tasks have in a half."""
        return sum(len(index[half]) for index in self.bench.index.values())


def finalists(looks: Sequence[Look], floors: Sequence[float], least: int = LEAST) -> list[int]:
    """What is worth more than a look: the best of both values, the best with each floor, the next best to `least`.

    Of looks that are as good, the one that gives more of the rest, as thieves choose.
    """
    found: dict[int, None] = {}
    both = [look.protected + look.own for look in looks]
    order = sorted(range(len(looks)), key=lambda number: (-looks[number].joint, -both[number]))
    if order:
        found[order[0]] = None
    for floor in floors:
        within = [number for number in range(len(looks)) if looks[number].own >= floor]
        if within:
            found[max(within, key=lambda number: (looks[number].protected, both[number]))] = None
    for number in order:
        if len(found) >= least:
            break
        found[number] = None
    return list(found)


def explore(
    bench: Bench,
    reference: Reference,
    attack: MergeAttack,
    side: Side,
    *,
    prepared: str | None = None,
    starts: Starts = tuple,
) -> Row:
    """Run one attack on one side. What goes wrong is part of the row, not an error.

    Args:
        bench, reference: models and tasks, and what values are relative to.
        attack, side: which attack, and what the thief holds.
        prepared: what he does to the protected model first.
        starts: makes the merges that a repair begins with.
    """
    began = time.monotonic()
    chain = (attack.name,) if prepared is None else (prepared, attack.name)
    needs = attack.needs
    explorer = Explorer(bench, reference)
    thief: Thief | None = None
    points: list[Point] = []
    found: dict[str, Any] = {}
    state, reason = "done", None
    try:
        thief = bench.thief(side, prepared, starts())
        attack.explore(thief, explorer)
        points, problems = _score(bench, thief, attack, explorer, side, found)
        if not points:
            state, reason = "failed", _nothing(explorer)
        elif problems:
            state, reason = "unreliable", f"not a merge: {'; '.join(problems)}"
    except InputError as error:
        state, reason = "refused", said(error)
    except FAILURES as error:
        state, reason = "failed", said(error)
    if explorer.broken:
        found["broken"] = explorer.broken
    return Row(
        chain=chain,
        side=side,
        level=max(attack.access, 0 if prepared is None else 1),
        about=attack.about,
        needs=needs,
        points=tuple(points),
        looks=tuple(explorer.looks),
        cost=_cost(thief, explorer, time.monotonic() - began),
        state=state,  # type: ignore[arg-type]
        reason=reason,
        seed=bench.seed,
        facts=found,
    )


def _score(
    bench: Bench,
    thief: Thief,
    attack: MergeAttack,
    explorer: Explorer,
    side: Side,
    found: dict[str, Any],
) -> tuple[list[Point], list[str]]:
    """The finalists on both halves, and why the best of them is no merge."""
    floors = explorer.reference.floors
    scored: list[tuple[Look, Subject | None, Scores]] = []
    for number in finalists(explorer.looks, floors):
        options = explorer.looks[number].options
        # What was kept is in memory; a grid's merge is made again, in one buffer: it is scored at once.
        subject = explorer.kept.get(number) or attack.make(thief, options)
        try:
            scores = bench.measure(subject, "validation")
        except InputError:  # finite on a few examples, not on all
            explorer.broken += 1
            continue
        pair = explorer.reference.pair("validation", scores)
        scored.append((Look(options, *pair), explorer.kept.get(number), scores))
    points: list[Point] = []
    problems: list[str] = []
    # What is the best by nothing on validation examples will not be chosen: it needs no test.
    for place, number in enumerate(finalists([look for look, _, _ in scored], floors, least=1)):
        look, kept, scores = scored[number]
        subject = kept or attack.make(thief, look.options)
        try:
            test = bench.measure(subject, "test")
        except InputError:
            explorer.broken += 1
            continue
        points.append(Point(look.options, scores, test))
        if place == 0 and side != "without" and isinstance(attack, Coefficients | Method):
            assert isinstance(subject, Merged)
            checked = facts(thief.base, thief.experts, subject.shared)
            problems = checked.problems
            found |= {"moved": checked.moved, "shares": dict(checked.shares), "near_base": checked.near_base}
    return points, problems


def _cost(thief: Thief | None, explorer: Explorer, seconds: float) -> Cost:
    if thief is None:
        return Cost(seconds=seconds)
    bill = thief.bill
    full = len(finalists(explorer.looks, explorer.reference.floors)) * explorer.examples("validation")
    return Cost(
        inputs=sum(bill.inputs.values()),
        labelled=sum(bill.labelled.values()),
        tokens=sum(bill.tokens.values()),
        forwards=bill.forwards + explorer.forwards + full,
        seconds=seconds,
        size=bill.size,
    )


def _nothing(explorer: Explorer) -> str:
    if explorer.broken:
        return f"all {explorer.broken} merges give answers that are no numbers"
    return "nothing to try with these models"


def said(error: BaseException) -> str:
    """An error on one line."""
    return " ".join((str(error) or type(error).__name__).split())
