"""Workers: each has a bench of its own and one thread, so that figures do not depend on how many there are."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..attacks.prepare import OTHER, preparation
from ..attacks.proof import prove
from ..attacks.thief import detached
from ..errors import RunError
from ..merging import Merged
from .bench import Bench
from .config import Config, make_config
from .explore import explore, failed
from .jobs import PROOF, Job, Start
from .rows import Cost, Row, State
from .scores import Reference
from .suite import merge_attack


def run_job(bench: Bench, reference: Reference, job: Job) -> Row:
    """Find one row."""
    if job.attack == PROOF:
        return _proof(bench, job)
    return explore(
        bench,
        reference,
        merge_attack(job.attack),
        job.side,
        prepared=job.prepared,
        starts=lambda: [(start.as_dict(), _made(bench, job, start)) for start in job.starts],
    )


def _made(bench: Bench, job: Job, start: Start) -> Merged:
    thief = bench.thief(job.side, start.prepared)
    merged = merge_attack(start.attack).make(thief, json.loads(start.options))
    assert isinstance(merged, Merged)
    return detached(merged)


def _proof(bench: Bench, job: Job) -> Row:
    """A preparation on its known case, as a row without merges."""
    began = time.monotonic()
    assert job.prepared is not None
    chosen = preparation(job.prepared)
    anchor = bench.paths["base" if chosen.anchor != OTHER else bench.others[0]]
    facts: Mapping[str, Any] = {}
    state: State = "done"
    reason: str | None = None
    try:
        solved = prove(chosen, bench.paths["plain"], anchor, bench.seed)
        facts, reason = solved.as_dict(), solved.reason
        state = "done" if solved.holds else "unreliable"
    except Exception as error:
        state, reason = failed(error)
    return Row(
        (job.prepared, PROOF),
        "plain",
        1,
        chosen.about,
        chosen.needs,
        cost=Cost(seconds=time.monotonic() - began),
        state=state,
        reason=reason,
        seed=bench.seed,
        facts=facts,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of arithmetic: sums come out in one order, whatever the number of workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Pool:
    """Runs jobs, in this process or in several.

    Args:
        config: of the audit. work: as for `Bench`. reference: what values are relative to.
        workers: processes; 1 is this one, with `bench`.
    """

    def __init__(self, config: Config, work: Path, reference: Reference, workers: int, bench: Bench) -> None:
        self.workers, self.bench, self.reference = workers, bench, reference
        self._executor: ProcessPoolExecutor | None = None
        self._strangers = set(multiprocessing.active_children())
        if workers > 1:
            fields = config.fields.model_dump(exclude_none=True)
            self._executor = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(fields, config.folder, config.where, work, reference),
            )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            if error[0] is not None:
                for child in set(multiprocessing.active_children()) - self._strangers:
                    child.terminate()

    def run(self, jobs: Iterable[Job], until: float | None) -> Iterator[tuple[Job, Row | None]]:
        """Rows as they are found; None for a job that was not begun before the deadline.

        Raises:
            RunError: a worker died.
        """
        if self._executor is None:
            for job in jobs:
                late = until is not None and time.monotonic() > until
                yield job, None if late else run_job(self.bench, self.reference, job)
            return
        try:
            yield from self._spread(self._executor, iter(jobs), until)
        except BrokenProcessPool:
            hint = "what it said stands above; if nothing, it may be out of memory: give fewer --workers"
            raise RunError("a worker died", hint=hint) from None

    def _spread(
        self, executor: ProcessPoolExecutor, waiting: Iterator[Job], until: float | None
    ) -> Iterator[tuple[Job, Row | None]]:
        running: dict[Future[Row], Job] = {}
        while True:
            # Jobs are handed out one by one: what is not begun at the deadline never is.
            for job in waiting:
                if until is not None and time.monotonic() > until:
                    yield job, None
                    continue
                running[executor.submit(_run, job)] = job
                if len(running) >= self.workers:
                    break
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()


_BENCH: Bench
_REFERENCE: Reference


def _begin(
    fields: dict[str, Any], folder: Path, where: Path, work: Path, reference: Reference
) -> None:  # pragma: no cover - in a process of its own
    """Make this worker's bench. An interrupt is the parent's to handle; without a parent there is no work."""
    global _BENCH, _REFERENCE
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    _BENCH, _REFERENCE = Bench(make_config(fields, folder, where), work), reference


def _follow_parent() -> None:  # pragma: no cover - in a process of its own
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(job: Job) -> Row:  # pragma: no cover - in a process of its own
    return run_job(_BENCH, _REFERENCE, job)
