"""Merging authorised by the key: undo locked models, merge them, lock the result afresh, tensor by tensor.

Nothing unlocked is ever written: a tensor is undone in memory, merged in float32 (float64 for F32 and F64),
rounded once to the dtype of the first model, and goes through the new lock like a tensor that was read from
a disk. At any time one tensor is being merged, in all models at once.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import TensorInfo, check_destination, is_float, to_bits, to_float32, to_float64
from .engine import Progress, Source
from .errors import InputError, UsageError
from .execute import apply_plan
from .keys import Key, domain_salt, fresh_salt, load_key
from .lock import method_options, write_lock
from .manifest import Component
from .methods.context import CONDITION
from .plan import Member, Opened, draw, open_all
from .report import LockReport, Plan
from .transform import Array, compile_tensor
from .unlock import prepare_unlock

__all__ = ["MergeReport", "merge", "merge_tensor"]

DOCUMENT, DOCUMENT_VERSION = "unmergeable.merge", 1
METHODS = ("linear", "task_arithmetic", "ties")
_SHOWN = 20


@dataclass(frozen=True)
class MergeReport:
    """What an authorised merge did: the merge, and the lock of its result."""

    models: tuple[str, ...]
    base: str | None
    method: str
    weights: tuple[float, ...]
    options: Mapping[str, Any]
    lock: LockReport

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `unmergeable merge --json`."""
        return {
            "document": DOCUMENT,
            "version": DOCUMENT_VERSION,
            "models": list(self.models),
            "base": self.base,
            "method": self.method,
            "weights": list(self.weights),
            "options": dict(self.options),
            "lock": self.lock.as_dict(),
        }


def merge(
    models: Sequence[str | os.PathLike[str]],
    dst: str | os.PathLike[str],
    *,
    key: Key | str | os.PathLike[str],
    method: str = "linear",
    weights: Sequence[float] | None = None,
    base: str | os.PathLike[str] | None = None,
    density: float = 0.2,
    lock_method: str = "exact",
    scales: bool = False,
    condition: float = CONDITION,
    domain: str | None = None,
    jobs: int = 2,
    progress: Progress | None = None,
    salt: bytes | None = None,
) -> MergeReport:
    """Merge models that were locked with one key, and lock the result.

    Args:
        models: the locked models, two or more of the same names and shapes; the first gives the other files
            and the dtypes.
        dst: the new folder or file; it appears whole or not at all.
        key: the key that all of them were locked with, or its file.
        method: "linear", Σ wᵢ xᵢ / Σ wᵢ; "task_arithmetic", base + Σ wᵢ (xᵢ − base); or "ties", trimmed to
            `density`, with elected signs (arXiv 2306.01708), per tensor.
        weights: one for each model; all 1.0 if not given.
        base: the model that they were fine-tuned from, for the last two; published, or locked with the key.
        density: part of each difference that "ties" keeps.
        lock_method, scales, condition, domain, salt: of the new lock, as in `lock`.
        jobs: threads.
        progress: called with bytes done, bytes in all, and a tensor's name.

    Raises:
        UsageError: options that contradict each other.
        InputError: a model that is not locked, or with another key, or altered since; models that differ in
            names or shapes.
        ClaimError, RunError: as `lock`. Nothing is left at DST in any of these cases.
    """
    started = time.monotonic()
    key = key if isinstance(key, Key) else load_key(key)
    factors = _weights(models, method, weights, base, density)
    settings = method_options(lock_method, scales=scales, condition=condition)
    if domain is not None and salt is not None:
        raise UsageError("a domain has its own salt")
    with ExitStack() as stack:
        inputs = [_open(path, key, stack) for path in models]
        origin = None if base is None else _open(base, key, stack, plain=True)
        first = inputs[0].opened
        check_destination(first.root, dst, first.nbytes)

        def mix(values: list[Array], start: Array | None) -> Array:
            return merge_tensor(method, values, factors, start, density)

        if salt is None:
            salt = fresh_salt() if domain is None else domain_salt(domain, key)
        for member in first.members:
            if not member.passed:
                merged = _merged(member.name, inputs, origin, mix)
                draw(member, lock_method, key, salt, settings, source=merged)
                member.tensors = merged
        plan = Plan(lock_method, settings, salt, domain is not None)
        report = write_lock(first, Path(dst), key, plan, jobs, progress, started=started)
    return MergeReport(
        models=tuple(str(path) for path in models),
        base=None if base is None else str(base),
        method=method,
        weights=factors,
        options={"density": density} if method == "ties" else {},
        lock=report,
    )


def _weights(
    models: Sequence[object], method: str, weights: Sequence[float] | None, base: object, density: float
) -> tuple[float, ...]:
    if method not in METHODS:
        raise UsageError("no such merge method", where=f"'{method}'", expected=" | ".join(METHODS))
    if len(models) < 2:
        raise UsageError("a merge needs at least two models", got=len(models))
    if method != "linear" and base is None:
        raise UsageError(f"{method} needs the base that the models were fine-tuned from", hint="give --base")
    if method == "linear" and base is not None:
        raise UsageError("a linear merge has no base", hint="use --method task_arithmetic")
    if not 0 < density <= 1:
        raise UsageError("the density is out of range", expected="above 0, at most 1", got=density)
    factors = tuple(float(weight) for weight in weights) if weights is not None else (1.0,) * len(models)
    if len(factors) != len(models):
        raise UsageError("one weight for each model", expected=len(models), got=len(factors))
    if not all(np.isfinite(factors)) or (method == "linear" and sum(factors) == 0):
        raise UsageError("weights must be numbers, and not sum to zero", got=list(factors))
    return factors


@dataclass(frozen=True)
class _Model:
    """An input: what it is, and its tensors by component as they were before its lock."""

    opened: Opened
    tensors: Mapping[str, Source]


def _open(path: str | os.PathLike[str], key: Key, stack: ExitStack, *, plain: bool = False) -> _Model:
    """Open a locked model, or with `plain` also one that is not locked."""
    opened = open_all(path, None, stack)
    if plain and opened.manifest_path is None:
        return _Model(opened, {member.name: member.source for member in opened.members})
    if opened.manifest_path is None:
        hint = "lock it first: merging by the key is for models that were locked with it"
        raise InputError("the model is not locked", where=opened.root, hint=hint)
    prepared = prepare_unlock(opened, key)
    tensors: dict[str, Source] = {}
    for member in opened.members:
        part = prepared.manifest.components.get(member.name)
        undone = not member.passed and part is not None
        tensors[member.name] = Undone(member, part) if undone and part is not None else member.source
        member.digest = None if part is None else part.spec
    return _Model(opened, tensors)


class Undone:
    """A locked checkpoint, read as it was before its lock; every tensor's hash is compared on the way.

    Args:
        member: with its match and elements drawn.
        part: what the manifest says about it.
    """

    def __init__(self, member: Member, part: Component) -> None:
        assert member.match is not None
        assert member.drawn is not None
        self._source, self._match, self._part = member.source, member.match, part
        self._elements = member.drawn.elements
        self.tensors: Mapping[str, TensorInfo] = {
            info.name: info for shard in member.shards for info in shard.tensors
        }

    def read(self, name: str) -> Array:
        """The tensor before the lock, raw bits. Raises InputError where it is not what was locked."""
        plan = compile_tensor(self._match, self._elements, name, undo=True)
        bits = self._source.read(plan.source)
        if hashlib.sha256(bits.data).hexdigest() != self._part.tensors.get(plan.source):
            hint = "unlock it with --accept-changed, and lock the result"
            raise InputError(
                "the tensor is not what was locked", where=f"{self._source.root}: {plan.source}", hint=hint
            )
        return apply_plan(bits, plan, self._source.tensors[plan.source].dtype, self.tensors[name].dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of it; the whole tensor is undone for them."""
        return self.read(name)[start:stop]

    def readinto(self, name: str, offset: int, out: memoryview) -> None:
        """Bytes of it from `offset` on; the whole tensor is undone for them."""
        out[:] = _bytes(self.read(name))[offset : offset + len(out)]


class MergedSource:
    """Models that are read as their merge. A worker keeps the tensor that it read last.

    Args:
        models: sources with the same names and shapes.
        base: has all floating-point tensors of theirs, or None.
        mix: merges float arrays of one tensor, given the base's.
    """

    def __init__(
        self, models: Sequence[Source], base: Source | None, mix: Callable[[list[Array], Array | None], Array]
    ) -> None:
        self._models, self._base, self._mix = models, base, mix
        self._one = threading.Lock()  # one merge at a time: it needs the tensor of every model
        self._last = threading.local()
        self.tensors = models[0].tensors

    def read(self, name: str) -> Array:
        """The merged tensor, raw bits of the first model's dtype. Raises InputError."""
        if getattr(self._last, "name", None) != name:
            self._last.name = self._last.bits = None
            with self._one:
                bits = self._merged(name)
            self._last.name, self._last.bits = name, bits
        return self._last.bits

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of it."""
        return self.read(name)[start:stop]

    def readinto(self, name: str, offset: int, out: memoryview) -> None:
        """Bytes of it from `offset` on."""
        out[:] = _bytes(self.read(name))[offset : offset + len(out)]

    def _merged(self, name: str) -> Array:
        dtype = self.tensors[name].dtype
        if not is_float(dtype):
            found = [model.read(name) for model in self._models]
            if not all(np.array_equal(found[0], other) for other in found[1:]):
                raise InputError("the models differ in a tensor that cannot be merged", where=name, got=dtype)
            return found[0]
        wide = dtype in ("F32", "F64")
        sources = [*self._models, *([] if self._base is None else [self._base])]
        values = [
            (to_float64 if wide else to_float32)(source.read(name), source.tensors[name].dtype)
            for source in sources
        ]
        base = None if self._base is None else values.pop()
        return to_bits(self._mix(values, base), dtype)


def _bytes(bits: Array) -> memoryview:
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data


def _merged(
    name: str, models: list[_Model], base: _Model | None, mix: Callable[[list[Array], Array | None], Array]
) -> MergedSource:
    """The merge of one component of all models.

    Raises:
        InputError: a model, or the base, lacks a tensor or has it in another shape.
    """
    first = models[0]
    want = {info.name: info.shape for info in first.tensors[name].tensors.values()}
    floats = {n for n, info in first.tensors[name].tensors.items() if is_float(info.dtype)}
    for other in [*models[1:], *([] if base is None else [base])]:
        found = other.tensors.get(name)
        shapes = {} if found is None else {info.name: info.shape for info in found.tensors.values()}
        needed = floats if other is base else want.keys() | shapes.keys()
        wrong = sorted(n for n in needed if shapes.get(n) != want.get(n))
        if wrong:
            raise InputError(
                "the models do not have the same tensors in the same shapes",
                where=other.opened.root,
                expected=f"as {first.opened.root}",
                got=", ".join(wrong[:_SHOWN])
                + (f" and {len(wrong) - _SHOWN} more" if wrong[_SHOWN:] else ""),
            )
    origin = None if base is None else base.tensors[name]
    return MergedSource([model.tensors[name] for model in models], origin, mix)


def merge_tensor(
    method: str,
    models: Sequence[Array],
    weights: Sequence[float],
    base: Array | None = None,
    density: float = 0.2,
) -> Array:
    """Merge one tensor: float arrays of one shape and dtype to another.

    Sources: task arithmetic, Ilharco et al., arXiv 2212.04089; TIES, Yadav et al., arXiv 2306.01708, trimmed
    tensor by tensor, disjoint mean weighted by `weights`.
    """
    kind = models[0].dtype.type
    if method == "linear":
        total = np.zeros_like(models[0])
        for model, weight in zip(models, weights, strict=True):
            total += kind(weight) * model
        return np.asarray(total / kind(sum(weights)))
    assert base is not None
    if method == "task_arithmetic":
        total = base.copy()
        for model, weight in zip(models, weights, strict=True):
            total += kind(weight) * (model - base)
        return total
    trimmed = np.stack([kind(w) * _trim(m - base, density) for m, w in zip(models, weights, strict=True)])
    elected = np.where(trimmed.sum(axis=0) >= 0, kind(1), kind(-1))
    agree = np.sign(trimmed) == elected
    return np.asarray(base + (trimmed * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1).astype(kind))


def _trim(delta: Array, density: float) -> Array:
    """Keep the entries of largest magnitude; all that are as large as the smallest one kept."""
    count = max(1, round(density * delta.size))
    if count >= delta.size:
        return delta
    size = np.abs(delta)
    least = np.partition(size.reshape(-1), delta.size - count)[delta.size - count]
    return np.where(size >= least, delta, delta.dtype.type(0))
