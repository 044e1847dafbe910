"""The demo's audit: a small one, of the two attacks that say most, with its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import zoo

if TYPE_CHECKING:
    from .audit.results import AuditResult

LIMIT = 200  # images a task
ATTACKS = ("full_dose", "anchor-coupled")


def audited(locked: Path, tasks: Sequence[str], output: Path, work: Path) -> AuditResult:
    """Audit a lock of the first task against thieves who hold the fine-tunes of the others.

    Args:
        locked: the protected model.
        tasks: the protected one first.
        output: folder for report.html and results.json.
        work: folder for everything else.
    """
    from .audit import audit

    fields = {}
    for task in tasks:
        images, labels = zoo.images(task)
        np.savez(work / f"{task}.npz", images=images[:LIMIT], labels=labels[:LIMIT])
        fields[task] = {
            "kind": "image-classification", "data": str(work / f"{task}.npz"), "mean": 0.5, "std": 0.5
        }  # fmt: skip
    protected, *own = tasks
    config = {
        "version": 1,
        "base": str(zoo.model_path(zoo.BASE)),
        "protected": {"model": str(locked), "plain": str(zoo.model_path(protected)), "task": protected},
        "others": {task: str(zoo.model_path(task)) for task in own},
        "tasks": fields,
        "levels": [0, 1],
        "attacks": list(ATTACKS),
        "device": "cpu",
    }
    return audit(config, output, workers=1, cache=work / "cache")
