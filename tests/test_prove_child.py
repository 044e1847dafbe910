"""The process of a proof: it is fp64 alone, forked or fresh, and whatever it dies of is an error of ours."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from unmergeable.errors import RunError
from unmergeable.prove.child import in_child


@pytest.fixture(scope="module", autouse=True)
def _imports():
    """Import once, here, what a child imports, so that every fork finds it; nothing computes in this process."""
    for name in ("torch", "transformers", "safetensors.torch"):
        importlib.import_module(name)


# ---- what runs in the child


def _sleep(seconds):
    time.sleep(seconds)


def _crash():
    os.kill(os.getpid(), signal.SIGKILL)


def _raise_key_error():
    raise KeyError("lost")


def _allocate(size):
    return int(np.ones(size, dtype=np.uint8).sum())


def _multiply(size):
    import torch

    matrix = torch.ones(size, size)
    return str(matrix.dtype), str(torch.arange(3).float().dtype), float((matrix @ matrix)[0, 0])


# ---- the child process


def test_the_child_is_fp64_and_the_parent_is_not():
    torch = importlib.import_module("torch")
    assert in_child(_multiply, 4) == ("torch.float64", "torch.float64", 4.0)
    assert torch.float32 is not torch.float64


def test_a_parent_that_has_used_its_threads_does_not_hang_the_child():
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import torch, test_prove_child as t\n"
        "from unmergeable.prove.child import in_child\n"
        "torch.set_num_threads(2); a = torch.rand(2000, 2000); a @ a; (a + a).exp().sum()\n"
        "print(in_child(t._multiply, 1500, start='fork', timeout=60)[2])"
    )
    environment = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "1500.0", done.stderr


def test_a_fresh_interpreter_works_too():
    assert in_child(_multiply, 4, start="fresh")[0] == "torch.float64"


@pytest.mark.parametrize(
    ("function", "args", "options", "message"),
    [
        (_sleep, (60,), {"timeout": 1.5}, "took too long"),
        (_crash, (), {}, "died without an answer"),
        (_raise_key_error, (), {}, "KeyError"),
        (_allocate, (3 << 30,), {"memory": 1 << 30}, "Memory"),
    ],
)
def test_a_failing_child_is_an_error_of_ours(function, args, options, message):
    started = time.monotonic()
    with pytest.raises(RunError, match=message):
        in_child(function, *args, **options)
    assert time.monotonic() - started < 20
