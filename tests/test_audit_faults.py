"""One attack on one side, and what goes wrong with it: merges that break, errors, bugs, known cases and starts."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from audit_cases import config, configuration, equal, zoo
from thief_cases import Doses, Weak
from unmergeable.attacks import proof
from unmergeable.audit import work
from unmergeable.audit.bench import Bench
from unmergeable.audit.explore import explore
from unmergeable.audit.jobs import PROOF, Job, Start
from unmergeable.audit.known import prepare
from unmergeable.audit.rows import Row
from unmergeable.audit.scores import Reference
from unmergeable.audit.work import run_job
from unmergeable.errors import InputError, RunError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("single")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(config(configuration(zoo(tmp_path_factory))), tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def reference(bench: Bench) -> Reference:
    return prepare(bench).reference


def raising(error: Exception) -> Callable[[], object]:
    def throw() -> object:
        raise error

    return throw


def one(bench: Bench, reference: Reference, attack: Any, side: Any = "plain") -> Row:
    return explore(bench, reference, attack, side)


# --- merges that break ---------------------------------------------------------------------------------------


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


# --- errors --------------------------------------------------------------------------------------------------


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


def test_what_is_no_number_is_none_in_results(bench: Bench, reference: Reference) -> None:
    measured = {"left": math.nan, "sites": [{"moved": math.inf, "kept": 0.5}], "anchor": "base"}
    row = replace(one(bench, reference, Doses((0.4,))), facts=measured)
    facts = row.summary()["facts"]
    assert facts == {"left": None, "sites": [{"moved": None, "kept": 0.5}], "anchor": "base"}


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


# --- known cases and starts ----------------------------------------------------------------------------------


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
    monkeypatch.setattr(proof, "attack_named", lambda name: Weak)
    row = run_job(bench, reference, Job(PROOF, "plain", "anchor-coupled"))
    assert row.state == "unreliable"
    assert "a known lock (gauge) is not undone" in str(row.reason)


def test_a_start_that_cannot_be_made_is_part_of_the_row(
    bench: Bench, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "prepare", lambda side, name: raising(InputError("it does not apply"))())
    starts = (Start.of("full_dose", "noise", {"dose": 0.5, "others": 0.45}),)
    row = run_job(bench, reference, Job("repair-4", "plain", starts=starts))
    assert (row.state, row.reason) == ("refused", "it does not apply")
