"""`lock` under way: a full disk, a kill, a worker's error, and memory that is bounded."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import toy
from toy import locked, nothing_at
from unmergeable.engine import Gate
from unmergeable.errors import RunError
from unmergeable.lock import lock

_CHILD = """
import sys, resource
sys.path.insert(0, {tests!r})
import toy
from unmergeable.lock import lock
limit = int(sys.argv[3])
if limit:
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
lock(sys.argv[1], sys.argv[2], key=toy.key(), spec=toy.spec(), jobs=2, salt=bytes(32))
"""


@pytest.fixture
def src(tmp_path):
    return toy.write(tmp_path / "src", toy.tensors(), shards=3)


def child(src: Path, dst: Path, limit: int = 0) -> subprocess.Popen[str]:
    code = _CHILD.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(src), str(dst), str(limit)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_disk_is_full(src, tmp_path):
    with child(src, tmp_path / "dst", limit=9000) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode
    assert "no space left" in errors
    assert nothing_at(tmp_path / "dst")


def test_killed_at_random_moments(tmp_path):
    src = toy.write(tmp_path / "src", toy.tensors(), shards=7)
    whole = tmp_path / "whole"
    with child(src, whole) as process:
        assert process.stdout is not None
        process.stdout.readline()
        ready = time.monotonic()
        assert process.wait(timeout=60) == 0
        length = time.monotonic() - ready
    want, dst = toy.tree(whole), tmp_path / "dst"
    rng = np.random.default_rng(0)
    seen = set()
    for moment in (np.arange(20) + rng.random(20)) / 20:
        with child(src, dst) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(float(moment) * length)
            process.send_signal(signal.SIGKILL)
        seen.add(dst.exists())
        if dst.exists():
            assert toy.tree(dst) == want
            shutil.rmtree(dst)
    lock(src, dst, key=toy.key(), spec=toy.spec(), salt=bytes(32))  # sweeps what the killed ones left
    assert toy.tree(dst) == want
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert False in seen


def test_an_error_in_one_worker_stops_all(src, tmp_path, monkeypatch):
    from unmergeable.checkpoint import Checkpoint

    def broken(self, name, *rest):
        if name == "l.1.down":
            raise RunError("the cable fell out")
        return original(self, name, *rest)

    original = Checkpoint.read_rows
    monkeypatch.setattr(Checkpoint, "read_rows", broken)
    original_read = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint,
        "read",
        lambda self, name: broken(self, name) if name == "l.1.down" else original_read(self, name),
    )
    with pytest.raises(RunError, match="cable"):
        locked(src, tmp_path / "dst", jobs=3)
    assert nothing_at(tmp_path / "dst")


def test_the_gate_bounds_memory():
    from concurrent.futures import ThreadPoolExecutor

    gate, used, peak = Gate(10), [0], [0]

    def work(need: int) -> None:
        with gate.room(need):
            used[0] += need
            peak[0] = max(peak[0], used[0])
            time.sleep(0.002)
            used[0] -= need

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [3, 4, 5, 6, 25, 1, 2, 9] * 4))
    assert peak[0] <= 25


def test_memory_is_bounded(tmp_path):
    """What is only copied takes no memory: the largest tensor is never there as a whole."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import toy\n"
        "from unmergeable.lock import lock\n"
        "lock(sys.argv[1], sys.argv[2], key=toy.key(), spec=toy.spec())\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    peaks = []
    for rows in (40, 480_000):  # of 128 numbers in two bytes: 123 MB
        values = {**toy.tensors(), "embed": np.zeros((rows, 128))}
        src = toy.write(tmp_path / f"src{rows}", values)
        command = [sys.executable, "-c", code, str(src), str(tmp_path / f"dst{rows}")]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True).stdout) / 1000)
    assert peaks[1] < peaks[0] + 20
