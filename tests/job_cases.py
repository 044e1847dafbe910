"""Waves of an audit without models, each job done by a function that makes its row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from audit_cases import reference, row
from unmergeable.attacks.prepare import PREPARATIONS
from unmergeable.audit.jobs import Job, Waves
from unmergeable.audit.rows import Row

Rows = Callable[[Job], Row]
SOLVED = [one.name for one in PREPARATIONS if one.solves]


def nothing(job: Job) -> Row:
    """A row that found nothing."""
    return row(job.attack, job.side, prepared=job.prepared, state="refused")


def helped(gains: Mapping[str, float], side: str = "protected") -> Rows:
    """Rows in which a prepared model is worth more by so much, on one side."""

    def found(job: Job) -> Row:
        value = gains.get(job.prepared or "", 0.0) if job.side == side else 0.0
        return row(job.attack, job.side, (0.1 + value, 0.9), prepared=job.prepared)

    return found


def run(waves: Waves, rows: Rows = nothing) -> list[list[Job]]:
    """The jobs of every wave, each done by `rows`."""
    found: dict[Job, Row] = {}
    done = []
    for wave in waves:
        jobs = [job for job in wave(found) if job not in found]
        found |= {job: rows(job) for job in jobs}
        done.append(jobs)
    return done


def waves(top: int = 3, only: Any = None, releases: bool = False) -> Waves:
    return Waves(top, only, releases, reference())
