"""An audit from its configuration to its result: what thieves get from a protected model, and at what cost."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..attacks.prepare import COLLUSIONS, one_by_one
from ..checkpoint import replacing
from ..errors import InputError, UsageError
from ..stock import memory
from .bench import Bench, pick_workers
from .config import RELEASE, make_config, read_config
from .control import controlled, doubt, full_dose_grid, grounds, required, untried
from .costs import in_full
from .jobs import Job, Waves
from .known import Known, prepare
from .results import AuditResult
from .rows import Row
from .scores import curve, judge
from .store import Store, row_key
from .suite import SUITE
from .work import Pool, one_thread

Progress = Callable[[int, int, str], None]
# What helps where a device is full: what models take beside their weights is not estimated.
FULL = "give fewer --workers, a smaller `batch:` to the tasks, or audit on a larger device"


def run_audit(
    config: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str],
    *,
    workers: int | None,
    budget: float | None,
    require: Mapping[int, float] | None,
    cache: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> AuditResult:
    """As `audit.audit`."""
    from .report import render  # before any work: what it needs may not be installed

    started = time.monotonic()
    _check_usage(workers, budget, require or {})
    chosen = (
        make_config(dict(config), Path(), Path("config"))
        if isinstance(config, Mapping)
        else read_config(config)
    )
    for level in require or {}:
        if level not in chosen.levels:
            raise UsageError("a level that is not audited", where="require", got=level)
    workers = pick_workers(chosen, workers)
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("the folder cannot be made", where=folder, got=error.strerror) from None
    store = Store(Path(cache) if cache is not None else folder / "cache")
    until = None if budget is None else started + 60 * budget
    # What is made of models on the way is this run's alone: another one may hold other models of these names.
    with (
        one_thread(),
        memory(chosen.fields.device, "this audit", FULL),
        tempfile.TemporaryDirectory(prefix="unmergeable-audit-") as work,
    ):
        bench = Bench(chosen, Path(work))
        known = prepare(bench)
        waves = Waves(
            chosen.top, chosen.fields.attacks, bool(chosen.fields.protected.releases), known.reference
        )
        with Pool(chosen, Path(work), known.reference, workers, bench) as pool:
            found, left_out = _run(pool, store, waves, known, until, progress)
    rows = in_full(controlled(list(found.values()), known.reference))
    if isinstance(config, Mapping):
        more = {"require": dict(require) if require else None, "budget": budget}
        given = "".join(f", {name}={value!r}" for name, value in more.items() if value is not None)
        again = f"unmergeable.audit(config, {str(folder)!r}{given})"
    else:
        again = f"unmergeable audit {shlex.quote(str(config))} -o {shlex.quote(str(folder))}"
        again += "".join(f" --require {level}={value:g}" for level, value in (require or {}).items())
        again += "" if budget is None else f" --budget {budget:g}"
    result = _result(known, rows, left_out, require or {}, time.monotonic() - started, again, folder)
    document = result.as_dict()
    results = json.dumps(document, indent=1, allow_nan=False) + "\n"
    for name, text in (("results.json", results), ("report.html", render(document))):
        with replacing(folder / name) as file:
            file.write(text.encode())
    return result


def _check_usage(workers: int | None, budget: float | None, require: Mapping[int, float]) -> None:
    if workers is not None and workers < 1:
        raise UsageError("an audit needs a worker", where="workers", expected="1 or more", got=workers)
    if workers != 1 and getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker imports the script that started it, and got here: it would start workers of its own.
        hint = "put the script's call of audit() under: if __name__ == '__main__'"
        raise UsageError("an audit was begun by the import of a script", where="workers", hint=hint)
    if budget is not None and not budget > 0:
        raise UsageError("a budget of no time", where="budget", expected="minutes above 0", got=budget)
    for level, protection in require.items():
        if not 0 <= protection <= 1:
            raise UsageError(
                "no part of full protection", where=f"require {level}", expected="0 to 1", got=protection
            )


# --- attacks ------------------------------------------------------------------------------------------------


def _run(
    pool: Pool,
    store: Store,
    waves: Waves,
    known: Known,
    until: float | None,
    progress: Progress | None,
) -> tuple[dict[Job, Row], list[Job]]:
    """All waves; rows that are known already are not found again."""
    found: dict[Job, Row] = {}
    left_out: list[Job] = []
    total = waves.estimate()

    def pursue(jobs: Sequence[Job], until: float | None) -> list[Job]:
        """Find the rows of jobs, and say which were not begun in time."""
        nonlocal found, total
        jobs = [job for job in jobs if job not in found]
        # The same models on two sides are the same work: an audit of what is not protected costs one side.
        same: dict[str, list[Job]] = {}
        for job in jobs:
            same.setdefault(row_key(_depends(known, job)), []).append(job)
        fresh: dict[Job, str] = {}
        for key, alike in same.items():
            row = store.get(key)
            if row is None:
                fresh[alike[0]] = key
            else:
                found |= {job: replace(row, side=job.side) for job in alike}
        total = max(total, len(found) + len(jobs))
        late: list[Job] = []
        for job, row in pool.run(fresh, until):
            alike = same[fresh[job]]
            if row is None:
                late += alike
                continue
            found |= {one: replace(row, side=one.side) for one in alike}
            # What failed, for want of memory perhaps, or was refused, for want of a package, may work next time.
            if row.state in ("done", "unreliable"):
                store.put(fresh[job], row)
            if progress is not None:
                progress(len(found) + len(left_out), total, job.label)
        # The order of rows is that of jobs, not that in which workers were done.
        new = set(jobs)
        found = {job: found[job] for job in [*(j for j in found if j not in new), *jobs] if job in found}
        return late

    for wave in waves:
        end = until
        if until is not None:
            now = time.monotonic()
            end = min(until, now + waves.share(wave) * (until - now))
        left_out += pursue(wave(found), end)
    if left_out:
        pursue(left_out, until)  # what a wave's share of the time was too short for
        for wave in (waves.follow, waves.matched):
            left_out += pursue(wave(found), until)
    return found, [job for job in dict.fromkeys(left_out) if job not in found]


def _depends(known: Known, job: Job) -> dict[str, Any]:
    """Everything that a row depends on: the side says only which models are held."""
    fields = known.config.fields
    held = {"protected": ["protected"], "plain": ["plain"], "without": []}[job.side]
    prepared = [job.prepared, *(start.prepared for start in job.starts)]
    colluding = {name for names in prepared for name in one_by_one(names)} & set(COLLUSIONS)
    releases = [role for role in known.hashes if role.startswith(RELEASE)] if colluding else []
    return {
        "tool": __version__,
        "suite": SUITE,
        "job": {name: value for name, value in job.as_dict().items() if name != "side"},
        "base": known.hashes["base"],
        "held": [known.hashes[role] for role in held + releases],
        # In their order: the first one is what some attacks align to.
        "others": [[task, known.hashes[task]] for task in fields.others],
        "plain": known.hashes["plain"],  # values are relative to it
        "answers": [known.answers.get(role) for role in ("base", "plain", *held)],
        "tasks": {name: [task["sha256"], known.settings[name]] for name, task in known.tasks.items()},
        "protected": fields.protected.task,
        "private": fields.private,
        "seed": fields.seed,
        "machine": {
            name: known.machine.get(name) for name in ("device", "torch", "transformers", "mergekit")
        },
    }


# --- the result ---------------------------------------------------------------------------------------------


def _result(
    known: Known,
    rows: list[Row],
    left_out: Sequence[Job],
    require: Mapping[int, float],
    seconds: float,
    command: str,
    folder: Path,
) -> AuditResult:
    config, reference = known.config, known.reference
    seed = config.fields.seed
    levels = []
    for level in config.levels:
        judged = judge(rows, reference, level, seed=seed)
        reason = judged.reason or doubt(rows, level, config.fields.attacks)
        levels.append(replace(judged, reason=reason, stands_on=grounds(rows, reference, level)))
    notes = list(known.notes)
    if config.fields.attacks is not None:
        notes.append("only a part of the suite was run: the figures are those of the attacks that were named")
    if left_out:
        notes.append(f"the budget ended before {len(left_out)} of the rows were found: they are listed")
        notes += [
            f"what is required at level {level} does not hold as long as {count} attacks of that level are left out"
            for level in require
            if (count := untried(left_out, level))
        ]
    return AuditResult(
        suite=SUITE,
        seed=seed,
        levels=tuple(levels),
        rows=tuple(rows),
        reference=reference,
        config=config.fields.model_dump(mode="json", exclude_none=True),
        machine=known.machine,
        models=known.models,
        tasks=known.tasks,
        standalone=known.standalone,
        curve={
            side: curve(rows, reference, side, unproven=levels[-1].unproven) for side in ("protected", "plain")
        },
        grid=full_dose_grid(rows),
        left_out=[
            {"attack": job.label.rpartition(", ")[0], "level": job.level, "side": job.side,
             "reason": "the budget ended before it"}
            for job in left_out
        ],
        notes=notes,
        requirements=[required(levels, level, value, left_out) for level, value in require.items()],
        command=command,
        seconds=seconds,
        files=(str(folder / "report.html"), str(folder / "results.json")),
    )  # fmt: skip
