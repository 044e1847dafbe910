"""Scores of an audit: values, choices on validation examples, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit_cases import OWN, PROTECTED, SIZES, TASKS, reference, row, scores
from score_cases import ALONE, POINTS, ROWS, few, look, validation
from unmergeable.audit.rows import SIDES, Cost, Point, Row, Side
from unmergeable.audit.scores import (
    FLOORS,
    LEAST,
    MARGIN,
    Level,
    Reference,
    curve,
    judge,
)
from unmergeable.audit.separation import check_halves, check_separation, separation
from unmergeable.errors import InputError


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
    if level.reason is not None:  # thieves without the model have as much, or may have
        assert "nothing that could be recovered" in level.reason or "cannot be told from" in level.reason
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


def test_nothing_is_said_where_the_gain_of_the_unprotected_model_is_noise() -> None:
    """One example in 75 more than without it, on each floor: a locked model that gives nothing proves nothing."""
    random = np.random.default_rng(3)

    def right(part: float) -> np.ndarray:
        return random.permutation(np.arange(75) < round(75 * part)).astype(float)

    def of(parts: tuple[float, float]) -> dict[str, np.ndarray]:
        return dict(zip(("p", "o"), map(right, parts), strict=True))

    base, plain = (
        {half: of((part, part)) for half in ("screen", "validation", "test")} for part in (0.4, 0.9)
    )
    known = Reference("p", ("o",), base, plain, alone=0.0)
    for best, reason in ((0.413, "cannot be told from nothing"), (0.6, None)):
        rows = [
            replace(row("full_dose", side), points=(Point({}, of((valid, 0.9)), of((test, 0.9))),))
            for side, valid, test in (
                ("plain", best, best),
                ("protected", 0.2, 0.2),
                ("without", 0.37, 0.387),
            )
        ]
        level = judge(rows, known, 0)
        assert level.gains["plain"] > LEAST
        assert reason is None or reason in str(level.reason)
        assert (level.reason is None) == (reason is None)
        assert np.isnan(level.recovered) == (reason is not None)


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
    with pytest.raises(InputError, match=r"^second, third: .*standard errors.*; .*standard errors"):
        check_separation({"second": apart, "first": clear, "third": apart})


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


def test_all_tasks_and_halves_without_a_gain_are_named() -> None:
    known = reference()
    with pytest.raises(InputError, match="on the validation and the test half") as caught:
        check_halves(replace(known, plain=known.base))
    assert str(caught.value).startswith(f"{', '.join(known.tasks)}: ")


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
