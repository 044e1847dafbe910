"""Jobs that wait for others, in processes of their own."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from unmergeable.audit.work import one_thread


@dataclass(frozen=True)
class Job:
    """A function of this folder's modules with its arguments; begun when the jobs of these names are done."""

    name: str
    call: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()


def run(
    jobs: Sequence[Job], workers: int, minutes: float | None = None, known: Collection[str] = ()
) -> Iterator[tuple[Job, Any]]:
    """What jobs return, as they are done; an exception is returned as its text. In order, as far as they can.

    Nothing is begun after so many minutes. `known` are names of jobs that were done before.
    """
    until = None if minutes is None else time.monotonic() + 60 * minutes
    done = set(known)
    waiting = [job for job in jobs if job.name not in done]
    running: dict[Future[Any], Job] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            ready = [job for job in waiting if set(job.after) <= done]
            while ready and len(running) < workers and (until is None or time.monotonic() < until):
                job = ready.pop(0)
                waiting.remove(job)
                running[pool.submit(_safe, job)] = job
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                found, failed = future.result()
                if not failed:
                    done.add(job.name)
                yield job, found


def _safe(job: Job) -> tuple[Any, bool]:
    try:
        with one_thread():
            return job.call(**job.arguments), False
    except Exception:  # whatever goes wrong in a job is what is said of it; the others go on
        return traceback.format_exc()[-2000:], True
