"""Audits from configuration to result: what is kept and used again, rows that do not count, refusals."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import thief_cases
import unmergeable as um
from audit_cases import (
    QUICK,
    REQUIRED,
    SMALL,
    audit,
    configuration,
    equal,
    figures,
    shared_configuration,
)
from unmergeable.attacks import proof
from unmergeable.audit import work
from unmergeable.audit.jobs import Job
from unmergeable.audit.results import AuditResult
from unmergeable.audit.rows import SIDES, Row
from unmergeable.errors import InputError, RunError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")
PROTECTED, OWN = thief_cases.PROTECTED, thief_cases.OWN


# --- what is kept --------------------------------------------------------------------------------------------


def test_rows_are_found_once(
    shared: tuple[Path, AuditResult], models: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    """Another audit of the same models that shares the rows finds nothing again, and says the same."""
    fields = shared_configuration(models)
    told: list[tuple[int, int, str]] = []
    result = audit(
        fields, tmp_path / "out", cache=shared[0] / "cache", require=REQUIRED,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert jobs == []
    assert told == []
    assert figures(result) == figures(shared[1])
    assert sorted(os.listdir(tmp_path / "out")) == ["report.html", "results.json"]
    # Fewer attacks are a part of them; another seed is other work.
    audit(configuration(models, attacks=QUICK), tmp_path / "part", cache=shared[0] / "cache")
    assert jobs == []
    audit(
        configuration(models, attacks=["task_arithmetic"], seed=1),
        tmp_path / "seed",
        cache=tmp_path / "cache",
    )
    assert [job.label for job in jobs] == [f"task_arithmetic, {side}" for side in SIDES]


def test_the_same_models_on_two_sides_are_the_same_work(
    models: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    fields = configuration(models, PROTECTED, attacks=["task_arithmetic", "quantise-4"])
    result = audit(fields, tmp_path / "out")
    assert [job.label for job in jobs] == [
        "task_arithmetic, protected", "task_arithmetic, without", "probe, protected", "quantise-4 > probe, protected"
    ]  # fmt: skip
    rows = {(row.attack, row.side): row for row in result.rows}
    assert len(rows) == len(result.rows) == 7
    for name in ("task_arithmetic", "probe", "quantise-4 > probe"):
        assert equal(replace(rows[name, "protected"], side="plain"), rows[name, "plain"])
    assert [level.recovered for level in result.levels] == [1, 1]


def test_another_model_in_the_same_folder_is_another_audit(models: Path, tmp_path: Path) -> None:
    """The folder of results holds rows, and nothing that was made of the earlier model on the way."""
    first, second = (
        configuration(models, name, attacks=["align-permutation"]) for name in ("locked", "again")
    )
    audit(first, tmp_path / "out")
    reused, fresh = (audit(second, tmp_path / name) for name in ("out", "fresh"))
    assert figures(reused) == figures(fresh)
    assert {row.attack for row in fresh.rows} >= {"align-permutation > probe"}


def test_what_failed_or_was_refused_is_tried_again(
    models: Path, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of memory, or of a package: the next run may have them."""
    counted = work.run_job

    def short(bench: Any, reference: Any, job: Job) -> Row:
        row = counted(bench, reference, job)
        if job.side == "without":
            return row
        state: Any = "failed" if job.side == "protected" else "refused"
        return replace(row, state=state, reason="out of memory", points=())

    fields = configuration(models, attacks=["task_arithmetic"], levels=[0])
    monkeypatch.setattr(work, "run_job", short)
    first = audit(fields, tmp_path / "out")
    assert first.level(0).reason is not None
    monkeypatch.setattr(work, "run_job", counted)
    jobs.clear()
    second = audit(fields, tmp_path / "out")
    assert [job.label for job in jobs] == ["task_arithmetic, protected", "task_arithmetic, plain"]
    assert second.level(0).reason is None


def test_other_data_behind_a_function_are_other_work(
    models: Path, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function is the same, byte for byte: what it reads is not."""
    (tmp_path / "hook.py").write_text(
        "import json, pathlib\n"
        "SCALE = pathlib.Path(__file__).with_name('scale.json')\n"
        "def score(model, indices):\n"
        "    scale = json.loads(SCALE.read_text())\n"
        "    return [scale * float(model.vit.layernorm.bias.sum()) for _ in indices]\n"
    )
    biases = {name: float(module.vit.layernorm.bias.sum()) for name, module in thief_cases.trained().items()}
    sign = 1 if biases[OWN[1]] > biases["base"] else -1
    fields = configuration(models, attacks=["task_arithmetic"], levels=[0])
    fields["tasks"][OWN[1]] = {"kind": "python", "function": f"{tmp_path}/hook.py:score", "examples": 40}
    sides = len(SIDES)
    for scale, run in ((1, True), (1, False), (2, True), (1, False)):
        (tmp_path / "scale.json").write_text(str(sign * scale))
        jobs.clear()
        audit(fields, tmp_path / "out")
        assert len(jobs) == (sides if run else 0), scale


# --- rows that do not count ----------------------------------------------------------------------------------


def test_refused_and_unreliable_rows_are_in_the_results(models: Path, tmp_path: Path) -> None:
    fields = configuration(
        models,
        attacks=["task_arithmetic", "mergekit:passthrough", "regmean", "coefficients-model-labels"],
        levels=[0, 2, 3],
    )
    biases = {name: float(module.vit.layernorm.bias.sum()) for name, module in thief_cases.trained().items()}
    for task in OWN:
        sign = 1 if biases[task] > biases["base"] else -1
        (tmp_path / f"{task}.py").write_text(
            "def score(model, indices):\n"
            f"    return [{sign} * float(model.vit.layernorm.bias.sum()) for _ in indices]\n"
        )
        fields["tasks"][task] = {"kind": "python", "function": f"{tmp_path}/{task}.py:score", "examples": 40}
    result = audit(fields, tmp_path / "out", require={2: 0.0, 3: 0.0})
    rows = {(row.attack, row.side): row for row in result.rows}
    passed = rows["mergekit:passthrough", "protected"]
    assert passed.state == "unreliable"
    assert "copied from one input" in str(passed.reason)
    for name in ("regmean", "coefficients-model-labels"):
        assert rows[name, "protected"].state == "refused"
        assert "has no inputs to run its model on" in str(rows[name, "protected"].reason)
    assert result.level(0).reason is None
    assert str(result.level(2).reason).startswith(
        "every attack at level 2 is refused, and level 2 stands on it"
    )
    assert result.level(3).reason == result.level(2).reason
    assert not result.holds
    document = result.as_dict()
    assert "not judged" in document["levels"][1]["verdict"]
    assert [level["reliable"] for level in document["levels"]] == [True, False, False]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "copied from one input" in page
    assert "has no inputs to run its model on" in page


def test_an_alignment_that_undoes_no_known_lock_proves_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "attack_named", lambda name: thief_cases.Weak)
    result = audit(configuration(models, attacks=SMALL), tmp_path / "out", require={1: 0.0})
    rows = {(row.attack, row.side): row for row in result.rows}
    assert rows["anchor-coupled > proof", "plain"].state == "unreliable"
    assert rows["anchor-coupled > probe", "protected"].state == "unreliable"
    assert result.level(0).reason is None
    said = "anchor-coupled is unreliable, and level 1 stands on it: anchor-coupled: a known lock (gauge) is not undone"
    assert str(result.level(1).reason).startswith(said)
    assert not result.holds


def test_levels_above_0_need_attacks_of_their_own(models: Path, tmp_path: Path) -> None:
    """Whoever names attacks of level 0 alone has not asked what level 1 gives."""
    result = audit(configuration(models, attacks=["task_arithmetic"]), tmp_path / "out", require={1: 0.0})
    assert result.level(0).reason is None
    assert "an attack of its own was not run, and level 1 stands on it" in str(result.level(1).reason)
    assert not result.holds


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "workers: an audit needs a worker, expected 1 or more, got 0"),
        ({"budget": 0.0}, "budget: a budget of no time"),
        ({"budget": float("nan")}, "budget: a budget of no time"),
        ({"require": {2: 0.5}}, "require: a level that is not audited, got 2"),
        ({"require": {0: 90.0}}, "require 0: no part of full protection, expected 0 to 1, got 90.0"),
        ({"require": {0: float("nan")}}, "require 0: no part of full protection"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        audit(configuration(models), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_attacks_that_the_suite_does_not_have(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"attacks: the suite has no such attacks, .*got magic, tie"):
        audit(configuration(models, attacks=["ties", "magic", "tie"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder(models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for options in ({"output": tmp_path / "file"}, {"output": tmp_path / "out", "cache": tmp_path / "file"}):
        with pytest.raises(InputError, match="file: the folder cannot be made"):
            audit(configuration(models), **options)  # type: ignore[arg-type]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fails_leaves_no_half_results(
    models: Path, tmp_path: Path, shared: tuple[Path, AuditResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("earlier")

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"results\.json: no space left"):
        audit(configuration(models, attacks=QUICK), tmp_path / "out", cache=shared[0] / "cache")
    assert (tmp_path / "out" / "results.json").read_text() == "earlier"


def test_from_python(models: Path, tmp_path: Path, shared: tuple[Path, AuditResult]) -> None:
    result = um.audit(
        configuration(models, attacks=QUICK),
        tmp_path / "out",
        workers=1,
        require={0: 0.0},
        cache=shared[0] / "cache",
    )
    assert isinstance(result, AuditResult)
    assert result.holds
    assert 0 <= result.level(0).recovered < 1
    assert result.config["attacks"] == list(QUICK)
