"""Intervals of an audit's scores: the bootstrap of both halves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from audit_cases import OWN, PROTECTED, SIZES, TASKS, point, reference, row
from score_cases import ALONE, POINTS, ROWS, few, look, validation
from unmergeable.audit import resampling
from unmergeable.audit.resampling import resample
from unmergeable.audit.rows import SIDES, Point, Row, Side
from unmergeable.audit.scores import ROUNDING, Reference, judge


@given(rows=ROWS, seed=st.integers(0, 3))
@few
def test_an_interval_can_be_had_again(rows: list[Row], seed: int) -> None:
    known = reference()
    one, two = (look(rows, known, seed=seed) for _ in range(2))
    assert one.interval == two.interval or one.reason is not None


@given(rows=ROWS, order=st.randoms(use_true_random=False))
@few
def test_the_order_of_rows_changes_nothing(rows: list[Row], order: object) -> None:
    known = reference()
    flat = [one for each in rows for one in each.points]
    assume(len({tuple(np.round(validation(known, one), 6)) for one in flat}) == len(flat))
    other = list(rows)
    order.shuffle(other)  # type: ignore[attr-defined]
    one, two = look(rows, known), look(other, known)
    assert one.gains == two.gains
    assert one.reason == two.reason
    # Sums are taken in the order of the rows: they differ by rounding.
    assert one.interval == pytest.approx(two.interval, abs=ROUNDING, nan_ok=True)
    for a, b in zip(one.floors, two.floors, strict=True):
        assert all(a.chosen[side].point is b.chosen[side].point for side in SIDES)


def mixed(known: Reference, share: float, noise: float = 0.0) -> Point:
    """A merge that is, on every example, so much of the fine-tune, and most of the thief's own."""
    parts = {task: share if task == PROTECTED else 0.9 for task in TASKS}
    halves = [
        {
            t: known.base[half][t] + part * (known.plain[half][t] - known.base[half][t])
            for t, part in parts.items()
        }
        for half in ("validation", "test")
    ]
    halves[1][PROTECTED] += noise * np.random.default_rng(1).standard_normal(SIZES["test"])
    return Point({}, *halves)


def test_the_bootstrap_is_paired() -> None:
    random = np.random.default_rng(0)
    known = reference()
    base = {half: {task: random.random(size) for task in TASKS} for half, size in SIZES.items()}
    plain = {
        half: {task: base[half][task] + 0.2 + 0.6 * random.random(size) for task in TASKS}
        for half, size in SIZES.items()
    }
    known = replace(known, base=base, plain=plain)
    rows = [
        replace(row("full_dose", "plain"), points=(mixed(known, 1.0),)),
        replace(row("full_dose", "protected"), points=(mixed(known, 0.3),)),
    ]
    level = look(rows, known)
    assert level.recovered == pytest.approx(0.3)
    assert level.interval == pytest.approx((0.3, 0.3))
    rows[1] = replace(rows[1], points=(mixed(known, 0.3, 0.3),))
    low, high = look(rows, known).interval
    assert high - low > 0.05
    # What thieves have without the model is taken off both, example by example.
    rows = [replace(row("full_dose", "without"), points=(mixed(known, 0.2),)), *rows]
    rows[2] = replace(rows[2], points=(mixed(known, 0.6),))
    assert look(rows, known).interval == pytest.approx((0.5, 0.5))


@given(points=st.lists(st.tuples(POINTS, st.sampled_from(SIDES)), min_size=1, max_size=12), alone=ALONE)
@few
def test_thieves_choose_in_the_bootstrap_as_outside_of_it(
    points: list[tuple[Point, Side]], alone: float
) -> None:
    """Of examples that are all drawn once, the same is recovered."""
    known = reference(alone)
    # But for ties, with each other, with nothing at all and with a floor, which rounding decides.
    apart: dict[float, tuple[Point, Side]] = {0.0: points[0]}
    for one in points:
        value, own = validation(known, one[0])
        if all(abs(own - floor) > 1e-6 for floor in known.floors):
            apart.setdefault(round(value, 6), one)
    points = list(apart.values())[1:]
    full = point(1.3, 1.3, (1.0, 1.0))
    rows = [replace(row("ties", side), points=(one,)) for one, side in [*points, (full, "plain")]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "resample", lambda count, seed, resamples: np.arange(count)[None])
        level = judge(rows, known, 3, resamples=1)
    if level.reason is None:
        assert level.interval == pytest.approx((level.recovered, level.recovered), abs=1e-6)


def test_an_interval_knows_that_another_choice_was_near() -> None:
    """Two merges that look alike on validation examples, of which one is worth nothing on the others."""
    known = reference()
    good, bad = mixed(known, 0.80), mixed(known, 0.80)
    noise = np.random.default_rng(2).standard_normal(SIZES["validation"])
    bad.validation[PROTECTED] += 0.3 * (noise - noise.mean()) - 0.01
    bad.test[PROTECTED] -= 0.4
    rows = [
        replace(row("full_dose", "plain"), points=(mixed(known, 1.0),)),
        replace(row("full_dose", "protected"), points=(good, bad)),
    ]
    level = look(rows, known)
    assert level.recovered == pytest.approx(0.8)
    assert level.interval[0] < 0.1
    assert level.interval[1] == pytest.approx(0.8, abs=0.05)


def test_floors_are_drawn_with_the_examples() -> None:
    """What gives little more than the fine-tune by itself stays under the floor in every draw."""
    random = np.random.default_rng(4)
    known = reference()
    base = {half: {t: random.random(size) for t in TASKS} for half, size in SIZES.items()}
    plain = {half: {t: base[half][t] + 1 for t in TASKS} for half, size in SIZES.items()}
    known = replace(known, base=base, plain=plain)
    itself = {task: base["validation"][task] + random.standard_normal(SIZES["validation"]) for task in OWN}
    near = {task: scores + 0.15 for task, scores in itself.items()} | {
        PROTECTED: plain["validation"][PROTECTED]
    }
    alone = known.pair("validation", near)[1] - 0.15
    rows = [
        replace(row("full_dose", "plain"), points=(Point({}, plain["validation"], plain["test"]),)),
        replace(row("full_dose", "protected"), points=(Point({}, near, plain["test"]),)),
    ]
    fixed, drawn = (look(rows, replace(known, alone=alone, itself=scores)) for scores in ({}, itself))
    assert fixed.recovered == drawn.recovered == 0
    assert fixed.interval[1] > 0
    assert drawn.interval == (0, 0)


def test_an_interval_covers_what_it_should() -> None:
    """Of many samples of examples, about 95 % have an interval with the truth in it."""
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        base, plain, taken = (random.random(80) < rate for rate in (0.2, 0.9, 0.48))
        known = Reference(
            PROTECTED,
            OWN,
            {half: dict.fromkeys(TASKS, 1.0 * base) for half in SIZES},
            {half: dict.fromkeys(TASKS, 1.0 * plain) for half in SIZES},
        )
        full, part = (
            Point({}, dict.fromkeys(TASKS, 1.0 * plain), dict.fromkeys(TASKS, 1.0 * one))
            for one in (plain, taken)
        )
        rows = [
            replace(row("full_dose", "plain"), points=(full,)),
            replace(row("full_dose", "protected"), points=(part,)),
        ]
        low, high = judge(rows, known, 0, resamples=200).interval
        covered += low <= 0.4 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_examples_are_drawn_anew_for_every_seed() -> None:
    assert (resample(30, 1, 4) == resample(30, 1, 4)).all()
    assert (resample(30, 1, 4) != resample(30, 2, 4)).any()
    drawn = resample(30, 0, 500)
    assert drawn.shape == (500, 30)
    assert set(drawn.flat) == set(range(30))
