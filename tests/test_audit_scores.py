"""Scores of an audit: values, choices on validation examples, the bootstrap on test examples, and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from audit_cases import OWN, PROTECTED, SIZES, TASKS, point, reference, row, scores
from unmergeable.audit.rows import SIDES, Cost, Point, Row, Side
from unmergeable.audit.scores import (
    FLOORS,
    LEAST,
    MARGIN,
    Level,
    Reference,
    check_halves,
    check_separation,
    curve,
    judge,
    resample,
    separation,
)
from unmergeable.errors import InputError

VALUES = st.floats(-0.8, 1.2).map(lambda value: round(value, 3))
PAIRS = st.tuples(VALUES, VALUES)
POINTS = st.builds(point, VALUES, VALUES, PAIRS)
ROWS = st.lists(
    st.builds(
        lambda name, side, points, price: replace(
            row(name, side), points=tuple(points), cost=Cost(forwards=float(price))
        ),
        st.sampled_from(("full_dose", "ties", "wide", "regmean", "untrap")),
        st.sampled_from(SIDES),
        st.lists(POINTS, max_size=3),
        st.integers(0, 5),
    ),
    max_size=8,
)
ALONE = st.one_of(st.just(-np.inf), st.floats(-0.5, 0.5))
few = settings(max_examples=60, deadline=None)


def look(rows: Sequence[Row], known: Reference, level: int = 3, seed: int = 0) -> Level:
    return judge(rows, known, level, seed=seed, resamples=50)


def validation(known: Reference, chosen: Point | None) -> tuple[float, float]:
    """What a thief believes to get: values on the examples that he chooses on."""
    return (0.0, 0.0) if chosen is None else known.pair("validation", chosen.validation)


def gain(known: Reference, level: Level, side: Side) -> float:
    """Σ G on validation examples."""
    return sum(
        validation(known, floor.chosen[side].point)[0] - validation(known, floor.chosen["without"].point)[0]
        for floor in level.floors
    )


# --- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", SIZES)
@pytest.mark.parametrize("task", TASKS)
def test_the_base_is_0_and_the_fine_tune_is_1(half: str, task: str) -> None:
    random = np.random.default_rng(5)
    plain = {h: {t: random.random(n) + 1 for t in TASKS} for h, n in SIZES.items()}
    base = {h: {t: random.random(n) for t in TASKS} for h, n in SIZES.items()}
    plain["screen"] = {t: plain["validation"][t][: SIZES["screen"]] for t in TASKS}
    base["screen"] = {t: base["validation"][t][: SIZES["screen"]] for t in TASKS}
    known = Reference(PROTECTED, OWN, base, plain)
    assert known.value(half, task, base[half][task]) == pytest.approx(0, abs=1e-12)
    # On the first look it is a guess at what all validation examples would say.
    near = 0.3 if half == "screen" else 1e-12
    assert known.value(half, task, plain[half][task]) == pytest.approx(1, abs=near)


def test_a_first_look_on_which_the_fine_tune_loses_is_not_upside_down() -> None:
    known = reference()
    screen = {task: known.base["screen"][task] - 0.05 for task in TASKS}
    unlucky = replace(known, plain={**known.plain, "screen": screen})
    values = [unlucky.pair("screen", scores("screen", dict.fromkeys(TASKS, v))) for v in (-1, 0, 0.5, 1)]
    assert values == sorted(values)
    assert values[2] == pytest.approx((0.5, 0.5))


def test_own_is_the_worst_of_the_thief_s_tasks() -> None:
    known = reference()
    assert known.pair("test", scores("test", {PROTECTED: 0.3, "a": 0.9, "b": -0.2})) == pytest.approx(
        (0.3, -0.2)
    )


@given(alone=ALONE)
@few
def test_floors_lie_above_what_the_fine_tune_has_by_itself(alone: float) -> None:
    floors = reference(alone).floors
    assert floors == tuple(max(q, alone + MARGIN) for q in FLOORS)
    assert list(floors) == sorted(floors)


# --- choices -------------------------------------------------------------------------------------------------


@given(rows=ROWS, alone=ALONE)
@few
def test_all_of_the_unprotected_model_is_all(rows: list[Row], alone: float) -> None:
    known = reference(alone)
    rows = [row("ties", "plain", (1.1, 1.0)), *(one for one in rows if one.side != "protected")]
    copied = [*rows, *(replace(one, side="protected") for one in rows if one.side == "plain")]
    level = look(copied, known)
    assert level.reason is None or "nothing that could be recovered" in level.reason
    if level.reason is not None:  # thieves without the model have as much
        return
    assert level.recovered == pytest.approx(1)
    assert level.interval == pytest.approx((1, 1))
    assert level.protection == pytest.approx(0)


@given(rows=ROWS, alone=ALONE)
@few
def test_no_more_than_without_the_model_is_nothing(rows: list[Row], alone: float) -> None:
    known = reference(alone)
    rows = [one for one in rows if one.side != "protected"]
    copied = [*rows, *(replace(one, side="protected") for one in rows if one.side == "without")]
    for protected in (copied, rows):
        level = look(protected, known)
        assert level.gains["protected"] == 0
        if level.reason is None:
            assert (level.recovered, level.interval) == (0, (0, 0))


@given(rows=ROWS, more=POINTS, side=st.sampled_from(("protected", "plain")), alone=ALONE)
@few
def test_another_merge_never_harms_a_thief(rows: list[Row], more: Point, side: Side, alone: float) -> None:
    known = reference(alone)
    before = look(rows, known)
    after = look([*rows, replace(row("full_dose", side), points=(more,))], known)
    assert gain(known, after, side) >= gain(known, before, side) - 1e-12
    other: Side = "plain" if side == "protected" else "protected"
    assert gain(known, after, other) == gain(known, before, other)


@given(rows=ROWS, alone=ALONE)
@few
def test_nobody_gets_less_with_the_model_than_without(rows: list[Row], alone: float) -> None:
    known = reference(alone)
    level = look(rows, known)
    for floor in level.floors:
        without = validation(known, floor.chosen["without"].point)[0]
        for side in ("protected", "plain"):
            assert validation(known, floor.chosen[side].point)[0] >= without
    for chosen in level.joint.values():
        assert min(validation(known, chosen.point)) >= 0


def test_a_merge_that_costs_the_protected_task_is_not_taken_where_nobody_else_reaches_the_floor() -> None:
    known = reference()
    rows = [row("full_dose", "plain", (0.6, 0.8)), row("full_dose", "protected", (0.3, 0.3), (-0.7, 0.8))]
    level = look(rows, known)
    assert [floor.gain("protected") for floor in level.floors] == pytest.approx([0.3, 0.3, 0, 0])
    assert level.recovered == pytest.approx(0.25)


@given(rows=ROWS, alone=ALONE, top=st.integers(0, 3))
@few
def test_what_is_chosen_keeps_the_floor_and_is_the_best_that_does(
    rows: list[Row], alone: float, top: int
) -> None:
    known = reference(alone)
    for floor in look(rows, known, top).floors:
        for side in SIDES:
            reach = [
                validation(known, one)
                for each in rows
                if each.level <= top and each.side in (side, "without")
                for one in each.points
            ]
            best = max((value for value, own in reach if own >= floor.floor), default=0.0)
            chosen = floor.chosen[side]
            if chosen.point is None:
                assert chosen.row is None
                assert (chosen.value, chosen.own) == (0, 0)
                assert best <= 0 or floor.floor > 0
                continue
            value, own = validation(known, chosen.point)
            assert own >= floor.floor
            assert value == best
            assert any(chosen.point is one for one in rows[chosen.row].points)
            assert (chosen.value, chosen.own) == known.pair("test", chosen.point.test)


@given(rows=ROWS, seed=st.integers(0, 99))
@few
def test_test_examples_choose_nothing(rows: list[Row], seed: int) -> None:
    known = reference()
    random = np.random.default_rng(seed)

    def shuffled(one: Point) -> Point:
        return replace(one, test={task: random.random(SIZES["test"]) for task in TASKS})

    other = [replace(one, points=tuple(map(shuffled, one.points))) for one in rows]
    chosen = [
        [
            (floor.chosen[side].row, floor.chosen[side].point and floor.chosen[side].point.options)
            for floor in look(each, known).floors
            for side in SIDES
        ]
        for each in (rows, other)
    ]
    assert chosen[0] == chosen[1]


def test_attacks_of_higher_levels_are_not_counted() -> None:
    rows = [
        row("full_dose", "plain", (0.6, 0.8)),
        row("wide", "protected", (0.6, 0.8)),
        row("full_dose", "protected", (0.3, 0.8), prepared="noise"),
    ]
    known = reference()
    assert [look(rows, known, level).recovered for level in (0, 1, 3)] == pytest.approx([0, 1, 1])


def test_joint_is_the_best_of_the_worse_of_both() -> None:
    rows = [row("full_dose", "plain", (0.9, 0.1), (0.5, 0.4)), row("full_dose", "protected", (0.9, -0.1))]
    joint = look(rows, reference()).joint
    assert (joint["plain"].value, joint["plain"].own) == pytest.approx((0.5, 0.4))
    assert joint["protected"].point is None


def test_of_merges_that_are_as_good_a_thief_takes_the_one_with_more_of_his_own() -> None:
    pairs = [(0.5, 0.3), (0.5, 0.9), (0.5, 0.6)]
    for order in (pairs, pairs[::-1]):
        rows = [row("full_dose", "plain", (1, 1)), row("full_dose", "protected", *order)]
        level = look(rows, reference())
        assert [floor.chosen["protected"].own for floor in level.floors] == pytest.approx([0.9] * 4)
        assert level.joint["protected"].own == pytest.approx(0.9)


# --- the bootstrap -------------------------------------------------------------------------------------------


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
    assume(len({validation(known, one) for one in flat}) == len(flat))
    other = list(rows)
    order.shuffle(other)  # type: ignore[attr-defined]
    one, two = look(rows, known), look(other, known)
    assert one.gains == two.gains
    assert one.reason == two.reason
    assert one.interval == two.interval or one.reason is not None
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


# --- what cannot be said -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "no merge of these models could be made"),
        ([row("full_dose", "protected", (0.9, 0.9))], "no merge of these models could be made"),
        ([row("full_dose", "without", (0.5, 0.5))], "there is nothing that could be recovered"),
        ([row("full_dose", "plain", (LEAST / 8, 0.9))], "there is nothing that could be recovered"),
        ([row("full_dose", "plain", (0.9, -0.1))], "there is nothing that could be recovered"),
    ],
)
def test_nothing_is_said_where_there_is_nothing_to_recover(rows: list[Row], reason: str) -> None:
    level = look(rows, reference())
    assert level.reason is not None
    assert reason in level.reason
    assert np.isnan(level.recovered)
    document = level.as_dict()
    assert (document["recovered"], document["interval"], document["protection"]) == (None, [None, None], None)
    assert not document["reliable"]
    json.dumps(document, allow_nan=False)


@given(rows=ROWS, alone=ALONE, level=st.integers(0, 3))
@few
def test_a_level_is_json(rows: list[Row], alone: float, level: int) -> None:
    document = look(rows, reference(alone), level).as_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    for floor in document["floors"]:
        for side in ("protected", "plain"):
            assert floor["gain"][side] == floor[side]["value"] - floor["without"]["value"]


@pytest.mark.parametrize(
    ("base", "plain", "times"),
    [
        ([0.0, 1.0] * 50, [0.0, 1.0] * 50, 0),  # the same answers
        ([0.0] * 90 + [1.0] * 10, [0.0] * 88 + [1.0] * 12, 1.42),  # hardly better
        ([0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0], 1.0),  # four examples
        ([1.0, 1.0, 0.0, 1.0] * 25, [0.0, 0.0, 1.0, 0.0] * 25, 5.74),  # worse, however clearly
    ],
)
def test_tasks_that_cannot_be_told_apart_are_refused(
    base: list[float], plain: list[float], times: float
) -> None:
    apart = separation(np.array(base), np.array(plain))
    assert apart.times == pytest.approx(times, abs=0.01)
    assert not apart.enough
    clear = separation(np.zeros(100), np.array([1.0] * 60 + [0.0] * 40))
    with pytest.raises(InputError, match="second: the fine-tune does not beat its base clearly enough"):
        check_separation({"first": clear, "second": apart})


def test_tasks_that_can_be_told_apart_are_not_refused() -> None:
    half = separation(np.zeros(100), np.array([1.0] * 60 + [0.0] * 40))
    assert half.times == pytest.approx(0.6 / np.sqrt(0.24 / 99))
    always = separation(np.zeros(8), np.full(8, 0.5))
    assert always.times == np.inf
    check_separation({"half": half, "always": always})


@pytest.mark.parametrize("half", ["validation", "test"])
def test_a_fine_tune_must_beat_its_base_on_both_halves(half: str) -> None:
    known = reference()
    check_halves(known)
    unlucky = {**known.plain, half: {**known.plain[half], "b": known.base[half]["b"]}}
    with pytest.raises(InputError, match=f"^b: .* on the {half} half"):
        check_halves(replace(known, plain=unlucky))


# --- the curve -----------------------------------------------------------------------------------------------


def test_the_curve_is_what_is_had_for_each_price() -> None:
    known = reference()
    rows = [
        row("full_dose", "plain", (0.2, 0.9), cost=Cost(forwards=10)),
        row("ties", "without", (0.1, 0.9), cost=Cost(forwards=5)),
        row("untrap", "plain", (0.8, 0.3), cost=Cost(forwards=500)),
        row("regmean", "plain", (0.15, 0.9), cost=Cost(forwards=50)),  # dearer, and no better
        row("wide", "plain", state="refused"),
        row("full_dose", "protected", (0.9, 0.9), cost=Cost(forwards=1)),
    ]
    found = curve(rows, known, "plain")
    assert [price for price, _ in found] == [5, 10, 500]
    assert [share for _, share in found] == pytest.approx([0, 0.1, (2 * 0.7 + 2 * 0.1) / 4])


@given(rows=ROWS, alone=ALONE)
@few
def test_the_curve_ends_at_the_top_level(rows: list[Row], alone: float) -> None:
    known = reference(alone)
    for side in ("protected", "plain"):
        found = curve(rows, known, side)
        assert [price for price, _ in found] == sorted({price for price, _ in found})
        if any(one.points and one.side in (side, "without") for one in rows):
            assert found[-1][1] == pytest.approx(look(rows, known).gains[side] / len(FLOORS))
        else:
            assert found == []
