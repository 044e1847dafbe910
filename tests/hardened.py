"""Hardenings of the tiny zoo, whole and killed on the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import thief_cases
import unmergeable as um

PROTECTED, OWN = thief_cases.PROTECTED, thief_cases.OWN


def harden(models: Path, dst: Path, **changes: Any) -> Any:
    """The protected task's model hardened, on a CPU; `changes` are arguments of `um.harden`, or the `expert`."""
    given = {
        "base": models / "base", "data": models / f"{PROTECTED}-train.npz", "proxies": [models / OWN[0]],
        "rate": 2e-3, "device": "cpu", "objective": "trap",
    }  # fmt: skip
    expert = changes.pop("expert", models / PROTECTED)
    return um.harden(expert, dst, **(given | changes))


def killed(run: Callable[..., Any], at: int) -> None:
    """Run a hardening, given as a function of its `progress`, until it is killed after so many steps in all."""

    class Killed(BaseException):
        pass

    steps = itertools.count(1)

    def kill(done: int, total: int, label: str) -> None:
        if next(steps) == at:
            raise Killed

    with pytest.raises(Killed):
        run(progress=kill)
