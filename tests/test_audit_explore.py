"""One attack on one side: what is looked at, what is scored in full, what goes wrong, and what it costs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import thief_cases
from audit_cases import configuration, equal, same, zoo
from unmergeable.attacks.merges import Coefficients
from unmergeable.attacks.thief import Look as Looking
from unmergeable.attacks.thief import Thief
from unmergeable.audit import explore as explore_module
from unmergeable.audit import work
from unmergeable.audit.bench import Bench
from unmergeable.audit.config import make_config
from unmergeable.audit.explore import Explorer, explore
from unmergeable.audit.finalists import LEAST, MOST, promising
from unmergeable.audit.jobs import PROOF, Job, Start
from unmergeable.audit.known import prepare
from unmergeable.audit.rows import Row
from unmergeable.audit.scores import Reference
from unmergeable.audit.suite import merge_attack
from unmergeable.audit.work import one_thread, run_job
from unmergeable.errors import InputError, RunError
from unmergeable.merging import Merged, check
from unmergeable.merging.check import Facts
from unmergeable.merging.grids import FULL_DOSE_GRID

pytestmark = pytest.mark.filterwarnings("ignore")
PROTECTED = thief_cases.PROTECTED


@pytest.fixture(autouse=True, scope="module")
def single() -> Iterator[None]:
    """As in an audit: one thread."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    fields = configuration(zoo(tmp_path_factory))
    return Bench(make_config(fields, Path(), Path("audit.yaml")), tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def reference(bench: Bench) -> Reference:
    return prepare(bench).reference


@pytest.fixture(scope="module")
def row(bench: Bench, reference: Reference) -> Row:
    """The full-dose grid on the unprotected model."""
    return run_job(bench, reference, Job("full_dose", "plain"))


@dataclass
class Doses:
    """Doses of the protected model, as one wishes: what is done before a merge is made, by its dose."""

    doses: tuple[float, ...]
    before: Mapping[float, Callable[[], object]] = field(default_factory=dict)
    broken: tuple[float, ...] = ()
    keep: bool = False
    made: list[float] = field(default_factory=list)
    name: str = "doses"
    about: str = "doses"
    needs: tuple[str, ...] = ("base",)
    access: int = 0
    alone: bool = True

    def explore(self, thief: Thief, look: Looking) -> None:
        for dose in self.doses:
            merged = self.make(thief, {"dose": dose})
            look({"dose": dose}, merged, kept=work.detached(merged) if self.keep else None)

    def make(self, thief: Thief, options: Mapping[str, Any]) -> Merged:
        self.made.append(options["dose"])
        self.before.get(options["dose"], lambda: None)()
        weights = dict.fromkeys(thief.experts, 0.4) | {next(iter(thief.experts)): options["dose"]}
        merged = thief.whole(work.detached(thief.mixer.mix(weights)))
        if options["dose"] in self.broken:
            next(iter(merged.shared.values())).fill_(float("nan"))
        return merged


def raising(error: Exception) -> Callable[[], object]:
    def throw() -> object:
        raise error

    return throw


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
    assert {"moved", "shares", "near_base"} == row.facts.keys()
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


# --- what goes wrong -----------------------------------------------------------------------------------------


def one(bench: Bench, reference: Reference, attack: Any, side: Any = "plain") -> Row:
    return explore(bench, reference, attack, side)


def test_broken_merges_are_counted_and_not_chosen(bench: Bench, reference: Reference) -> None:
    row = one(bench, reference, Doses((0.4, 0.5, 0.6), broken=(0.5,)))
    assert row.state == "done"
    assert [look.options["dose"] for look in row.looks] == [0.4, 0.6]
    assert row.facts["broken"] == 1
    assert {point.options["dose"] for point in row.points} <= {0.4, 0.6}


def test_an_attack_that_only_breaks_things_has_failed(bench: Bench, reference: Reference) -> None:
    row = one(bench, reference, Doses((0.4, 0.5), broken=(0.4, 0.5)))
    assert (row.state, row.points) == ("failed", ())
    assert row.reason == "all 2 merges give answers that are no numbers"
    assert not row.errored  # it was tried: a thief has nothing of such merges
    nothing = one(bench, reference, Doses(()))
    assert (nothing.state, nothing.reason) == ("failed", "nothing to try with these models")
    assert nothing.errored


def test_what_breaks_later_is_not_chosen(
    bench: Bench, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge may give numbers on a few examples, and none on others."""
    measure = bench.measure
    attack = Doses((0.4, 0.5, 0.6))
    halves = {0.4: "validation", 0.5: "test"}

    def measured(subject: Any, half: str, only: Any = None) -> Any:
        if half == halves.get(attack.made[-1]):
            raise InputError("scores are not finite", where="here")
        return measure(subject, half, only)

    monkeypatch.setattr(bench, "measure", measured)
    row = one(bench, reference, attack)
    assert row.facts["broken"] >= 1
    assert {point.options["dose"] for point in row.points} <= {0.6}
    assert row.state == "done" or not row.points


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (InputError("no inputs", where="stars", hint="give some"), "refused"),
        (RunError("the loss is not finite", where="step 3"), "failed"),
        (MemoryError(), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "failed"),
        (torch.linalg.LinAlgError("svd did not converge"), "failed"),  # type: ignore[attr-defined]
        (np.linalg.LinAlgError("SVD did not converge"), "failed"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"),
            "failed",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_wrong_is_part_of_the_row(
    error: Exception, state: str, bench: Bench, reference: Reference
) -> None:
    row = one(bench, reference, Doses((0.4, 0.5, 0.6), before={0.6: raising(error)}))
    assert (row.state, row.points) == (state, ())
    assert row.reason == " ".join((str(error) or type(error).__name__).split())
    assert "\n" not in str(row.reason)
    assert row.errored
    assert row.facts["error"] == type(error).__name__
    assert len(row.looks) == 2
    json.dumps(row.summary(), allow_nan=False)


class UnpicklableError(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message, lambda: None)


@pytest.mark.parametrize(
    "error",
    [KeyError("dose"), TypeError("no\nnumber"), UnpicklableError("odd")],
    ids=lambda e: type(e).__name__,
)
def test_a_bug_costs_its_row_alone(error: Exception, bench: Bench, reference: Reference) -> None:
    """Also in a worker, which sends the row home."""
    row = one(bench, reference, Doses((0.4,), before={0.4: raising(error)}))
    assert (row.state, row.points, row.errored) == ("failed", (), True)
    assert str(row.reason).startswith(f"{type(error).__name__}: ")
    assert "\n" not in str(row.reason)
    assert equal(pickle.loads(pickle.dumps(row)), row)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_whoever_ends_the_audit_ends_it(error: Any, bench: Bench, reference: Reference) -> None:
    with pytest.raises(type(error)):
        one(bench, reference, Doses((0.4,), before={0.4: raising(error)}))


@pytest.mark.parametrize(
    ("attack", "origin"),
    [
        (merge_attack("mergekit:passthrough"), "stars"),
        (Coefficients("copy", "no coefficient", ((0.0, 0.0),), alone=True), "base"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_copy_is_no_merge(attack: Any, origin: str, bench: Bench, reference: Reference) -> None:
    row = one(bench, reference, attack, "protected")
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
    assert one(bench, reference, copy, "without").state == "done"


def test_what_is_kept_is_not_made_again(bench: Bench, reference: Reference) -> None:
    doses = tuple(0.1 * number for number in range(8))
    kept, made = Doses(doses, keep=True), Doses(doses)
    rows = [one(bench, reference, attack) for attack in (kept, made)]
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


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (InputError("nothing to act on"), "refused"),
        (RunError("disk full"), "failed"),
        (MemoryError(), "failed"),
        (KeyError("a bug"), "failed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_known_case_that_goes_wrong_is_a_row(
    error: Exception, state: str, bench: Bench, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "prove", lambda *arguments: raising(error)())
    row = run_job(bench, reference, Job(PROOF, "plain", "anchor-coupled"))
    odd = "KeyError: " if isinstance(error, KeyError) else ""
    assert (row.state, row.reason) == (state, odd + (str(error) or type(error).__name__))


def test_an_alignment_that_aligns_nothing_is_found_out(
    bench: Bench, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unmergeable.attacks import Outcome, proof

    class Weak:
        @staticmethod
        def run(case: Any, **options: Any) -> Outcome:
            return Outcome()

    monkeypatch.setattr(proof, "attack_named", lambda name: Weak)
    row = run_job(bench, reference, Job(PROOF, "plain", "anchor-coupled"))
    assert row.state == "unreliable"
    assert "a known lock (gauge) is not undone" in str(row.reason)


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


def test_a_start_that_cannot_be_made_is_part_of_the_row(
    bench: Bench, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "prepare", lambda side, name: raising(InputError("it does not apply"))())
    starts = (Start.of("full_dose", "noise", {"dose": 0.5, "others": 0.45}),)
    row = run_job(bench, reference, Job("repair-4", "plain", starts=starts))
    assert (row.state, row.reason) == ("refused", "it does not apply")
