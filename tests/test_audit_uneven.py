"""Attacks that failed on the protected model alone: nothing that their controls get is counted as protection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from audit_cases import reference, row
from score_cases import look
from unmergeable.audit.control import controlled, required
from unmergeable.audit.results import verdict
from unmergeable.audit.rows import Row
from unmergeable.audit.scores import curve
from unmergeable.audit.uneven import uneven


def errored(name: str, side: Any = "protected", prepared: str | None = None, state: Any = "failed") -> Row:
    return row(name, side, prepared=prepared, state=state, reason="it broke", facts={"error": "RuntimeError"})


DOSE = [row("full_dose", "plain", (0.6, 0.8)), row("full_dose", "protected", (0.3, 0.8))]
TIES = row("ties", "plain", (0.9, 0.8))


@pytest.mark.parametrize("state", ["failed", "refused"])
def test_the_control_of_an_attack_that_failed_is_not_counted(state: Any) -> None:
    known = reference()
    level = look([*DOSE, TIES, errored("ties", state=state)], known)
    assert level.recovered == pytest.approx(look(DOSE, known).recovered) == pytest.approx(0.5)
    assert level.left_out == ("ties",)
    assert level.notes == ["not counted on any side, for they failed on the protected model: ties"]
    assert level.as_dict()["notes"] == level.notes
    assert verdict(level, [{"attack": one.attack, "level": 0} for one in DOSE]).endswith(
        " Not counted on any side, for they failed on the protected model: ties."
    )
    # Places of rows are those of the whole audit.
    assert [floor.chosen["plain"].row for floor in level.floors] == [0] * 4
    assert curve([*DOSE, TIES, errored("ties")], known, "plain") == curve(DOSE, known, "plain")


def test_neither_is_what_a_thief_gets_by_it_without_the_model() -> None:
    known = reference()
    rows = [*DOSE, TIES, row("ties", "without", (0.3, 0.8))]
    assert look(rows, known).recovered == pytest.approx(0)
    assert look([*rows, errored("ties")], known).recovered == pytest.approx(0.5)


@pytest.mark.parametrize(
    "rows",
    [
        [TIES],  # not tried
        [TIES, row("ties", "protected", (0.1, 0.8))],
        [TIES, row("ties", "protected", state="failed", reason="all 9 merges", facts={"broken": 9})],
        [errored("ties", "plain"), errored("ties")],  # on both models
        [errored("ties"), row("ties", "without", (0.5, 0.8))],  # no control of the model
    ],
)
def test_everything_else_is_counted(rows: list[Row]) -> None:
    level = look([*DOSE, *rows], reference())
    assert (level.left_out, level.notes) == ((), [])
    assert uneven([*DOSE, *rows], 3) == (frozenset(), ())


def test_attacks_are_paired_by_what_is_done_to_the_model_before() -> None:
    plain = [row("ties", "plain", (0.9, 0.8)), row("ties", "plain", (0.95, 0.8), prepared="noise")]
    raw = row("ties", "protected", (0.2, 0.8))
    found = uneven([*plain, raw, errored("ties", prepared="noise")], 1)
    assert found == (frozenset({1}), ("noise > ties",))
    # At a level below it was not tried: nor was its control.
    assert uneven([*plain, raw, errored("ties", prepared="noise")], 0) == (frozenset(), ())


def test_a_merge_that_never_came_through_has_all_rows_as_its_controls() -> None:
    """Each side has preparations of its own: that of the protected model is an alignment, the plain one needs none."""
    rows = [
        row("regmean", "plain", (0.9, 0.8)),
        row("regmean", "without", (0.2, 0.8)),
        errored("regmean", prepared="anchor-coupled"),
    ]
    assert uneven(rows, 2) == (frozenset({0, 1}), ("regmean",))
    # Nor does it count where it came through on the model as it is, which a lock breaks.
    assert uneven([*rows, row("regmean", "protected", (0, 0))], 2) == (frozenset({0, 1}), ("regmean",))


def test_aligned_merges_that_failed_are_no_protection() -> None:
    """They alone might have undone the lock."""
    raw = [
        row(name, side, (0.6 * (side == "plain"), 0.8))
        for name in ("ties", "full_dose")
        for side in ("plain", "protected")
    ]
    aligned = [errored(name, prepared="anchor-coupled") for name in ("ties", "full_dose")]
    level = look([*raw, *aligned], reference(), 1)
    assert np.isnan(level.recovered)
    assert level.reason is not None
    assert not required([level], 1, 0.9).holds
    # Where one of them came through, it is that one that is compared.
    level = look(
        [*raw, aligned[0], row("full_dose", "protected", (0.57, 0.8), prepared="anchor-coupled")],
        reference(),
        1,
    )
    assert level.recovered == pytest.approx(0.95)
    assert level.left_out == ("ties",)


def test_an_attack_that_did_not_prove_itself_hides_no_other() -> None:
    """One works on the protected model, another on the unprotected one alone: neither is protection."""
    known = reference()
    rows = [
        *DOSE,
        replace(row("full_dose", "protected", (0.5, 0.8), prepared="align-procrustes"), state="unreliable"),
        replace(row("slerp", "plain", (3.0, 0.8)), state="unreliable"),
        replace(row("slerp", "protected", (0.0, 0.8)), state="unreliable"),
    ]
    found = look(rows, known, 1)
    assert found.unproven == "as good"
    assert found.recovered == pytest.approx(0.5 / 0.6)
    assert found.notes == [
        "not counted on any side: attacks that did not prove themselves and get less from the protected model, with "
        "which less would be recovered"
    ]


def test_a_level_of_which_nothing_is_left_is_not_judged() -> None:
    rows = [
        TIES,
        errored("ties"),
        row("ties", "without", (0.1, 0.8)),
        row("full_dose", "protected", (0.3, 0.8)),
    ]
    level = look(rows, reference())
    assert (
        level.reason == "every attack that works on the unprotected model failed on the protected one: ties"
    )
    assert np.isnan(level.recovered)
    assert "not judged. Every attack that works" in verdict(level, [])


def test_neither_is_the_control_of_an_attack_that_did_not_prove_itself() -> None:
    """It reaches much of the protected task and hardly any of the other: a failure of it says nothing of a lock."""
    known = reference()
    weak = [row("slerp", "plain", (0.9, 0.05)), row("slerp", "protected", (0.0, 0.05))]
    rows = controlled([*DOSE, *weak], known)
    assert [one.state for one in rows] == ["done", "done", "unreliable", "unreliable"]
    assert look([*DOSE, *weak], known).recovered < 0.5
    found = look(rows, known)
    assert found.unproven == "none"
    assert found.recovered == pytest.approx(look(DOSE, known).recovered) == pytest.approx(0.5)
    assert found.notes == [
        "not counted on any side: attacks that did not prove themselves, with which less would be recovered"
    ]
    assert curve(rows, known, "plain", unproven="none") == curve(DOSE, known, "plain")
    # What it gets from the protected model is no less in a thief's hands, and then counts on both sides.
    lucky = replace(rows[3], points=row("slerp", "protected", (0.9, 0.8)).points)
    level = look([*rows[:3], lucky], known)
    assert level.unproven == "all"
    assert level.recovered > 1.0
    # As good on both sides, it is no gain either.
    even = replace(rows[3], points=rows[2].points)
    full = [DOSE[0], replace(DOSE[0], side="protected")]
    assert look([*full, rows[2], even], known).recovered == pytest.approx(1.0)
    # Nothing that proved itself gives anything: what did not is no ground to judge on.
    nothing = [row("full_dose", "plain", (0.0, 0.8)), row("full_dose", "protected", (0.0, 0.8))]
    assert look([*nothing, rows[2], rows[3]], known).reason is not None
