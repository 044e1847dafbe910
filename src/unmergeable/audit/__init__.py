"""Audit: the honest judge. Merges and attacks a protected model as thieves would, and reports what each gets.

    audit("audit.yaml", "results", workers=2)

Data flows one way: configuration -> bench (models and tasks in memory) -> jobs -> rows -> scores -> results.json
and report.html. A row is one attack on one side; rows are kept by the hash of all that they depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from .results import AuditResult

__all__ = ["audit"]

Progress = Callable[[int, int, str], None]


def audit(
    config: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str],
    *,
    workers: int | None = None,
    budget: float | None = None,
    require: Mapping[int, float] | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Merge and attack a protected model as thieves would, and write report.html and results.json.

    Args:
        config: a YAML file, or what it holds; paths are relative to its folder, or to the working one.
        output: the folder for results; what an earlier run found there is used again.
        workers: processes; one a core if not given, as memory allows, and one for a GPU. Figures do not depend
            on it. Workers import the script that started them: it calls this under `if __name__ == "__main__":`.
        budget: minutes; what does not fit is left out, the least informative first, and said.
        require: by level, the least protection that is asked for.
        cache: a folder of rows that audits share; `output`/cache if not given.
        progress: called with rows done, rows in all (about), and what comes next.

    Raises:
        UsageError: options that make no sense.
        InputError: a configuration, model or task that cannot be used. Nothing is written then.
        RunError: not enough memory, or a worker died. Rows found so far are kept.
    """
    from .run import run_audit

    return run_audit(
        config, output, workers=workers, budget=budget, require=require, cache=cache, progress=progress
    )
