"""What tests of the audit share: scores of examples as one wishes, rows made of them, and tiny models on disk.

The tiny zoo of `thief_cases` is written once for all workers of a test run.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thief_cases
import toy
import unmergeable as um
from unmergeable.attacks.prepare import COLLUDE
from unmergeable.audit import work
from unmergeable.audit.config import Config, make_config
from unmergeable.audit.jobs import Job
from unmergeable.audit.results import AuditResult
from unmergeable.audit.rows import Cost, Look, Point, Row, Scores, Side, State
from unmergeable.audit.run import run_audit
from unmergeable.audit.scores import Reference
from unmergeable.audit.suite import merge_attacks

# --- scores without models -----------------------------------------------------------------------------------

PROTECTED, OWN = "p", ("a", "b")
TASKS = (PROTECTED, *OWN)
SIZES = {"screen": 10, "validation": 20, "test": 40}
BASE, PLAIN = 0.2, 0.7


def scores(half: str, values: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Scores of a model with these values; they differ from example to example, and their means are exact."""
    found = {}
    for task, value in values.items():
        waves = np.sin(np.arange(SIZES[half]) + 7 * len(task) + ord(task[0]))
        found[task] = BASE + value * (PLAIN - BASE) + 0.1 * (waves - waves.mean())
    return found


def reference(alone: float = -np.inf) -> Reference:
    """Base and fine-tunes of three tasks, one of them protected."""
    halves = {
        name: {half: scores(half, dict.fromkeys(TASKS, value)) for half in SIZES}
        for name, value in (("base", 0.0), ("plain", 1.0))
    }
    return Reference(PROTECTED, OWN, halves["base"], halves["plain"], alone)


def point(
    value: float,
    own: float,
    test: tuple[float, float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Point:
    """A merge with these values on validation examples, and others on test examples if they are given."""
    found = []
    for half, (one, other) in (("validation", (value, own)), ("test", test or (value, own))):
        found.append(scores(half, {PROTECTED: one, "a": other, "b": other + 0.1}))
    return Point(options or {"weight": value}, *found)


def row(
    name: str,
    side: Side,
    *values: tuple[float, float],
    prepared: str | None = None,
    state: State = "done",
    reason: str | None = None,
    **more: Any,
) -> Row:
    """A row with points of these values, and a look at each."""
    level = merge_attacks()[name].access if name in merge_attacks() else 1
    return Row(
        chain=(name,) if prepared is None else (prepared, name),
        side=side,
        level=level if prepared is None else max(1, level),
        about="a row",
        needs=("base",),
        points=tuple(point(*pair) for pair in values),
        looks=tuple(Look({"weight": value}, value, own) for value, own in values),
        cost=more.pop("cost", Cost(forwards=100.0)),
        state=state,
        reason=reason,
        **more,
    )


def same(one: Scores, other: Scores) -> bool:
    """Whether scores are the same, bit for bit."""
    return list(one) == list(other) and all(np.array_equal(one[task], other[task]) for task in one)


def equal(one: Row, other: Row, *, cost: bool = True) -> bool:
    """Whether rows are the same, bit for bit; without `cost`, but for the seconds that they took."""
    plain = [
        {k: v for k, v in vars(each).items() if k not in ("points", "cost")}
        | {"cost": {k: v for k, v in vars(each.cost).items() if cost or k != "seconds"}}
        for each in (one, other)
    ]
    return (
        plain[0] == plain[1]
        and len(one.points) == len(other.points)
        and all(
            a.options == b.options and same(a.validation, b.validation) and same(a.test, b.test)
            for a, b in zip(one.points, other.points, strict=True)
        )
    )


# --- models on disk ------------------------------------------------------------------------------------------

# The audit that most tests look at: of an exact lock, the cheap attacks of levels 0 and 1.
ATTACKS = ("task_arithmetic", "full_dose", "ties", "anchor-coupled", "quantise-4", COLLUDE)
REQUIRED = {0: 0.01, 1: 0.5}
# Fewer: of level 0 alone, and of both levels with one alignment.
QUICK = ("task_arithmetic", "full_dose")
SMALL = ("task_arithmetic", "anchor-coupled")


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is made once, also where several processes run the tests."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / f"{name}.done").exists():
            shutil.rmtree(root / name, ignore_errors=True)  # of a test that failed half-way
            (root / name).mkdir()
            make(root / name)
            (root / f"{name}.done").touch()
    return root / name


def zoo(factory: pytest.TempPathFactory) -> Path:
    """The tiny zoo, with `locked` and `again`: its protected model, locked with one key and two salts."""

    def make(folder: Path) -> None:
        thief_cases.write(folder)
        for name, salt in (("locked", 1), ("again", 2)):
            um.lock(folder / thief_cases.PROTECTED, folder / name, key=toy.key(), salt=bytes([salt]) * 32)

    return once(factory, "audit-zoo", make)


def configuration(folder: Path, model: str = "locked", **changes: Any) -> dict[str, Any]:
    """An audit of a model of the tiny zoo, with paths that need no folder to be relative to."""
    fields = thief_cases.configuration(**changes)
    fields["base"] = str(folder / fields["base"])
    plain = str(folder / thief_cases.PROTECTED)
    fields["protected"] = {"model": str(folder / model), "plain": plain, "task": thief_cases.PROTECTED}
    fields["others"] = {task: str(folder / path) for task, path in fields["others"].items()}
    for task in fields["tasks"].values():
        task["batch"] = 120  # a whole half
        task["data"] = str(folder / task["data"])
        task["train"] = {"data": str(folder / task["train"]["data"])}
    return fields


def config(fields: dict[str, Any]) -> Config:
    """What an audit makes of such fields."""
    return make_config(fields, Path(), Path("audit.yaml"))


def audit(fields: Mapping[str, Any] | Path, output: Path, **options: Any) -> AuditResult:
    """An audit in this process, unless `workers` says otherwise."""
    given = {"workers": 1, "budget": None, "require": None, "cache": None, "progress": None} | options
    return run_audit(fields, output, **given)


def shared_configuration(models: Path) -> dict[str, Any]:
    """Of an exact lock, cheap attacks, with a second release."""
    fields = configuration(models, attacks=list(ATTACKS))
    fields["protected"]["releases"] = [str(models / "again")]
    return fields


def audited(factory: pytest.TempPathFactory) -> tuple[Path, AuditResult]:
    """The audit of `shared_configuration`: its folder, and what it found."""
    models = zoo(factory)

    def make(folder: Path) -> None:
        found = audit(shared_configuration(models), folder / "out", require=REQUIRED)
        (folder / "result.pickle").write_bytes(pickle.dumps(found))

    folder = once(factory, "audit-shared", make)
    return folder / "out", pickle.loads((folder / "result.pickle").read_bytes())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that are really run in this process, as they are begun."""
    seen: list[Job] = []
    real = work.run_job

    def run(bench: Any, known: Any, job: Job) -> Row:
        seen.append(job)
        return real(bench, known, job)

    monkeypatch.setattr(work, "run_job", run)
    return seen


def figures(result: AuditResult) -> dict[str, Any]:
    """The document without what differs from run to run: seconds, and where results lie."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: timeless(one) for name, one in value.items() if name not in ("seconds", "command")}
        return [timeless(one) for one in value] if isinstance(value, list) else value

    found: dict[str, Any] = timeless(json.loads(json.dumps(result.as_dict())))
    return found
