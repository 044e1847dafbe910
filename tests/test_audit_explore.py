"""One attack on one side: what is looked at, what is scored in full, what is no merge, and what it costs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

import thief_cases
from audit_cases import config, configuration, equal, same, zoo
from thief_cases import Doses
from unmergeable.attacks.merges import Coefficients
from unmergeable.audit import explore as explore_module
from unmergeable.audit.bench import Bench
from unmergeable.audit.explore import Explorer, explore
from unmergeable.audit.finalists import LEAST, MOST, promising
from unmergeable.audit.jobs import PROOF, Job, Start
from unmergeable.audit.known import prepare
from unmergeable.audit.rows import Row
from unmergeable.audit.scores import Reference
from unmergeable.audit.suite import merge_attack
from unmergeable.audit.work import run_job
from unmergeable.merging import check
from unmergeable.merging.check import Facts
from unmergeable.merging.grids import FULL_DOSE_GRID
from unmergeable.merging.tensors import distance

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("single")]
PROTECTED = thief_cases.PROTECTED


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(config(configuration(zoo(tmp_path_factory))), tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def reference(bench: Bench) -> Reference:
    return prepare(bench).reference


@pytest.fixture(scope="module")
def row(bench: Bench, reference: Reference) -> Row:
    """The full-dose grid on the unprotected model."""
    return run_job(bench, reference, Job("full_dose", "plain"))


# --- a row ---------------------------------------------------------------------------------------------------


def test_a_row_tells_what_was_tried(bench: Bench, reference: Reference, row: Row) -> None:
    assert (row.chain, row.side, row.level, row.state, row.reason) == (
        ("full_dose",),
        "plain",
        0,
        "done",
        None,
    )
    assert [(look.options["dose"], look.options["others"]) for look in row.looks] == list(FULL_DOSE_GRID)
    assert 1 <= len(row.points) <= 5
    for point in row.points:
        for half in ("validation", "test"):
            scores = getattr(point, half)
            assert list(scores) == list(reference.tasks)
            assert all(len(found) == len(bench.index[task][half]) for task, found in scores.items())
    assert {"distance", "moved", "shares", "near_base"} == row.facts.keys()
    assert row.facts["distance"] == pytest.approx(distance(bench.base, bench.models["plain"]))
    best = max(row.points, key=lambda point: min(reference.pair("validation", point.validation)))
    assert best is row.points[0]
    assert row.facts["shares"][PROTECTED] == pytest.approx(best.options["dose"], abs=0.01)
    json.dumps(row.summary(), allow_nan=False)


def test_a_row_says_what_it_cost(bench: Bench, reference: Reference, row: Row) -> None:
    screen, validation = (
        sum(len(one[half]) for one in bench.index.values()) for half in ("screen", "validation")
    )
    full = len(promising(row.looks, reference.floors))
    assert row.cost.forwards == len(row.looks) * screen + full * validation
    assert (row.cost.inputs, row.cost.labelled, row.cost.tokens, row.cost.size) == (0, 0, 0, 1)
    assert row.cost.seconds > 0
    taught = run_job(bench, reference, Job("regmean", "plain"))
    assert (taught.level, taught.state) == (2, "done")
    assert taught.cost.inputs > 0
    assert taught.cost.forwards > len(taught.looks) * screen + validation
    wide = run_job(bench, reference, Job("wide", "plain"))
    assert wide.cost.size > 2
    # A pass through it is a pass through all that it is made of: three models, and the base.
    full = len(promising(wide.looks, reference.floors))
    passes = len(wide.looks) * screen + full * validation
    assert 2.5 * passes < wide.cost.forwards <= wide.cost.size * passes


@pytest.mark.parametrize(
    "job",
    [
        Job("task_arithmetic", "without"),
        Job("full_dose", "protected"),
        Job("ties", "plain"),
        Job("wide", "plain"),
        Job("full_dose", "protected", "anchor-coupled"),
        Job("probe", "plain", "quantise-4"),
        Job("regmean", "without"),
    ],
    ids=lambda job: job.label,
)
def test_every_point_can_be_made_again(job: Job, bench: Bench, reference: Reference) -> None:
    """From the row's chain and a point's options as JSON has them, by a thief who knows nothing else."""
    row = run_job(bench, reference, job)
    assert row.state == "done"
    attack = merge_attack(job.attack)
    for point in row.points:
        thief = bench.thief(job.side, job.prepared)
        subject = attack.make(thief, json.loads(json.dumps(point.options)))
        assert same(bench.measure(subject, "validation"), point.validation)
        assert same(bench.measure(subject, "test"), point.test)


def test_a_row_is_the_same_every_time(bench: Bench, reference: Reference) -> None:
    job = Job("ties", "protected")
    assert equal(run_job(bench, reference, job), run_job(bench, reference, job), cost=False)


def test_the_same_models_give_the_same_on_every_side(bench: Bench, reference: Reference, row: Row) -> None:
    prepared, plain = run_job(bench, reference, Job("full_dose", "protected", "anchor-coupled")), row
    # An exact lock that is aligned back is the fine-tune itself.
    assert [look.options for look in prepared.looks] == [look.options for look in plain.looks]
    for one, other in zip(prepared.points, plain.points, strict=True):
        assert one.options == other.options
        assert same(one.test, other.test)


# --- what is no merge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "origin"),
    [
        (merge_attack("mergekit:passthrough"), "stars"),
        (Coefficients("copy", "no coefficient", ((0.0, 0.0),), alone=True), "base"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_copy_is_no_merge(attack: Any, origin: str, bench: Bench, reference: Reference) -> None:
    row = explore(bench, reference, attack, "protected")
    assert row.state == "unreliable"
    assert row.reason == f"not a merge: 100% of it is copied from one input, mostly from {origin}"
    assert row.points  # what it found stands


def test_every_merge_that_is_chosen_is_looked_into(
    bench: Bench, reference: Reference, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the best one alone: here the last one that a thief may choose is a copy."""
    assert len(row.points) > 1
    seen: list[Facts] = []

    def facts(*arguments: Any) -> Facts:
        seen.append(check.facts(*arguments))
        last = len(seen) == len(row.points)
        return replace(seen[-1], copied=1.0, copies={"base": ("all",)}) if last else seen[-1]

    monkeypatch.setattr(explore_module, "facts", facts)
    again = run_job(bench, reference, Job("full_dose", "plain"))
    assert again.state == "unreliable"
    assert again.reason == "not a merge: 100% of it is copied from one input, mostly from base"
    assert len(again.points) == len(row.points) == len(seen)  # what it found stands
    assert again.facts == row.facts  # of the best one


def test_without_the_model_any_merge_will_do(bench: Bench, reference: Reference) -> None:
    copy = Coefficients("copy", "no coefficient", ((0.0, 0.0),), alone=True)
    assert explore(bench, reference, copy, "without").state == "done"


# --- what is kept in memory ----------------------------------------------------------------------------------


def test_what_is_kept_is_not_made_again(bench: Bench, reference: Reference) -> None:
    doses = tuple(0.1 * number for number in range(8))
    kept, made = Doses(doses, keep=True), Doses(doses)
    rows = [explore(bench, reference, attack, "plain") for attack in (kept, made)]
    assert len(kept.made) == len(doses)
    assert len(made.made) > len(doses)
    assert rows[0].looks == rows[1].looks
    for a, b in zip(rows[0].points, rows[1].points, strict=True):
        assert a.options == b.options
        assert same(a.test, b.test)


def test_only_the_best_are_kept_in_memory(bench: Bench, reference: Reference) -> None:
    explorer = Explorer(bench, reference)
    Doses(tuple(0.1 * number for number in range(12)), keep=True).explore(bench.thief("plain"), explorer)
    assert len(explorer.looks) == 12
    assert LEAST <= len(explorer.kept) <= MOST
    assert set(explorer.kept) == set(promising(explorer.looks, reference.floors))


# --- known cases and starts ----------------------------------------------------------------------------------


def test_a_known_case_is_a_row_of_its_own(bench: Bench, reference: Reference) -> None:
    row = run_job(bench, reference, Job(PROOF, "plain", "anchor-coupled"))
    assert (row.chain, row.side, row.level, row.state) == (("anchor-coupled", PROOF), "plain", 1, "done")
    assert row.facts["holds"]
    assert row.facts["attacked"] < 0.5 < row.facts["locked"]
    assert row.points == ()


def test_a_repair_begins_with_merges_of_other_attacks(
    bench: Bench, reference: Reference, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unmergeable.attacks import repair

    monkeypatch.setattr(repair, "STEPS", 4)
    monkeypatch.setattr(repair, "EVERY", 2)
    monkeypatch.setattr(repair, "RATES", (1e-5,))
    starts = (
        Start.of("full_dose", None, {"dose": 0.5, "others": 0.45}),
        Start.of("full_dose", "quantise-4", {"dose": 0.5, "others": 0.45}),
    )
    repaired = run_job(bench, reference, Job("repair-4", "plain", starts=starts))
    assert (repaired.state, repaired.level) == ("done", 3)
    assert [look.options["start"] for look in repaired.looks] == [0, 0, 1, 1]
    assert repaired.cost.labelled == 4 * sum(thief_cases.CLASSES.values())
    # Steps so small leave a merge almost where it began.
    look = next(one for one in row.looks if one.options == {"dose": 0.5, "others": 0.45})
    assert repaired.looks[0].joint == pytest.approx(look.joint, abs=0.1)
