"""The jobs of an audit: waves in their order, starts of repairs, and no job twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit_cases import row
from job_cases import SOLVED, helped, run, waves
from unmergeable.attacks.prepare import COLLUSIONS, PREPARATIONS
from unmergeable.attacks.repair import EACH
from unmergeable.audit.jobs import PROOF, Job, Start
from unmergeable.audit.rows import SIDES, Row
from unmergeable.audit.suite import FIRST, merge_attack, merge_attacks, names
from unmergeable.errors import UsageError
from unmergeable.merging import METHODS

# --- which jobs ----------------------------------------------------------------------------------------------


def test_the_most_informative_comes_first() -> None:
    core, probes, followed, adaptive, shelf, more, matched, *taught = run(waves())
    assert [job.attack for job in core] == [
        "task_arithmetic", *["task_arithmetic"] * 2, "full_dose", "full_dose", "ties", "ties", "ties"
    ]  # fmt: skip
    assert {job.attack for job in probes} == {"probe", PROOF}
    assert {job.prepared for job in probes} == {None, *(one.name for one in PREPARATIONS)}
    assert [job.attack for job in adaptive] == ["substitute-blocks"] * 2 + ["wide"] * 2
    assert followed == [
        Job("full_dose", "protected", "anchor-coupled")
    ]  # more than a probe, where none helped
    assert not more  # nothing helped
    assert not matched
    assert {merge_attack(job.attack).access for job in core + shelf} == {0}
    # Of both levels with data the first attacks, then the rest of both.
    assert [{job.level for job in wave} for wave in taught] == [{2}, {3}, {2}, {3}]
    for first, rest in ((0, 2), (1, 3)):
        assert {job.attack for job in taught[first]} == set(FIRST[2 + first])
        assert not {job.attack for job in taught[first]} & {job.attack for job in taught[rest]}
    assert {job.attack for wave in taught for job in wave if job.starts} == {
        f"repair-{each}" for each in EACH
    }


@pytest.mark.parametrize("top", [0, 1, 2, 3])
def test_no_job_is_above_the_highest_level(top: int) -> None:
    jobs = [job for wave in run(waves(top), helped({"noise": 0.5})) for job in wave]
    assert max(job.level for job in jobs) == top
    assert {job.level for job in jobs} == set(range(top + 1))


def test_every_attack_of_the_suite_is_run_on_its_sides() -> None:
    jobs = {job for wave in run(waves()) for job in wave}
    for name, attack in merge_attacks().items():
        sides = SIDES if attack.alone else ("protected", "plain")
        assert {job.side for job in jobs if job.attack == name} == set(sides), name
    for name in SOLVED:
        assert Job(PROOF, "plain", name) in jobs
    assert {job.prepared for job in jobs if job.attack == PROOF} == set(SOLVED)


def test_the_suite_has_every_merge_method_off_the_shelf() -> None:
    shelf = {name for name, attack in merge_attacks().items() if attack.access == 0 and name != "probe"}
    ours = {name for name in METHODS if ":" not in name}
    with_data, searched = {"regmean", "fisher"}, {"substitute"}
    kit = {name for name in METHODS if name.startswith("mergekit:")}
    assert len(kit) == 20
    plain = {name.removeprefix("mergekit:") for name in kit}
    assert shelf == kit | (ours - with_data - searched - plain) | {"task_arithmetic", "ties"}


@given(top=st.integers(0, 3), seed=st.integers(0, 1000), releases=st.booleans(), part=st.booleans())
@settings(max_examples=40, deadline=None)
def test_nothing_is_run_twice(top: int, seed: int, releases: bool, part: bool) -> None:
    random = np.random.default_rng(seed)

    def found(job: Job) -> Row:
        pairs = [tuple(random.uniform(-0.5, 1.2, 2)) for _ in range(random.integers(0, 4))]
        return row(job.attack, job.side, *pairs, prepared=job.prepared)

    only = [name for name in names() if random.random() < 0.5] if part else None
    jobs = [job for wave in run(waves(top, only, releases), found) for job in wave]
    assert len(set(jobs)) == len(jobs)
    for job in jobs:
        assert job.level <= top
        assert job.prepared is None or job.side != "without"
        assert not job.starts or merge_attack(job.attack).access == 3


def test_only_what_is_named_is_run() -> None:
    jobs = {job for wave in run(waves(3, ["ties", "wide"])) for job in wave}
    assert jobs == {
        *(Job("ties", side) for side in SIDES), Job("wide", "protected"), Job("wide", "plain"),
    }  # fmt: skip
    assert not [job for wave in run(waves(3, [])) for job in wave]


def test_a_named_preparation_brings_its_probes_and_its_known_case() -> None:
    jobs = [job for wave in run(waves(1, ["anchor-coupled", "quantise-4"])) for job in wave]
    probe = [Job("probe", side, prepared) for prepared in (None, "anchor-coupled", "quantise-4") for side in
             ("protected", "plain")]  # fmt: skip
    assert set(jobs) == {*probe, Job(PROOF, "plain", "anchor-coupled")}
    # The known case is solved before the attack is tried.
    assert jobs.index(Job(PROOF, "plain", "anchor-coupled")) < jobs.index(
        Job("probe", "protected", "anchor-coupled")
    )


def test_releases_are_brought_together_only_where_there_are_some() -> None:
    for releases in (False, True):
        jobs = {job for wave in run(waves(1, releases=releases)) for job in wave}
        for name in COLLUSIONS:
            assert (Job("probe", "protected", name) in jobs) == releases


@pytest.mark.parametrize("top", [0, 1, 2, 3])
@pytest.mark.parametrize("releases", [False, True])
def test_the_estimate_is_near(top: int, releases: bool) -> None:
    few = waves(top, releases=releases)
    least = sum(map(len, run(few)))
    most = sum(map(len, run(few, helped({"noise": 0.5, "quantise-4": 0.4}))))
    assert 0.8 * least <= few.estimate() <= 1.2 * most


def test_names_are_those_of_the_suite() -> None:
    assert len(set(names())) == len(names())
    for name in names():
        assert name in merge_attacks() or name in {*(one.name for one in PREPARATIONS), *COLLUSIONS}
    with pytest.raises(UsageError, match="the suite has no such attack"):
        merge_attack("magic")


# --- starts --------------------------------------------------------------------------------------------------


def starts(found: Mapping[Job, Row], side: Any = "protected") -> list[dict[str, Any]]:
    jobs = [job for one in (True, False) for job in waves()._taught(found, 3, one) if job.starts]
    (first, *rest) = [job.starts for job in jobs if job.side == side]
    assert all(other == first for other in rest)
    return [start.as_dict() for start in first]


def half(side: str = "protected", prepared: str | None = None) -> dict[str, Any]:
    options = {"others": 0.5} if side == "without" else {"dose": 0.5, "others": 0.5}
    return {"attack": "task_arithmetic", "prepared": prepared, "options": options}


@pytest.mark.parametrize("side", SIDES)
def test_without_merges_a_repair_begins_with_a_mean(side: str) -> None:
    assert starts({}, side) == [half(side)]


def test_repairs_begin_with_the_best_merges() -> None:
    found = {
        Job("ties", "protected"): row("ties", "protected", (0.6, 0.2), (0.5, 0.3)),
        Job("full_dose", "protected", "noise"): row("full_dose", "protected", (0.4, 0.4), prepared="noise"),
        Job("full_dose", "plain"): row("full_dose", "plain", (0.9, 0.9)),
        Job("regmean", "protected"): row("regmean", "protected", (0.9, 0.9)),  # cannot be made again at once
        Job("wide", "protected"): row("wide", "protected", (0.9, 0.9)),  # not one model
        Job("untrap", "protected"): row("untrap", "protected", (0.9, 0.9)),
        Job(PROOF, "plain", "noise"): row(PROOF, "plain", prepared="noise"),
    }
    assert starts(found) == [
        {"attack": "full_dose", "prepared": "noise", "options": {"weight": 0.4}},  # the worse of both
        {"attack": "ties", "prepared": None, "options": {"weight": 0.5}},  # with a quarter of his own
        half(),
    ]


def test_a_start_is_not_repeated() -> None:
    found = {Job("ties", "protected"): row("ties", "protected", (0.6, 0.6))}
    assert len(starts(found)) == 2


def test_a_mean_is_taken_after_what_helped() -> None:
    jobs = (Job("probe", "protected"), Job("probe", "protected", "align-permutation"))
    found = {job: helped({"align-permutation": 0.4})(job) for job in jobs}
    assert starts(found)[-1] == half(prepared="align-permutation")
    jobs = (Job("probe", "protected"), Job("probe", "protected", "substitute-mlp"))
    found = {job: helped({"substitute-mlp": 0.4})(job) for job in jobs}
    assert starts(found)[-1] == half(prepared=None)  # and of a whole model


def test_a_start_is_compared_by_its_options() -> None:
    one, two = Start.of("a", None, {"x": 1, "y": [2]}), Start.of("a", None, {"y": [2], "x": 1})
    assert one == two
    assert hash(one) == hash(two)
    assert one.as_dict()["options"] == {"x": 1, "y": [2]}


@pytest.mark.parametrize(
    ("job", "level", "label"),
    [
        (Job("ties", "plain"), 0, "ties, plain"),
        (Job("ties", "plain", "noise"), 1, "noise > ties, plain"),
        (Job(PROOF, "plain", "noise"), 1, "noise > proof, plain"),
        (Job("wide", "protected"), 1, "wide, protected"),
        (Job("regmean", "without"), 2, "regmean, without"),
        (Job("untrap", "plain", "noise"), 3, "noise > untrap, plain"),
    ],
)
def test_a_job_knows_its_level_and_its_name(job: Job, level: int, label: str) -> None:
    assert (job.level, job.label) == (level, label)
    json.dumps(job.as_dict())
