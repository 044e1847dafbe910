"""One attack on one side: look at everything on a few examples, score the best in full, say what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attacks.coefficients import Coefficients as Learnt
from ..attacks.informed import Fisher, RegMean
from ..attacks.merges import Coefficients, Method
from ..attacks.prepare import one_by_one
from ..attacks.thief import MergeAttack, Pair, Subject, Thief
from ..errors import InputError, UnmergeableError
from ..merging import Merged
from ..merging.check import facts
from ..merging.tensors import distance
from .bench import Bench
from .finalists import finalists, promising
from .rows import Cost, Look, Point, Row, Scores, Side, State
from .scores import Reference

# Our own errors, and what torch and numpy raise where memory, or a decomposition, fails them.
FAILURES = (UnmergeableError, MemoryError, RuntimeError, np.linalg.LinAlgError)
# What makes every tensor of the models' own. Blocks of one model are copies on purpose, what was trained is no mix.
MIXES = (Coefficients, Method, Learnt, RegMean, Fisher)
Starts = Callable[[], Sequence[tuple[Mapping[str, Any], Merged]]]


@dataclass(eq=False)
class Explorer:
    """Looks at merges for an attack, and remembers them.

    Attributes:
        looks: everything that was looked at, in order.
        kept: merges that are held in memory, by their place in `looks`: the best ones so far.
        broken: merges whose answers are no numbers.
        forwards: passes that looking, and choosing among the best, took.
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
            wanted = set(promising(self.looks, self.reference.floors))
            self.kept = {number: one for number, one in self.kept.items() if number in wanted}
        return pair

    def peek(self, subject: Subject) -> Pair:
        """Values on a few examples; minus infinity where the answers are no numbers."""
        try:
            return self.reference.pair("screen", self.measure(subject, "screen"))
        except InputError:
            return -np.inf, -np.inf

    def measure(self, subject: Subject, half: str) -> Scores:
        """Scores on a half of the examples; the passes that they take are counted.

        Raises:
            As `Bench.measure`.
        """
        for task, index in self.bench.index.items():
            # A pass through a wide merge is one through all of its models.
            size = 1.0 if isinstance(subject, Merged) else float(getattr(subject[task], "size_ratio", 1.0))
            self.forwards += size * len(index[half])
        return self.bench.measure(subject, half)


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
        prepared: what he does to the protected model first; several names with `THEN` between them.
        starts: makes the merges that a repair begins with.
    """
    began = time.monotonic()
    chain = (*one_by_one(prepared), attack.name)
    needs = attack.needs
    explorer = Explorer(bench, reference)
    thief: Thief | None = None
    points: list[Point] = []
    found: dict[str, Any] = {}
    state: State = "done"
    reason: str | None = None
    try:
        thief = bench.thief(side, prepared, starts())
        if thief.starts:
            found["starts"] = [dict(start) for start, _ in thief.starts]  # which options call by their number
        attack.explore(thief, explorer)
        points, problems = _score(bench, thief, attack, explorer, side, found)
        if not points:
            state, reason = "failed", _nothing(explorer, found)
        elif problems:
            state, reason = "unreliable", f"not a merge: {'; '.join(problems)}"
    except Exception as error:
        state, reason = failed(error)
        found["error"] = type(error).__name__
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
        state=state,
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
    """The finalists on both halves, and why some of them are no merges."""
    floors = explorer.reference.floors
    scored: list[tuple[Look, Subject | None, Scores]] = []
    for number in promising(explorer.looks, floors):
        options = explorer.looks[number].options
        # What was kept is in memory; a grid's merge is made again, in one buffer: it is scored at once.
        subject = explorer.kept.get(number) or attack.make(thief, options)
        try:
            scores = explorer.measure(subject, "validation")
        except InputError:  # finite on a few examples, not on all
            explorer.broken += 1
            continue
        pair = explorer.reference.pair("validation", scores)
        scored.append((Look(options, *pair), explorer.kept.get(number), scores))
    points: list[Point] = []
    problems: dict[str, None] = {}
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
        if side != "without" and isinstance(attack, MIXES):
            assert isinstance(subject, Merged)
            checked = facts(thief.base, thief.experts, subject.shared)
            problems |= dict.fromkeys(checked.problems)
            if place == 0:
                # By itself: alignments bring it nearer to the base, whatever the merge's coefficients are.
                held = thief.experts[thief.protected]
                found |= {
                    "distance": distance(thief.base, held),
                    "moved": checked.moved,
                    "shares": dict(checked.shares),
                    "near_base": checked.near_base,
                }
    return points, list(problems)


def _cost(thief: Thief | None, explorer: Explorer, seconds: float) -> Cost:
    if thief is None:
        return Cost(seconds=seconds)
    bill = thief.bill
    return Cost(
        inputs=sum(bill.inputs.values()),
        labelled=sum(bill.labelled.values()),
        tokens=sum(bill.tokens.values()),
        forwards=bill.forwards + explorer.forwards,
        seconds=seconds,
        size=bill.size,
    )


def _nothing(explorer: Explorer, found: dict[str, Any]) -> str:
    if explorer.broken:
        return f"all {explorer.broken} merges give answers that are no numbers"
    found["error"] = "nothing to try"
    return "nothing to try with these models"


def failed(error: Exception) -> tuple[State, str]:
    """What an error makes of a row. An odd one, of a bug perhaps, costs its row and not the audit."""
    if isinstance(error, InputError):
        return "refused", said(error)
    if isinstance(error, FAILURES):
        return "failed", said(error)
    return "failed", f"{type(error).__name__}: {said(error)}"


def said(error: BaseException) -> str:
    """An error on one line."""
    return " ".join((str(error) or type(error).__name__).split())
