"""The beams of an audit: which preparations are followed, and what is tried after them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from audit_cases import reference, row
from job_cases import helped, run, waves
from unmergeable.audit.jobs import HELPS, Job
from unmergeable.audit.rows import Row
from unmergeable.audit.suite import BEAM, CORE, FOLLOW, merge_attacks


def test_the_best_preparations_are_followed_up() -> None:
    gains = {"noise": 0.1, "quantise-4": 0.3, "align-permutation": 0.2}
    done = run(waves(), helped(gains))
    followed = [job for job in done[2] if job.side == "protected"]
    assert BEAM == 2
    assert followed == [
        *(
            Job(name, "protected", prepared)
            for prepared in ("quantise-4", "align-permutation")
            for name in CORE
        ),
        Job("full_dose", "protected", "anchor-coupled"),  # what level 1 stands on, whatever helped
    ]
    after = [job for wave in done[3:] for job in wave if job.prepared is not None]
    # What is learnt from data begins with a model that nothing has damaged.
    assert {job.prepared for job in after if job.level <= 1} == {"quantise-4"}
    assert {job.prepared for job in after if job.level > 1} == {"align-permutation"}
    assert {job.side for job in after} == {"protected"}
    taught = {job.attack for job in after if job.level > 1}
    assert taught == {
        name for name, attack in merge_attacks().items()
        if attack.access > 1 and not name.startswith(("distil", "repair"))
    }  # fmt: skip
    assert Job("substitute-blocks", "protected", "quantise-4") in done[3]
    assert Job("wide", "protected", "quantise-4") in done[3]  # some classes share more than blocks hand on


def test_a_preparation_that_hardly_helps_is_not_followed_up() -> None:
    some = waves()
    floors = len(reference().floors)
    for gain, kept in ((0.9 * HELPS / floors, []), (1.1 * HELPS / floors, ["noise"]), (-0.3, [])):
        found = {
            job: helped({"noise": gain})(job)
            for job in (Job("probe", "protected"), Job("probe", "protected", "noise"))
        }
        assert some.beam(found, "protected") == kept


def test_an_alignment_is_followed_where_merges_fail_aligned_as_well() -> None:
    """A hardened model that is locked: no merge works, but what is done with data needs its own coordinates."""
    some = waves()
    for near, kept in ((1.0, ["anchor-coupled"]), (2.9, [])):
        found = {
            job: replace(row("probe", job.side, (0.0, 0.5)), facts={"moved": moved})
            for job, moved in (
                (Job("probe", "protected"), 3.0),
                (Job("probe", "protected", "anchor-coupled"), near),
                (Job("probe", "protected", "noise"), 0.1),  # destroys the model: no alignment
            )
        }
        assert some.beam(found, "protected") == kept


def test_what_undoes_a_lock_comes_before_what_helps_and_damages() -> None:
    """A few merges of a probe may do better with a model that is pulled to the base: no model to go on with."""
    some = waves()
    gains = {"anchor-independent": 0.4, "align-procrustes": 0.3, "anchor-coupled": 0.25}
    for facts, first in (
        # By its own distance where that is known: that of a merge depends on the coefficients that did best.
        (({"distance": 1.4, "moved": 1.0}, {"distance": 0.2, "moved": 1.3}), "anchor-coupled"),
        (({"moved": 3.0}, {"distance": 0.2, "moved": 1.3}), "anchor-coupled"),
        (({"distance": 0.2, "moved": 3.0}, {"distance": 0.2, "moved": 1.3}), "anchor-independent"),
        (({}, {"distance": 0.2, "moved": 1.3}), "anchor-independent"),
    ):
        found = {}
        for name in (None, *gains):
            known = facts[0] if name is None else facts[1] if name == "anchor-coupled" else {}
            job = Job("probe", "protected", name)
            found[job] = replace(helped(gains)(job), facts=known)
        other = "anchor-independent" if first == "anchor-coupled" else "align-procrustes"
        assert some.beam(found, "protected") == [first, other]


def test_of_the_unprotected_model_nothing_has_to_be_undone() -> None:
    gains = {"quantise-8": 0.5, "substitute-mlp": 0.1}
    for side, kept in (("plain", []), ("protected", ["quantise-8", "substitute-mlp"])):
        done = run(waves(1), helped(gains, side))
        found = {job: helped(gains, side)(job) for wave in done for job in wave}
        assert waves(1).beam(found, side) == kept  # type: ignore[arg-type]
        after = {(job.side, job.prepared) for wave in done[2:] for job in wave if job.prepared}
        assert {prepared for one, prepared in after if one == "plain"} == set()


def test_what_was_not_probed_is_not_followed_up() -> None:
    some = waves()
    assert some.beam({}, "protected") == []
    assert some.beam({}, "without") == []
    only = {Job("probe", "protected"): row("probe", "protected", (0.5, 0.9))}
    assert some.beam(only, "protected") == []


def test_the_merges_that_do_best_without_protection_are_tried_after_the_best_preparation() -> None:
    shelf = [name for name in waves().shelf if name not in CORE]
    good = shelf[::-1][:FOLLOW]

    def found(job: Job) -> Row:
        if job.prepared is None and job.side == "plain" and job.attack in good:
            return row(job.attack, job.side, (0.5 + 0.01 * good.index(job.attack), 0.9))
        return helped({"noise": 0.5})(job)

    more = run(waves(1), found)[5]
    assert {(job.side, job.prepared) for job in more} == {("protected", "noise")}
    assert [job.attack for job in more] == good[::-1]


@pytest.mark.parametrize(
    ("gains", "prepared"),
    [
        ({"align-canonical-svd": 0.5, "noise": 0.2}, "align-canonical-svd > quantise-4"),
        ({"noise": 0.5, "align-canonical-svd": 0.2}, "quantise-4"),  # not two small changes
        ({}, "quantise-4"),
    ],
)
def test_what_a_small_change_brought_the_unprotected_model_is_tried_on_the_protected_one(
    gains: dict[str, float], prepared: str
) -> None:
    best = Job("ties", "plain", "quantise-4")

    def found(job: Job) -> Row:
        value = 0.9 if job == best else gains.get(job.prepared or "", 0.1) if job.side == "protected" else 0.3
        return row(job.attack, job.side, (value, 0.9), prepared=job.prepared)

    jobs = [Job("probe", "protected"), Job("ties", "plain"), Job("wide", "plain"), best]
    jobs += [Job("probe", "protected", name) for name in gains]
    assert waves().matched({job: found(job) for job in jobs}) == [Job("ties", "protected", prepared)]


def test_of_merges_that_are_as_good_the_one_counts_that_a_thief_takes() -> None:
    some = {
        Job("wide", "plain"): row("wide", "plain", (0.9, 0.8)),
        Job("ties", "plain", "noise"): row("ties", "plain", (0.9, 0.9), prepared="noise"),
    }
    assert waves().matched(some) == [Job("ties", "protected", "noise")]


def test_what_works_on_the_unprotected_model_is_tried_on_one_that_was_unlocked() -> None:
    aligned = {"align-procrustes": 0.5}
    for prepared, more in (
        (None, "align-procrustes"),
        ("substitute-mlp", "align-procrustes > substitute-mlp"),
    ):
        best = Job("iso_c", "plain", prepared)
        jobs = [
            Job("probe", "protected"),
            Job("probe", "protected", "align-procrustes"),
            Job("ties", "plain"),
        ]
        found = {job: helped(aligned)(job) for job in jobs}
        found[best] = row("iso_c", "plain", (0.9, 0.95), prepared=prepared)
        assert waves().matched(found) == [Job("iso_c", "protected", more)]


def test_models_in_memory_are_not_attacked_as_checkpoints() -> None:
    colluded = helped({"collude-aligned": 0.5})
    probes = (Job("probe", "protected"), Job("probe", "protected", "collude-aligned"))
    for prepared, more in (("substitute-mlp", []), ("noise", ["collude-aligned > noise"])):
        found = {job: colluded(job) for job in probes}
        found[Job("ties", "plain", prepared)] = row("ties", "plain", (0.9, 0.9), prepared=prepared)
        jobs = [Job("ties", "protected", chain) for chain in more]
        assert waves(releases=True).matched(found) == jobs


def test_what_an_alignment_brought_the_unprotected_model_is_not_copied() -> None:
    jobs = [
        Job("ties", "plain", "align-procrustes"),
        Job("wide", "plain"),
        Job("ties", "protected", "noise"),
    ]
    found = {job: row(job.attack, job.side, (0.9, 0.9), prepared=job.prepared) for job in jobs}
    assert waves().matched(found) == []
    assert waves().matched({}) == []


def test_worth_counts_every_floor() -> None:
    some = waves()
    assert some.reference.worth(None) == 0
    assert some.reference.worth(row("ties", "plain", (-0.5, 0.9))) == 0
    assert some.reference.worth(row("ties", "plain", (0.8, 0.3), (0.2, 0.9))) == pytest.approx(
        2 * 0.8 + 2 * 0.2
    )
