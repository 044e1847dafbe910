"""Scores: what a thief gets, on the scale on which the base is 0 and a task's own fine-tune is 1.

value v_t(M) = (score_t(M) − score_t(base)) / (score_t(plain) − score_t(base)); own(M) = the least value of the
thief's tasks. For every floor q, a thief at some level of access takes the merge with the largest value of the
protected task among those with own ≥ q. He chooses on validation examples; what he got is measured on test
examples. G(q) is that value less what a thief gets at the same level without the protected model, and

    recovered = Σ_q G(q) with the protected model / Σ_q G(q) with the unprotected one.

A merge that gives the thief nothing which the protected model by itself does not give is no theft by merging: a
floor is at least MARGIN above the fine-tune's own value of the thief's tasks.

Intervals are percentiles of a paired bootstrap: validation and test examples are drawn anew, the same ones for all
models, and thieves choose anew: an interval has in it that another draw makes another choice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .resampling import drawn, shares_of
from .rows import LEVELS, SIDES, Floats, Point, Row, Scores, Side
from .unproven import Unproven, uncounted

FLOORS = (0.0, 0.25, 0.5, 0.75)
RESAMPLES = 2000
COVERAGE = 0.95
MARGIN = 0.2  # of his own tasks, that a merge must give a thief beyond the unmerged fine-tune
ROUNDING = 1e-9  # of a value: what sums in another order may differ by
DIGITS = 12  # of a value in the bootstrap
LEAST = 0.05  # Σ G of the unprotected model below which there is nothing that could be recovered


@dataclass(frozen=True)
class Reference:
    """Scores that values are relative to: of the base and of each task's own unprotected fine-tune.

    Attributes:
        protected: the protected task. own: the thief's.
        base, plain: scores by half ("screen", "validation", "test") and task.
        alone: the least value of the thief's tasks that the unprotected fine-tune has by itself, on validation
            examples. itself: its scores on the thief's tasks there; none are needed without a bootstrap.
    """

    protected: str
    own: tuple[str, ...]
    base: Mapping[str, Scores]
    plain: Mapping[str, Scores]
    alone: float = -np.inf
    itself: Scores = field(default_factory=dict)

    @property
    def floors(self) -> tuple[float, ...]:
        """What a merge must give the thief of his own tasks, for each of FLOORS."""
        return tuple(max(floor, self.alone + MARGIN) for floor in FLOORS)

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks, the protected one first."""
        return (self.protected, *self.own)

    def value(self, half: str, task: str, scores: Floats) -> float:
        """The value of a model on a task, from its scores on a half of the examples."""
        # On the few examples of a first look the fine-tune may be no better than the base, by chance: what lies
        # between both is taken from all validation examples.
        whole = "validation" if half == "screen" else half
        span = float(self.plain[whole][task].mean() - self.base[whole][task].mean())
        return float((scores.mean() - self.base[half][task].mean()) / span)

    def pair(self, half: str, scores: Scores) -> tuple[float, float]:
        """The value of the protected task, and the least of the thief's own."""
        own = min(self.value(half, task, scores[task]) for task in self.own)
        return self.value(half, self.protected, scores[self.protected]), own

    def worth(self, row: Row | None) -> float:
        """Σ over the floors of the best value of a row on validation examples; nothing counts as 0."""
        pairs = [] if row is None else [self.pair("validation", point.validation) for point in row.points]
        return sum(max([0.0, *(value for value, own in pairs if own >= floor)]) for floor in self.floors)


@dataclass(frozen=True)
class Chosen:
    """What a thief with a floor takes: a point of a row, or nothing (the base, whose values are 0)."""

    row: int | None
    point: Point | None
    value: float
    own: float

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; `row` counts the audit's rows."""
        return {"row": self.row, "value": self.value, "own": self.own}


@dataclass(frozen=True)
class Floor:
    """What each thief gets who insists on a floor for his own tasks; values on test examples.

    asked: one of FLOORS. floor: what was insisted on.
    """

    asked: float
    floor: float
    chosen: Mapping[Side, Chosen]

    def gain(self, side: Side) -> float:
        """G: the value of the protected task beyond that of a thief without the model."""
        return self.chosen[side].value - self.chosen["without"].value


@dataclass(frozen=True)
class Level:
    """What thieves at one level of access get, all attacks up to it together.

    Attributes:
        recovered: Σ G(protected) / Σ G(plain). interval: 95 %.
        gains: Σ G by side, with the protected and the plain model.
        joint: by side, the best min(value, own).
        reason: why nothing can be said; None if it can.
        left_out: attacks that failed on the protected model alone, and are counted on no side.
        unproven: which attacks that did not prove themselves are counted.
        stands_on: rows that the figure stands on: the best one of each level up to this one.
    """

    level: int
    floors: tuple[Floor, ...]
    recovered: float
    interval: tuple[float, float]
    gains: Mapping[str, float]
    joint: Mapping[Side, Chosen]
    reason: str | None = None
    left_out: tuple[str, ...] = ()
    stands_on: tuple[int, ...] = ()
    unproven: Unproven = "all"

    @property
    def notes(self) -> list[str]:
        """What else is to be known of the figures, in words."""
        said = []
        if self.left_out:
            names = ", ".join(self.left_out)
            said.append(f"not counted on any side, for they failed on the protected model: {names}")
        if self.unproven != "all":
            which = "" if self.unproven == "none" else " and get less from the protected model"
            said.append(
                f"not counted on any side: attacks that did not prove themselves{which}, with which less would be "
                "recovered"
            )
        return said

    @property
    def protection(self) -> float:
        """1 − recovered."""
        return 1.0 - self.recovered

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; figures that cannot be had are null."""

        def number(value: float) -> float | None:
            return float(value) if np.isfinite(value) else None

        return {
            "level": self.level,
            "name": LEVELS[self.level],
            "recovered": number(self.recovered),
            "interval": [number(limit) for limit in self.interval],
            "protection": number(self.protection),
            "gains": {side: number(gain) for side, gain in self.gains.items()},
            "floors": [
                {
                    "asked": floor.asked,
                    "floor": floor.floor,
                    **{side: floor.chosen[side].as_dict() for side in SIDES},
                    "gain": {side: number(floor.gain(side)) for side in ("protected", "plain")},
                }
                for floor in self.floors
            ],
            "joint": {
                side: {**chosen.as_dict(), "joint": min(chosen.value, chosen.own)}
                for side, chosen in self.joint.items()
            },
            "reliable": self.reason is None,
            "reason": self.reason,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class _Candidate:
    row: int
    point: Point
    value: float
    own: float


def judge(
    rows: Sequence[Row], reference: Reference, level: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> Level:
    """What thieves at a level of access get.

    An attack that did not prove itself is no evidence: where it works on the unprotected model alone, that is no
    protection, and where it works on the protected one, a thief has what it gives. So all of them are counted, none, or
    those that get as much from the protected model as from the other, whichever shows least protection.

    Args:
        rows: of the whole audit; those of higher levels are left out.
        reference: what values are relative to.
        level: of access.
        seed, resamples: of the bootstrap.
    """
    found = _judged(rows, reference, level, seed, resamples, "all")
    if not any(
        row.points for number, row in enumerate(rows) if row.level <= level and row.state == "unreliable"
    ):
        return found
    proven = _judged(rows, reference, level, seed, resamples, "none")
    if proven.reason is not None or found.reason is not None:
        return proven
    better = _judged(rows, reference, level, seed, resamples, "as good")
    return max((found, proven, better), key=lambda one: one.recovered)


def _judged(
    rows: Sequence[Row], reference: Reference, level: int, seed: int, resamples: int, unproven: Unproven
) -> Level:
    without, names = uncounted(rows, reference, level, unproven)
    pools = {side: _pool(rows, reference, level, side, without) for side in SIDES}
    floors = tuple(
        Floor(asked, floor, _chosen(pools, reference, floor))
        for asked, floor in zip(FLOORS, reference.floors, strict=True)
    )
    joint = _chosen(pools, reference, None)
    gains = {side: sum(floor.gain(side) for floor in floors) for side in ("protected", "plain")}
    reason = None
    if names and not pools["plain"]:
        reason = f"every attack that works on the unprotected model failed on the protected one: {', '.join(names)}"
    elif not pools["plain"] and not pools["without"]:
        reason = "no merge of these models could be made"
    elif gains["plain"] < LEAST:
        reason = (
            f"merges of the unprotected model give no more than merges without it (Σ G {gains['plain']:.2f}): "
            "there is nothing that could be recovered"
        )
    if reason is not None:
        nothing = (np.nan, np.nan)
        return Level(level, floors, np.nan, nothing, gains, joint, reason, names, unproven=unproven)
    locked, plain = _bootstrap(pools, reference, seed, resamples)
    edge = 100 * (1 - COVERAGE) / 2
    least = float(np.percentile(plain, edge, method="lower")) if len(plain) else 0.0
    if least <= ROUNDING:
        shown = round(least, 2) + 0.0  # no minus before a zero
        reason = (
            f"what merges of the unprotected model give beyond merges without it (Σ G {gains['plain']:.2f}, 95 % "
            f"interval from {shown:.2f}) cannot be told from nothing: more examples may tell"
        )
        nothing = (np.nan, np.nan)
        return Level(level, floors, np.nan, nothing, gains, joint, reason, names, unproven=unproven)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where the unprotected model gives nothing and the protected one something, all is recovered and more.
        drawn = np.where(plain > 0, locked / plain, np.where(locked > 0, np.inf, np.nan))
    low, high = np.nanpercentile(drawn, [edge, 100 - edge])
    recovered = gains["protected"] / gains["plain"]
    interval = float(low), float(high)
    return Level(level, floors, recovered, interval, gains, joint, None, names, unproven=unproven)


def _pool(
    rows: Sequence[Row], reference: Reference, level: int, side: Side, without: Collection[int] = ()
) -> list[_Candidate]:
    """Everything to choose from on a side, but for the rows at the places `without`."""
    found = []
    for number, row in enumerate(rows):
        if row.side == side and row.level <= level and number not in without:
            for point in row.points:
                found.append(_Candidate(number, point, *reference.pair("validation", point.validation)))
    return found


def _chosen(
    pools: Mapping[Side, Sequence[_Candidate]], reference: Reference, floor: float | None
) -> dict[Side, Chosen]:
    """What thieves on each side take of what they have.

    Whoever has a model may leave it alone: nobody gets less with it than without. So what is worse than the
    thief's own choice is not taken, also where that is nothing at all.
    """
    own = pools["without"]
    alone = _choose(own, reference, floor)
    least = 0.0 if alone.point is None else -np.inf
    return {
        side: alone if side == "without" else _choose([*pool, *own], reference, floor, least)
        for side, pool in pools.items()
    }


def _choose(
    pool: Iterable[_Candidate], reference: Reference, floor: float | None, least: float = -np.inf
) -> Chosen:
    """The best candidate on validation examples, measured on test examples; joint where there is no floor.

    What is not above `least` is not taken. Of merges that are as good, the one that gives more of the rest.
    """
    best: _Candidate | None = None
    # The base has values of 0 and is within reach of everybody.
    most = (0.0 if floor is None or floor <= 0 else least, np.inf)
    for candidate in pool:
        if floor is not None and candidate.own < floor:
            continue
        worth = candidate.value if floor is not None else min(candidate.value, candidate.own)
        if (worth, candidate.value + candidate.own) > most:
            best, most = candidate, (worth, candidate.value + candidate.own)
    if best is None:
        return Chosen(None, None, 0.0, 0.0)
    value, own = reference.pair("test", best.point.test)
    return Chosen(best.row, best.point, value, own)


def _bootstrap(
    pools: Mapping[Side, Sequence[_Candidate]], reference: Reference, seed: int, resamples: int
) -> tuple[Floats, Floats]:
    """Σ G of the protected and of the unprotected model for examples drawn anew, [resamples] each.

    Thieves choose anew as well, on what they drew.
    """
    shares = {
        half: {task: shares_of(len(reference.base[half][task]), seed, resamples) for task in reference.tasks}
        for half in ("validation", "test")
    }

    def values(half: str, task: str, scores: Sequence[Floats]) -> Floats:
        """[candidates, resamples]; scores are one array of examples a candidate."""
        start, end = (side[half][task] @ shares[half][task] for side in (reference.base, reference.plain))
        found = (np.stack(scores) @ shares[half][task] - start) / (end - start)
        # A product's last bits depend on where in it a candidate stands: equal ones must be equal to choose among them.
        return np.round(found, DIGITS)

    known: dict[Side, tuple[Floats, Floats, Floats]] = {}
    alone = np.full(resamples, reference.alone)
    with np.errstate(divide="ignore", invalid="ignore"):
        for side, pool in pools.items():
            if pool:
                points = [candidate.point for candidate in pool]
                valued, *own = (
                    values("validation", task, [one.validation[task] for one in points])
                    for task in reference.tasks
                )
                task = reference.protected
                tested = values("test", task, [one.test[task] for one in points])
                known[side] = valued, np.min(own, axis=0), tested
        if reference.itself:
            each = [values("validation", task, [reference.itself[task]])[0] for task in reference.own]
            alone = np.min(each, axis=0)
        sums: dict[Side, Floats] = {"protected": np.zeros(resamples), "plain": np.zeros(resamples)}
        for asked in FLOORS:
            floor = np.maximum(asked, alone + MARGIN)
            rest, got = drawn([known[s] for s in ("without",) if s in known], floor, None)
            for side in sums:
                held = [known[s] for s in (side, "without") if s in known]
                sums[side] += drawn(held, floor, got)[0] - rest
    # Examples may be drawn on which base and fine-tune are the same: they say nothing.
    known_all = np.isfinite(sums["protected"]) & np.isfinite(sums["plain"])
    return sums["protected"][known_all], sums["plain"][known_all]


def curve(
    rows: Sequence[Row], reference: Reference, side: Side, *, unproven: Unproven = "all"
) -> list[tuple[float, float]]:
    """What a thief gets for what he spends: (forward passes, mean G over the floors), test examples.

    At each cost the union of all attacks that cost no more, as `judge` chooses; `unproven` as of a level.
    """
    levels = max(LEVELS)
    taken_out, _ = uncounted(rows, reference, levels, unproven)
    rows = [row for number, row in enumerate(rows) if number not in taken_out]
    prices = sorted({row.cost.forwards for row in rows if row.points and row.side in (side, "without")})
    found: list[tuple[float, float]] = []
    for price in prices:
        within = [row for row in rows if row.cost.forwards <= price]
        sides: tuple[Side, ...] = (side, "without")
        pools = {one: _pool(within, reference, levels, one) for one in sides}
        total = 0.0
        for floor in reference.floors:
            chosen = _chosen(pools, reference, floor)
            total += chosen[side].value - chosen["without"].value
        if not found or total / len(FLOORS) != found[-1][1]:
            found.append((price, total / len(FLOORS)))
    return found
