"""Doubts of the audit about itself: attacks that fail on known cases, levels that cannot be judged, requirements."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from audit_cases import point, reference, row
from unmergeable.audit.control import WORKS, controlled, doubt, full_dose_grid, grounds, required
from unmergeable.audit.jobs import PROOF, Job
from unmergeable.audit.results import ground, row_document, verdict
from unmergeable.audit.rows import SIDES, Look, Row
from unmergeable.audit.scores import judge

GOOD = (0.6, 0.5)


def proof(name: str = "anchor-coupled", state: Any = "done", reason: str | None = None) -> Row:
    return row(PROOF, "plain", prepared=name, state=state, reason=reason)


def states(*rows: Row) -> list[str]:
    return [one.state for one in controlled(list(rows), reference())]


# --- attacks that are not believed ---------------------------------------------------------------------------


def test_an_attack_that_works_on_the_unprotected_model_is_believed() -> None:
    rows = [row("ties", side, GOOD if side == "plain" else (-0.3, 0.1)) for side in SIDES]
    assert controlled(rows, reference()) == rows


@pytest.mark.parametrize(("value", "own"), [(-0.5, 0.9), (0.9, 0.05), (0.04, 0.04)])
def test_an_attack_that_fails_without_protection_says_nothing(value: float, own: float) -> None:
    good = row("full_dose", "plain", GOOD)
    rows = [
        good,
        row("ties", "plain", (value, own)),
        row("ties", "protected", (0, 0)),
        row("ties", "without", (0, 0)),
    ]
    found = controlled(rows, reference())
    assert [one.state for one in found] == ["done", "unreliable", "unreliable", "done"]
    reached = min(value, own)
    assert found[2].reason == (
        f"merges of the unprotected model reach {reached:.2f} of both tasks, where {WORKS:.2f} shows that the "
        "attack works at all"
    )
    assert found[2].points == rows[2].points  # what it found stands


def test_an_attack_without_a_control_says_nothing() -> None:
    good = row("full_dose", "plain", GOOD)
    for control in ([], [row("ties", "plain", state="failed", reason="out of memory")]):
        found = controlled([good, *control, row("ties", "protected", (0, 0))], reference())
        assert found[-1].state == "unreliable"
        assert "reach nothing of both tasks" in str(found[-1].reason)


def test_where_all_merges_are_weak_less_is_asked() -> None:
    rows = [
        row("full_dose", "plain", (0.08, 0.08)),
        row("ties", "plain", (0.05, 0.06)),
        row("sce", "plain", (0.01, 0.03)),
    ]
    assert states(*rows) == ["done", "done", "unreliable"]


def test_a_control_may_be_a_merge_after_a_preparation() -> None:
    rows = [
        row("ties", "plain", (-0.5, 0.1)),
        row("ties", "plain", GOOD, prepared="noise"),
        row("ties", "protected", (0, 0)),
    ]
    assert states(*rows) == ["done"] * 3


@pytest.mark.parametrize("state", ["refused", "failed"])
def test_what_did_not_run_stays_as_it_is(state: Any) -> None:
    rows = [row("full_dose", "plain", GOOD), row("wide", "protected", state=state, reason="because")]
    assert controlled(rows, reference()) == rows


def test_what_is_no_merge_keeps_its_reason() -> None:
    rows = [row("ties", "protected", (0, 0), state="unreliable", reason="not a merge: copied")]
    assert controlled(rows, reference()) == rows


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ([proof()], None),
        ([proof(state="unreliable", reason="0.93 of the distance is left")], "0.93 of the distance is left"),
        ([proof(state="failed", reason="out of memory")], "out of memory"),
        (
            [proof(state="refused", reason="nothing to act on")],
            None,
        ),  # no model of the class can be locked so
        ([], "its known case was not run"),
        ([proof("align-permutation")], "its known case was not run"),
    ],
)
def test_a_preparation_must_solve_its_known_case(known: list[Row], reason: str | None) -> None:
    rows = [row("ties", "plain", GOOD), *known, row("ties", "protected", (0, 0), prepared="anchor-coupled")]
    found = controlled(rows, reference())[-1]
    assert found.state == ("done" if reason is None else "unreliable")
    assert found.reason == (None if reason is None else f"anchor-coupled: {reason}")
    # The merge alone is not blamed for it.
    assert controlled(rows, reference())[0].state == "done"


def test_every_preparation_of_a_chain_must() -> None:
    chain = row("ties", "protected", (0, 0), prepared="anchor-coupled")
    rows = [row("ties", "plain", GOOD), proof(), replace(chain, chain=("noise", *chain.chain))]
    assert controlled(rows, reference())[-1].state == "done"
    found = controlled([rows[0], rows[2]], reference())[-1]
    assert found.reason == "anchor-coupled: its known case was not run"


def test_preparations_without_a_known_case_need_none() -> None:
    assert (
        states(row("ties", "plain", GOOD), row("ties", "protected", (0, 0), prepared="noise")) == ["done"] * 2
    )


# --- levels that cannot be judged ----------------------------------------------------------------------------

FULL = row("full_dose", "protected", (0, 0))
COUPLED = row("probe", "protected", (0, 0), prepared="anchor-coupled")


def test_a_level_stands_on_its_attack_and_on_the_levels_below() -> None:
    assert doubt([FULL], 0, None) is None
    assert doubt([FULL, COUPLED], 1, None) is None
    data = row("regmean", "protected", (0, 0))
    assert doubt([FULL, COUPLED, data], 2, None) is None
    assert doubt([FULL, COUPLED, data, row("untrap", "protected", (0, 0))], 3, None) is None


def test_a_level_whose_attacks_were_nearly_all_refused_says_nothing() -> None:
    done = row("untrap", "protected", (0, 0))
    refused = [
        row(name, "protected", state="refused", reason="no examples") for name in ("repair-4", "repair-16")
    ]
    data = row("coefficients-row-entropy", "protected", (0, 0))
    rows = [FULL, COUPLED, data, done, *refused]
    found = doubt(rows, 3, None)
    assert found == "of level 3, 2 of 3 attacks were refused, repair-4 for one: no examples"
    assert doubt(rows, 2, None) is None
    assert doubt(rows, 3, ["untrap", "repair-4", "repair-16"]) is None  # what was named was tried
    # A merge that is refused after one preparation, and not after another, was tried.
    assert doubt([*rows, row("repair-4", "protected", (0, 0), prepared="noise")], 3, None) is None


@pytest.mark.parametrize(
    ("rows", "level", "said"),
    [
        ([], 0, "full_dose was not run, and level 0 stands on it"),
        ([row("full_dose", "plain", GOOD)], 0, "full_dose was not run"),
        ([row("full_dose", "without", GOOD)], 0, "full_dose was not run"),
        ([row("ties", "protected", (0, 0))], 0, "full_dose was not run"),
        ([row("full_dose", "protected", (0, 0), prepared="noise")], 0, "full_dose was not run"),
        ([replace(FULL, state="unreliable", reason="weak")], 0, "full_dose is unreliable, and level 0 .*: weak"),
        ([replace(FULL, state="failed", reason="NaN")], 1, "full_dose is failed, and level 0 .*: NaN"),
        ([FULL], 1, "anchor-coupled was not run, and level 1 stands on it"),
        ([FULL, row("wide", "protected", (0, 0))], 1, "anchor-coupled was not run"),
        ([FULL, proof()], 1, "anchor-coupled was not run"),
        ([FULL, replace(COUPLED, state="refused", reason="no spec")], 1, "anchor-coupled is refused, .*: no spec"),
        ([FULL, COUPLED], 2, "an attack of its own was not run, and level 2 stands on it"),
        (
            [FULL, COUPLED, row("regmean", "protected", state="refused", reason="give it train:")], 2,
            "every attack at level 2 is refused, and level 2 stands on it: give it train:",
        ),
        ([FULL, COUPLED, row("regmean", "protected", (0, 0))], 3, "an attack of its own was not run, and level 3"),
    ],
)  # fmt: skip
def test_a_level_without_its_attack_is_not_judged(rows: list[Row], level: int, said: str) -> None:
    found = doubt(rows, level, None)
    assert found is not None
    assert re.match(said, found)


@pytest.mark.parametrize(
    ("rows", "level", "only", "said"),
    [
        ([row("ties", "protected", (0, 0))], 0, ["ties"], None),
        ([row("wide", "protected", (0, 0))], 1, ["wide"], None),
        ([row("ties", "protected", (0, 0))], 1, ["ties"], "an attack of its own was not run, and level 1 stands"),
        ([], 0, ["ties"], "an attack of its own was not run"),
        ([row("ties", "protected", state="failed", reason="NaN")], 0, ["ties"], "every attack at level 0 is failed"),
        # An attack that was named is waited for, although another one was found.
        ([row("ties", "protected", (0, 0))], 0, ["ties", "full_dose"], "full_dose was not run"),
        ([FULL, row("wide", "protected", (0, 0))], 1, ["full_dose", "wide", "anchor-coupled"], "anchor-coupled was"),
        ([row("ties", "protected", state="failed", reason="NaN"), COUPLED], 1, ["ties", "anchor-coupled"], "every"),
    ],
)  # fmt: skip
def test_a_part_of_the_suite_stands_on_what_was_named(
    rows: list[Row], level: int, only: list[str], said: str | None
) -> None:
    found = doubt(rows, level, only)
    assert found is None if said is None else str(found).startswith(said)


# --- what figures stand on -----------------------------------------------------------------------------------


def test_a_figure_stands_on_the_best_of_each_level() -> None:
    better, data = row("anchor", "protected", (0.3, 0.3)), row("fisher", "protected", (0.2, 0.2))
    rows = [
        row("ties", "protected", (0.4, 0.4)),  # better than the one that the level stands on
        FULL,
        row("full_dose", "plain", GOOD),
        COUPLED,
        row("full_dose", "protected", (0.1, 0.1), prepared="anchor-coupled"),
        replace(better, state="unreliable", reason="weak"),
        row("regmean", "protected", (0.1, 0.9)),
        data,
        row("untrap", "protected", state="failed", reason="NaN"),
        proof(),
    ]
    assert grounds(rows, reference(), 0) == (1,)
    assert grounds(rows, reference(), 1) == (1, 4)
    assert grounds(rows, reference(), 2) == grounds(rows, reference(), 3) == (1, 4, 7)
    # Where the main attack was not asked for, the best of all.
    assert grounds([rows[0], data], reference(), 2) == (0, 1)
    assert grounds([], reference(), 3) == ()


@pytest.mark.parametrize("recovered", [True, False])
def test_verdicts_of_levels_with_data_name_an_attack_of_their_own(recovered: bool) -> None:
    rows = [
        row("full_dose", "plain", GOOD),
        row("full_dose", "protected", GOOD if recovered else (-0.1, 0.4)),
        row("regmean", "protected", (0.2, 0.3) if recovered else (-0.2, -0.3)),
    ]
    found = replace(judge(rows, reference(), 2, resamples=50), stands_on=grounds(rows, reference(), 2))
    documents = [row_document(number, one, reference()) for number, one in enumerate(rows)]
    said = verdict(found, documents)
    own = (
        "20 % of the task with 30 % of his own." if recovered else "-20 % of the task with -30 % of his own."
    )
    assert said.endswith(f" Best of its own attacks: regmean, {own}")
    assert ("Best: full_dose, " in said) == recovered
    assert [ground(documents[number]) for number in found.stands_on] == [
        {"level": 0, "row": 1, "attack": "full_dose"}, {"level": 2, "row": 2, "attack": "regmean"}
    ]  # fmt: skip
    # One that is the best of all is not named twice, and levels without data have one attack that they stand on.
    best = [rows[0], row("regmean", "protected", GOOD)]
    found = replace(judge(best, reference(), 2, resamples=50), stands_on=grounds(best, reference(), 2))
    assert (
        verdict(found, [row_document(n, one, reference()) for n, one in enumerate(best)]).count("regmean")
        == 1
    )
    below = replace(judge(rows, reference(), 0, resamples=50), stands_on=grounds(rows, reference(), 0))
    assert "its own attacks" not in verdict(below, documents)


# --- requirements --------------------------------------------------------------------------------------------


def test_a_requirement_holds_where_the_lower_limit_reaches_it() -> None:
    rows = [row("full_dose", "plain", GOOD), row("full_dose", "protected", (0.15, 0.5))]
    rows[1] = replace(rows[1], points=(point(0.15, 0.5), point(0.15, 0.6, (0.15, 0.6))))
    level = judge(rows, reference(), 0, resamples=50)
    limit = 1 - level.interval[1]
    assert required([level], 0, limit).holds
    assert required([level], 0, limit - 0.01).found == pytest.approx(limit)
    assert not required([level], 0, limit + 1e-6).holds
    # An attack that was not tried on the protected model might take it; one of a higher level, or on a control, not.
    for job, holds in (
        (Job("ties", "protected"), False),
        (Job("ties", "plain"), True),
        (Job("wide", "protected"), True),
    ):
        assert required([level], 0, limit, [job]).holds == holds
    assert not required(
        [replace(level, left_out=("ties",))], 0, limit
    ).holds  # it failed on the protected model
    unjudged = required([replace(level, reason="because")], 0, 0.0)
    assert unjudged.found is None
    assert not unjudged.holds


# --- the grid ------------------------------------------------------------------------------------------------


def grid(side: Any, places: dict[tuple[float, float], float]) -> Row:
    looks = [Look({"dose": a, "others": b}, value, value + 1) for (a, b), value in places.items()]
    return replace(row("full_dose", side, GOOD), looks=tuple(looks))


def test_the_full_dose_grid_is_a_table_of_both_sides() -> None:
    protected = grid("protected", {(1.0, 0.1): 0.3, (0.5, 0.1): 0.1, (0.5, 0.2): 0.2})
    plain = grid(
        "plain", {(0.5, 0.1): 0.5, (0.5, 0.2): 0.6, (1.0, 0.1): 0.7, (1.0, 0.2): 0.8, (1.0, 0.4): 0.9}
    )
    assert full_dose_grid([plain, protected]) == {
        "attack": "full_dose", "x": "others", "y": "dose", "xs": [0.1, 0.2, 0.4], "ys": [0.5, 1.0],
        "protected": [[0.1, 0.2, None], [0.3, None, None]], "plain": [[0.5, 0.6, None], [0.7, 0.8, 0.9]],
    }  # fmt: skip


def test_there_is_no_grid_of_one_side() -> None:
    assert full_dose_grid([]) is None
    assert full_dose_grid([grid("plain", {(0.5, 0.1): 0.5})]) is None
    assert full_dose_grid([grid("plain", {(0.5, 0.1): 0.5}), grid("protected", {})]) is None
    prepared = replace(grid("protected", {(0.5, 0.1): np.pi}), chain=("noise", "full_dose"))
    assert full_dose_grid([grid("plain", {(0.5, 0.1): 0.5}), prepared]) is None
