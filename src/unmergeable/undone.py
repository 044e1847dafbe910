"""With the key: the manifest's signature, and the lock undone in memory and compared with the source."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

from .certificate import Check
from .checkpoint import to_float64
from .engine import HALF_STEP, HALF_ULP, MEMORY, Gate, Job, Meter
from .errors import InputError
from .execute import compile_chain, run
from .keys import Key
from .likeness import labelled
from .manifest import Manifest
from .plan import Member, Opened
from .transform import Array
from .unlock import prepare_unlock

FACTOR = 4.0


@dataclass(frozen=True)
class _Result:
    """One tensor of the source against the undone lock: relative error, and whether every bit came back."""

    place: str
    identical: bool
    computed: bool  # whether undoing it needs arithmetic that rounds
    measured: float
    bound: float

    @property
    def held(self) -> bool:
        return self.identical or (self.computed and self.measured <= self.bound)


def check_undone(
    before: Opened, after: Opened, manifest: Manifest, key: Key, jobs: int, meter: Meter
) -> list[Check]:
    """Check the signature, then every tensor: bit for bit, or within the rounding of a dense method.

    Raises:
        RunError: reading failed.
    """
    if not manifest.mac or not key.check_mac(manifest.salt, manifest.payload(), manifest.mac):
        detail = "the manifest was altered after locking, or is not signed"
        place = str(after.manifest_path)
        unchecked = Check("unlock", None, detail="the manifest cannot be trusted")
        return [Check("signature", False, detail=detail, place=place), unchecked]
    signature = Check("signature", True, detail=f"HMAC of {key.id} over the manifest")
    try:
        prepare_unlock(after, key)
    except InputError as error:  # the claim that it can be unlocked fails
        return [signature, Check("unlock", False, detail=str(error).partition("\n")[0], place=error.where)]
    condition = float(manifest.options.get("condition", 1.0))
    gate = Gate(MEMORY)
    results: list[_Result] = []
    sources = {member.name: member for member in before.members}
    with ThreadPoolExecutor(jobs) as pool:
        tasks = [
            pool.submit(_undo, sources[member.name], member, job, condition, gate, meter)
            for member in after.members
            if not member.passed
            for job in member.jobs(undo=True)
        ]
        try:
            results = [task.result() for task in tasks]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [signature, _summary(results)]


def _summary(results: list[_Result]) -> Check:
    failed = [result for result in results if not result.held]
    worst = max(results, key=lambda result: result.measured, default=_Result("", True, False, 0.0, 0.0))
    exact = sum(result.identical for result in results)
    if failed:
        first = failed[0]
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        detail = f"{first.place}{more}: the undone lock is not the source"
        return Check(
            "unlock", False, first.measured, first.bound if first.computed else 0.0, detail, first.place
        )
    if exact == len(results):
        return Check("unlock", True, 0.0, 0.0, f"{exact} tensors, bit for bit")
    detail = f"{exact} of {len(results)} tensors bit for bit, the others to rounding, worst {worst.place}"
    return Check("unlock", True, worst.measured, worst.bound, detail, worst.place)


def _undo(source: Member, locked: Member, job: Job, condition: float, gate: Gate, meter: Meter) -> _Result:
    info, plan = job.info, job.plan()
    stored = locked.source.tensors[plan.source]
    original = source.source.tensors[info.name]
    prune = None if locked.drawn is None else locked.drawn.prune.get(info.name)
    if prune is not None and not prune.acts_on(info.shape):
        prune = None
    shape = info.shape or (1,)
    chain = compile_chain(plan, shape, stored.dtype, info.dtype, info.name)
    state = {"identical": original.dtype == info.dtype, "error": 0.0, "norm": 0.0}

    def read(start: int, stop: int) -> Array:
        if not info.shape:
            return locked.source.read(plan.source).reshape(1)
        return locked.source.read_rows(plan.source, start, stop)

    def emit(start: int, stop: int, bits: Array, values: Array | None) -> None:
        want = (
            source.source.read_rows(info.name, start, stop)
            if info.shape
            else source.source.read(info.name).reshape(1)
        )
        keep = None
        if prune is not None and prune.needs_base:
            keep = ~prune.changed(
                shape, start, stop
            )  # what pruning took is in the base, which is not at hand
        elif prune is not None:
            want = prune.apply(want, info.dtype, shape, start)
        have = np.where(keep, bits, want) if keep is not None else bits
        if np.array_equal(have, want):
            if not chain.plan.exact:
                state["norm"] += float((to_float64(want, info.dtype) ** 2).sum())
            return
        state["identical"] = False
        a, b = to_float64(have, info.dtype), to_float64(want, info.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            state["error"] += float(((a - b) ** 2).sum())
            state["norm"] += float((b**2).sum())

    with gate.room(chain.memory + 2 * original.nbytes // max(len(chain.blocks()), 1)):
        run(chain, read, emit)
    meter.add(stored.nbytes, labelled(locked, info.name))
    norm = sqrt(state["norm"])
    measured = (
        sqrt(state["error"]) / norm if norm and np.isfinite(state["error"]) else float(state["error"] != 0)
    )
    half, step = (
        max(known.get(info.dtype, 0.0), known.get(stored.dtype, 0.0)) for known in (HALF_ULP, HALF_STEP)
    )
    # Numbers that are hardly larger than a dtype's smallest step are rounded to whole steps.
    bound = FACTOR * _growth(condition) * (half + (step * sqrt(prod(shape)) / norm if norm else 0.0))
    return _Result(
        labelled(source, info.name), bool(state["identical"]), not chain.plan.exact, measured, bound
    )


def _growth(condition: float) -> float:
    """How much rounding grows on the way there and back: the mean square of the factors that elements have.

    Half of them are uniform in [1, √c], half are inverses of such.
    """
    root = sqrt(condition)
    return 0.5 * ((condition + root + 1.0) / 3.0 + 1.0 / root)
