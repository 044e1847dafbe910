"""Workers of an audit: how jobs are handed out, what a death means, and that figures do not depend on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import yaml

import thief_cases
from audit_cases import (
    QUICK,
    REQUIRED,
    audit,
    configuration,
    figures,
    shared_configuration,
)
from unmergeable.audit import work
from unmergeable.audit.jobs import Job
from unmergeable.audit.results import AuditResult
from unmergeable.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore")
PROTECTED, OWN = thief_cases.PROTECTED, thief_cases.OWN


def pool(monkeypatch: pytest.MonkeyPatch, run: Callable[[Job], Any], workers: int = 2) -> work.Pool:
    """A pool whose workers are threads that do this with a job: how jobs are handed out is the same."""
    monkeypatch.setattr(work, "_run", run)
    made = work.Pool(None, Path(), None, 1, None)  # type: ignore[arg-type]
    made.workers, made._executor = workers, ThreadPoolExecutor(workers)  # type: ignore[assignment]
    return made


JOBS = [Job("ties", "plain", f"step {number}") for number in range(7)]


def test_jobs_are_handed_out_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = set(), []

    def run(job: Job) -> str:
        running.add(job)
        most.append(len(running))
        time.sleep(0.01)
        running.discard(job)
        return f"row of {job.label}"

    with pool(monkeypatch, run) as spread:
        found = dict(spread.run(JOBS, None))
    assert found == {job: f"row of {job.label}" for job in JOBS}
    assert max(most) == 2


def test_what_is_not_begun_in_time_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Job] = []

    class Clock:
        """A second for every job."""

        @staticmethod
        def monotonic() -> float:
            return float(len(begun))

    def run(job: Job) -> str:
        begun.append(job)
        return "row"

    monkeypatch.setattr(work, "time", Clock)
    with pool(monkeypatch, run, 1) as spread:
        found = list(spread.run(JOBS, 2.5))
        assert begun == JOBS[:3]
        assert found == [*((job, "row") for job in JOBS[:3]), *((job, None) for job in JOBS[3:])]
        # Nothing is begun afterwards either.
        assert dict(spread.run(JOBS[:2], 2.5)) == dict.fromkeys(JOBS[:2])
        assert dict(spread.run(JOBS[:2], None)) == dict.fromkeys(JOBS[:2], "row")


@pytest.mark.parametrize("late", [False, True])
def test_a_broken_pool_is_told(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may die while it runs a job, or between two jobs, when no more can be handed out."""

    def run(job: Job) -> str:
        if not late and job is JOBS[2]:
            raise BrokenProcessPool
        return "row"

    with pool(monkeypatch, run, 1) as spread:
        submit = spread._executor.submit  # type: ignore[union-attr]

        def submitted(function: Any, job: Job) -> Any:
            if late and job is JOBS[2]:
                raise BrokenProcessPool
            return submit(function, job)

        monkeypatch.setattr(spread._executor, "submit", submitted)
        seen = []
        rows = spread.run(JOBS, None)
        for _ in range(2):
            seen.append(next(rows)[0])
        with pytest.raises(RunError, match="a worker died"):
            next(rows)
        assert seen == JOBS[:2]  # rows until then are kept


def test_only_its_own_workers_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Child:
        ended = 0

        def terminate(self) -> None:
            self.ended += 1

    stranger, own = Child(), Child()
    children = [stranger]
    monkeypatch.setattr(work.multiprocessing, "active_children", lambda: children)
    spread = pool(monkeypatch, lambda job: "row")
    children.append(own)
    spread.__exit__(KeyboardInterrupt)
    assert (stranger.ended, own.ended) == (0, 1)


@pytest.mark.slow
def test_workers_do_not_change_figures(
    shared: tuple[Path, AuditResult], models: Path, tmp_path: Path
) -> None:
    fields = shared_configuration(models)
    result = audit(fields, tmp_path / "out", workers=2, require=REQUIRED)
    assert figures(result) == figures(shared[1])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_audit_that_was_killed_goes_on(
    workers: int, shared: tuple[Path, AuditResult], models: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    fields = shared_configuration(models)
    (tmp_path / "audit.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    command = [sys.executable, "-m", "unmergeable", "audit", "audit.yaml", "-o", "out", "-w", str(workers)]
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    cache = tmp_path / "out" / "cache"
    deadline = time.monotonic() + 300
    while len(list(cache.glob("*.npz"))) < 5 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    # Without their parent workers end by themselves.
    while time.monotonic() < deadline and _session(running.pid):
        time.sleep(0.1)
    assert not _session(running.pid)
    assert not (tmp_path / "out" / "results.json").exists()
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*.npz")}
    assert len(before) >= 5
    result = audit(tmp_path / "audit.yaml", tmp_path / "out", require=REQUIRED)
    assert len(jobs) == len(shared[1].rows) - len(before)
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    found, expected = figures(result), figures(shared[1])
    assert found == expected


def _session(leader: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_audit(models: Path, tmp_path: Path) -> None:
    """As the system ends one that takes too much memory."""
    (tmp_path / "hook.py").write_text(
        "import multiprocessing, os, pathlib\n"
        "def score(model, indices):\n"
        "    if multiprocessing.parent_process() is not None:\n"
        "        os._exit(9)\n"
        "    return [float(model.vit.layernorm.bias.sum()) for _ in indices]\n"
    )
    fields = configuration(models, attacks=QUICK)
    hook = {"kind": "python", "function": f"{tmp_path}/hook.py:score", "examples": 40}
    fields["tasks"][OWN[1]] = hook
    biases = {name: float(module.vit.layernorm.bias.sum()) for name, module in thief_cases.trained().items()}
    assert biases[OWN[1]] != biases["base"]
    if biases[OWN[1]] < biases["base"]:
        path = tmp_path / "hook.py"
        path.write_text(path.read_text().replace("[float(", "[-float("))
    with pytest.raises(RunError, match="a worker died"):
        audit(fields, tmp_path / "out", workers=2)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_an_odd_error_in_a_worker_costs_its_row(models: Path, tmp_path: Path) -> None:
    """A bug of ours or of a package, of a kind that cannot even be sent home."""
    (tmp_path / "hook.py").write_text(
        "import multiprocessing\n"
        "from unmergeable.attacks.merges import Coefficients\n"
        "class OddError(Exception):\n"
        "    def __init__(self):\n"
        "        super().__init__('a bug', lambda: None)\n"
        "def explore(self, thief, look, real=Coefficients.explore):\n"
        "    if self.name == 'task_arithmetic' and thief.has:\n"
        "        raise OddError\n"
        "    real(self, thief, look)\n"
        "if multiprocessing.parent_process() is not None:\n"
        "    Coefficients.explore = explore\n"
        "def score(model, indices):\n"
        "    return [float(model.vit.layernorm.bias.sum()) for _ in indices]\n"
    )
    fields = configuration(models, attacks=QUICK, levels=[0])
    fields["tasks"][OWN[1]] = {"kind": "python", "function": f"{tmp_path}/hook.py:score", "examples": 40}
    biases = {name: float(module.vit.layernorm.bias.sum()) for name, module in thief_cases.trained().items()}
    if biases[OWN[1]] < biases["base"]:
        path = tmp_path / "hook.py"
        path.write_text(path.read_text().replace("[float(", "[-float("))
    result = audit(fields, tmp_path / "out", workers=2)
    rows = {(row.attack, row.side): row for row in result.rows}
    for side in ("protected", "plain"):
        odd = rows["task_arithmetic", side]
        assert (odd.state, odd.errored) == ("failed", True)
        assert str(odd.reason).startswith("OddError: ('a bug'")
        assert rows["full_dose", side].state == "done"
    assert rows["task_arithmetic", "without"].state == "done"


@pytest.mark.slow
def test_a_script_without_its_guard_is_told(models: Path, tmp_path: Path) -> None:
    """Workers import the script that started them."""
    fields = configuration(models, attacks=QUICK)
    (tmp_path / "audit.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    call = "unmergeable.audit('audit.yaml', 'out', workers=2)\n"
    (tmp_path / "bare.py").write_text(f"import unmergeable\n{call}")
    (tmp_path / "guarded.py").write_text(f"import unmergeable\nif __name__ == '__main__':\n    {call}")
    bare, guarded = (
        subprocess.run(
            [sys.executable, name], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        for name in ("bare.py", "guarded.py")
    )  # fmt: skip
    assert bare.returncode != 0
    assert "an audit was begun by the import of a script" in bare.stderr
    assert "a worker died" in bare.stderr
    assert guarded.returncode == 0, guarded.stderr
    assert (tmp_path / "out" / "report.html").exists()
