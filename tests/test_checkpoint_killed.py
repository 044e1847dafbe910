"""SIGKILL before every operation, and at twenty random moments: the destination is absent or whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_files import folder


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("how", ["events", "times"])
def test_killed(tmp_path: Path, kind: str, how: str) -> None:
    src = folder(tmp_path / "src")
    if how == "times":  # long enough that random moments fall into the writing
        big = {f"t{i}": np.full((1 << 18,), i, np.float32) for i in range(12)}
        save_file(big, src / "model.safetensors", {"format": "pt"})
    # Killing does not lose what is in memory, so a file system in memory will do, and syncs at no cost.
    fast = Path("/dev/shm")
    quick = how == "events" and os.access(fast, os.W_OK)
    base = Path(tempfile.mkdtemp(dir=fast if quick else tmp_path))
    try:
        absent, whole = killed(src, base, kind, how)
    finally:
        shutil.rmtree(base)
    if how == "events":
        assert absent >= 20
        assert whole >= 4
    else:
        assert absent + whole == 20
        assert absent >= 3


def killed(src: Path, base: Path, kind: str, how: str) -> tuple[int, int]:
    """How many destinations were absent and whole."""
    script = Path(__file__).with_name("checkpoint_killed.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script, src, base, kind, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    absent, whole = map(int, done.stdout.split())
    return absent, whole
