"""Streaming one checkpoint under its plans: tensors in parallel, memory bounded by the largest of them.

Every destination tensor is an independent task: read, transform, write at its offset, hash what was written.
Its bytes depend on its plan and one source tensor alone, so the number of workers changes nothing. A gate
counts the bytes of working memory that are under way; shards are synced to disk as soon as they are
complete, while others are still computed.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from .checkpoint import Shard, ShardWriter, TensorInfo, is_float
from .checkpoint.numeric import to_float64
from .errors import InputError
from .execute import Chain, compile_chain, run
from .movement import Sample, grid
from .transform import Array, TensorPlan

MEMORY = 96 * 2**20  # working memory of all tasks together, unless one alone needs more
COPY_BYTES = 2 << 20
# By dtype: the largest relative error of rounding to nearest, half an ulp of the smallest mantissa.
HALF_ULP = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}
HALF_STEP = {"BF16": 2.0**-134, "F16": 2.0**-25, "F32": 2.0**-150, "F64": 0.0}  # half of the smallest one

Progress = Callable[[int, int, str], None]
Sampler = Callable[[str, Sample], None]


class Source(Protocol):
    """What is read: a checkpoint, or something that behaves like one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def read(self, name: str) -> Array: ...
    def read_rows(self, name: str, start: int, stop: int) -> Array: ...
    def readinto(self, name: str, offset: int, out: memoryview) -> None: ...


@dataclass(frozen=True)
class Job:
    """One destination tensor: where it goes and what it is made from.

    The plan is made by a function, when its turn comes: all plans of a large model at once are large.
    """

    info: TensorInfo
    plan: Callable[[], TensorPlan]


@dataclass
class Outcome:
    """What was written of one tensor.

    Attributes:
        source: name of the tensor that it was made from.
        sha256: of the bytes written, or with `hash_source` of those read; hexadecimal.
        rounding: ‖written − computed‖ / ‖computed‖ on the sample; 0.0 where nothing is computed. F64 is
            computed in F64: there it is half an ulp, which every operation may cost.
    """

    source: str
    sha256: str
    rounding: float = 0.0


@dataclass
class Meter:
    """Progress of a whole run: bytes done out of all, told to a callback from any worker, one at a time."""

    total: int
    callback: Progress | None = None
    done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int, label: str) -> None:
        if self.callback is None:
            return
        with self._lock:
            self.done += count
            self.callback(self.done, self.total, label)


class Gate:
    """Lets work in while its memory fits; work that never fits runs alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._free = threading.Condition()

    @contextmanager
    def room(self, need: int) -> Iterator[None]:
        with self._free:
            self._free.wait_for(lambda: self._used == 0 or self._used + need <= self._limit)
            self._used += need
        try:
            yield
        finally:
            with self._free:
                self._used -= need
                self._free.notify_all()


def stream(
    source: Source,
    jobs: Sequence[Job],
    shards: Sequence[Shard],
    folder: Path,
    *,
    workers: int = 2,
    meter: Meter | None = None,
    sample: Sampler | None = None,
    hash_source: bool = False,
) -> dict[str, Outcome]:
    """Write the shards of a destination.

    Args:
        source: the tensors that plans name.
        jobs: one for every tensor of the shards.
        shards: layouts of the files to make in `folder`.
        workers: threads that work at the same time.
        meter: told of every block of bytes written.
        sample: gets values before and after of each changed matrix, on a small grid; rounding is measured there.
        hash_source: hash what is read instead of what is written.

    Returns: the outcome of every tensor by name.

    Raises:
        InputError: a tensor cannot go through its plan (NaN or infinity in arithmetic, no such dtype).
        RunError: reading or writing failed.
    """
    meter = meter or Meter(0)
    gate = Gate(MEMORY)
    stop = threading.Event()
    outcomes: dict[str, Outcome] = {}
    by_file: dict[str, list[Job]] = {shard.file: [] for shard in shards}
    for job in jobs:
        by_file[job.info.file].append(job)
    writers: dict[str, ShardWriter] = {}
    left = {file: len(group) for file, group in by_file.items()}
    counting = threading.Lock()

    def one(job: Job) -> None:
        if stop.is_set():
            return
        file = job.info.file
        try:
            outcome = _tensor(source, job, writers[file], gate, meter, sample, hash_source)
        except BaseException:
            stop.set()
            raise
        with counting:
            outcomes[job.info.name] = outcome
            left[file] -= 1
            complete = left[file] == 0
        if complete:
            syncing.append(syncer.submit(writers[file].close))

    syncing: list[Future[None]] = []
    with ThreadPoolExecutor(max(1, workers)) as pool, ThreadPoolExecutor(1) as syncer:
        try:
            tasks: list[Future[None]] = []
            for shard in shards:
                writers[shard.file] = ShardWriter(folder / shard.file, shard.header, shard.size)
                if not by_file[shard.file]:
                    syncing.append(syncer.submit(writers[shard.file].close))
                # the longest first, so that no worker is left alone with it at the end
                for job in sorted(by_file[shard.file], key=lambda job: (-job.info.nbytes, job.info.start)):
                    tasks.append(pool.submit(one, job))
            _join(tasks)
            _join(syncing)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            syncer.shutdown(cancel_futures=True)
            for writer in writers.values():
                writer.abandon()
            raise
    return outcomes


def _join(tasks: Sequence[Future[None]]) -> None:
    """Wait for all, or for the first that fails, and raise its error."""
    wait(tasks, return_when=FIRST_EXCEPTION)
    for task in tasks:
        if task.done() and not task.cancelled() and task.exception() is not None:
            task.result()
    for task in tasks:
        task.result()


def _tensor(
    source: Source,
    job: Job,
    writer: ShardWriter,
    gate: Gate,
    meter: Meter,
    sample: Sampler | None,
    hash_source: bool,
) -> Outcome:
    plan = job.plan()
    info, stored = job.info, source.tensors[plan.source]
    if not plan.steps and stored.dtype == info.dtype:
        with gate.room(COPY_BYTES):
            outcome = _copy(source, plan.source, info, writer, meter)
            if (
                sample is not None
                and plan.source != info.name
                and len(info.shape) > 1
                and is_float(info.dtype)
            ):
                axes = grid(info.shape)
                before = _read_grid(source, source.tensors[info.name], axes)
                sample(info.name, Sample(axes, before, _read_grid(source, stored, axes)))
        return outcome
    # a scalar is a vector of one here: only its dtype can change
    chain = compile_chain(plan, info.shape or (1,), stored.dtype, info.dtype, info.name, ordered=hash_source)
    with gate.room(chain.memory):
        return _transform(source, chain, info, writer, meter, sample, hash_source)


def _copy(source: Source, name: str, info: TensorInfo, writer: ShardWriter, meter: Meter) -> Outcome:
    digest = hashlib.sha256()
    buffer = bytearray(min(COPY_BYTES, info.nbytes))
    for offset in range(0, info.nbytes, COPY_BYTES):
        part = memoryview(buffer)[: min(COPY_BYTES, info.nbytes - offset)]
        source.readinto(name, offset, part)
        digest.update(part)
        writer.write_at(info.start + offset, part)
        meter.add(len(part), info.name)
    return Outcome(name, digest.hexdigest())


def _transform(
    source: Source,
    chain: Chain,
    info: TensorInfo,
    writer: ShardWriter,
    meter: Meter,
    sample: Sampler | None,
    hash_source: bool,
) -> Outcome:
    name, row_bytes = chain.plan.source, chain.row_bytes
    digest = hashlib.sha256()
    axes = grid(info.shape) if sample is not None and len(info.shape) > 1 and is_float(info.dtype) else None
    after: list[Array] = []
    squares = [0.0, 0.0]

    def read(start: int, stop: int) -> Array:
        everything = (start, stop) == (0, chain.shape[0])
        bits = source.read(name).reshape(chain.shape) if everything else source.read_rows(name, start, stop)
        if hash_source:
            digest.update(bits.data)
        return bits

    def emit(start: int, stop: int, bits: Array, values: Array | None) -> None:
        bits = np.ascontiguousarray(bits)
        if values is not None and not chain.plan.exact:
            check_range(bits, info.dtype, info.name)
        if not hash_source:
            digest.update(bits.data)
        writer.write_at(info.start + start * row_bytes, bits.data)
        meter.add(bits.nbytes, info.name)
        if axes is None:
            return
        rows = axes[0][(axes[0] >= start) & (axes[0] < stop)] - start
        if not len(rows):
            return
        picked = np.ix_(rows, *axes[1:])
        written = to_float64(bits[picked], info.dtype)
        after.append(written)
        if values is not None:
            exact = values[picked].astype(np.float64)
            squares[0] += float(((written - exact) ** 2).sum())
            squares[1] += float((exact**2).sum())

    run(chain, read, emit)
    outcome = Outcome(name, digest.hexdigest())
    if squares[1]:
        floor = HALF_ULP["F64"] if info.dtype == "F64" and not chain.plan.exact else 0.0
        outcome.rounding = max(float(np.sqrt(squares[0] / squares[1])), floor)
    if sample is not None and axes is not None and after:
        before = _read_grid(source, source.tensors[info.name], axes)
        sample(info.name, Sample(axes, before, np.concatenate(after)))
    return outcome


def check_range(bits: Array, dtype: str, name: str) -> None:
    """Refuse NaN and infinity in what was computed, by their exponent: all ones, behind the sign.

    Raises:
        InputError: naming the tensor.
    """
    mantissa = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52}[dtype]
    limit = bits.dtype.type(((1 << bits.dtype.itemsize * 8) - 1) ^ ((2 << mantissa) - 1))
    if bits.size and (bits << bits.dtype.type(1)).max() >= limit:
        raise InputError(
            "NaN, infinity or a number too large for the dtype in a tensor that a dense method computes",
            where=name,
            hint="lock it with --method exact, which moves bits and computes nothing",
        )


def _read_grid(source: Source, info: TensorInfo, axes: tuple[Array, ...]) -> Array:
    """Values of a tensor on a grid, float64, read row by row of its last axis."""
    item = info.nbytes // max(prod(info.shape), 1)
    width = info.shape[-1]
    lead = [len(axis) for axis in axes[:-1]]
    flat = np.ravel_multi_index(np.meshgrid(*axes[:-1], indexing="ij"), info.shape[:-1]).reshape(-1)
    first, last = int(axes[-1][0]), int(axes[-1][-1]) + 1
    out = np.empty((len(flat), len(axes[-1])), dtype=f"<u{item}")
    row = np.empty(last - first, dtype=out.dtype)
    for k, at in enumerate(flat):
        source.readinto(info.name, (int(at) * width + first) * item, row.view(np.uint8).data)
        out[k] = row[axes[-1] - first]
    return to_float64(out.reshape(*lead, len(axes[-1])), info.dtype)
