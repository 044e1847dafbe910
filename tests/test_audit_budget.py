"""Audits that end before all rows are found, on a budget or stopped on the way, and what they tell meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import thief_cases
from audit_cases import QUICK, SMALL, audit, configuration, figures
from audit_form import FORM, complaints
from unmergeable.audit import run as run_module
from unmergeable.audit import work
from unmergeable.audit.jobs import Job
from unmergeable.audit.results import AuditResult
from unmergeable.audit.rows import SIDES, Row

pytestmark = pytest.mark.filterwarnings("ignore")
PROTECTED = thief_cases.PROTECTED


@pytest.fixture(scope="module")
def small(models: Path, tmp_path_factory: pytest.TempPathFactory) -> AuditResult:
    """An audit of a few rows, to be found again in other ways."""
    return audit(configuration(models, attacks=SMALL), tmp_path_factory.mktemp("small") / "out")


def test_an_audit_that_was_stopped_goes_on(
    small: AuditResult, models: Path, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = configuration(models, attacks=SMALL)
    counted = work.run_job

    def stopped(bench: Any, reference: Any, job: Job) -> Row:
        if len(jobs) == 5:
            raise KeyboardInterrupt
        return counted(bench, reference, job)

    monkeypatch.setattr(work, "run_job", stopped)
    with pytest.raises(KeyboardInterrupt):
        audit(fields, tmp_path / "out")
    assert len(jobs) == 5
    assert not (tmp_path / "out" / "results.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cache").iterdir()}
    assert len(before) == 5
    monkeypatch.setattr(work, "run_job", counted)
    result = audit(fields, tmp_path / "out")
    assert len(jobs) == len(set(jobs)) == len(small.rows)
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert figures(result) == figures(small)


@pytest.fixture
def clock(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty seconds a job, and none between them."""

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return 20.0 * len(jobs)

    for module in (work, run_module):
        monkeypatch.setattr(module, "time", Clock)


@pytest.mark.usefixtures("clock")
def test_a_budget_leaves_out_what_comes_last(
    small: AuditResult, models: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    fields = configuration(models, attacks=SMALL)
    result = audit(fields, tmp_path / "out", budget=1.3, require={0: 0.0, 1: 0.0})
    assert [job.label for job in jobs] == [f"{row.attack}, {row.side}" for row in result.rows]
    assert [job.label for job in jobs] == [
        *(f"task_arithmetic, {side}" for side in SIDES),
        "probe, protected",
    ]
    left = [f"{one['attack']}, {one['side']}" for one in result.left_out]
    assert left == [
        "probe, plain", "anchor-coupled > proof, plain", "anchor-coupled > probe, protected",
        "anchor-coupled > probe, plain",
    ]  # fmt: skip
    assert [one["level"] for one in result.left_out] == [0, 1, 1, 1]
    assert "the budget ended before 4 of the rows were found: they are listed" in result.notes
    # Level 0 stands on what was found; level 1 cannot be judged, so that nothing is promised for it.
    assert result.level(0).reason is None
    assert "anchor-coupled was not run" in str(result.level(1).reason)
    first, second = result.requirements
    assert first.found is not None
    assert (second.found, second.holds) == (None, False)
    # What was found stays, and the next run finds the rest.
    whole = audit(fields, tmp_path / "out")
    assert len(jobs) == len(set(jobs)) == len(whole.rows)
    assert figures(whole) == figures(small)


@pytest.mark.usefixtures("clock")
def test_a_budget_follows_up_what_it_found_off_the_shelf(
    models: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    """A merge that works without a lock is tried aligned before the last merges off the shelf are tried at all."""
    shelf = ["mergekit:linear", "mergekit:slerp", "mergekit:karcher", "mergekit:nuslerp"]
    fields = configuration(models, attacks=[*SMALL, *shelf])

    whole = audit(fields, tmp_path / "whole")
    order = list(jobs)
    chains = {job for job in order if job.prepared is not None and job.attack in shelf}
    assert {job.attack for job in chains} == set(shelf)
    # Time for six jobs of the shelf, two merges on three sides, and for four more.
    begun = next(number for number, job in enumerate(order) if job.attack in shelf)
    jobs.clear()
    part = audit(fields, tmp_path / "part", budget=(begun + 9.5) / 3)
    assert jobs[:begun] == order[:begun]
    tried = {job.attack for job in jobs[begun : begun + 6]}
    assert len(tried) == 2
    assert {job.attack for job in jobs[begun + 6 : begun + 8] if job.prepared is not None} == tried
    assert {one["attack"] for one in part.left_out} & set(shelf)
    # With time enough for all of it, nothing is lost by the other order.
    jobs.clear()
    late = audit(fields, tmp_path / "late", budget=(len(order) + 2.5) / 3)
    assert late.left_out == []
    assert set(jobs) == set(order)
    assert [one.recovered for one in late.levels] == [one.recovered for one in whole.levels]


def test_no_time_at_all(models: Path, tmp_path: Path, jobs: list[Job]) -> None:
    fields = configuration(models, PROTECTED, attacks=QUICK, levels=[0])  # one side's rows are the other's
    result = audit(fields, tmp_path / "out", budget=1e-9, require={0: 0.0})
    assert jobs == []
    assert result.rows == ()
    assert {(one["attack"], one["side"]) for one in result.left_out} == {
        *(("task_arithmetic", side) for side in SIDES), ("full_dose", "protected"), ("full_dose", "plain")
    }  # fmt: skip
    assert result.level(0).reason is not None
    assert not result.holds
    assert complaints(json.loads((tmp_path / "out" / "results.json").read_text()), FORM) == []
    assert (tmp_path / "out" / "report.html").exists()


def test_progress_is_told(models: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    fields = configuration(models, attacks=["task_arithmetic"], levels=[0])
    audit(fields, tmp_path / "out", progress=lambda *step: told.append(step))
    assert told == [(number, 3, f"task_arithmetic, {side}") for number, side in enumerate(SIDES, 1)]
