"""Sketches: a tensor projected onto a few random probes in float64, and its bytes hashed in the same pass.

The axes that a spec gives dims to are kept, all others are projected away. So a matrix of `rows × hidden`
becomes `rows × 3`, small enough to hold for a whole layer, and any change of a row changes its sketch.
Tensors are read in blocks that stay in a core's cache; a tensor is never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from math import prod
from typing import Protocol

import numpy as np

from .checkpoint import TensorInfo, bits_dtype, to_float64
from .errors import InputError
from .groups import Floats

PROBES = 3
BLOCK = 1 << 16  # elements converted at once: their float64 copy stays in a core's second-level cache
READ_BYTES = 1 << 20
# What stands for NaN and infinity, times the sum of the finite magnitudes in their row: see `_stand_in`.
NAN_CODE, INF_CODE = 1.6180339887498949, 1.2599210498948732
# Root mean square of (half an ulp) / |w|, relative to the largest it can be, for evenly spread logarithms.
_ULP_RMS = 0.735
_PROBE_RMS = 1.041  # of the probes' magnitudes, uniform in [1/2, 3/2]


class Reader(Protocol):
    """The part of a checkpoint that is read here."""

    def readinto(self, name: str, offset: int, out: memoryview) -> None: ...


@dataclass(frozen=True)
class Sketch:
    """A tensor seen through probes.

    Attributes:
        values: [the kept axes…, PROBES], or [the kept axes…, 1] with the values themselves where nothing is
            projected away.
        norms: [the kept axes…], the Euclidean norm over what was projected; None where it was not asked for.
        axes: the kept axes of the tensor, in order.
    """

    values: Floats
    norms: Floats | None
    axes: tuple[int, ...]

    @property
    def sizes(self) -> Floats:
        """The norms, or where they were not asked for what the values tell of them; [the kept axes…]."""
        return self.norms if self.norms is not None else np.asarray(np.linalg.norm(self.values, axis=-1))


@lru_cache(maxsize=64)
def probes(length: int, seed: int) -> Floats:
    """[length, PROBES] random weights with magnitudes in [1/2, 3/2]: none is small, so no element hides."""
    random = np.random.default_rng([seed, length])
    weights = (random.random((length, PROBES)) + 0.5) * random.choice([-1.0, 1.0], (length, PROBES))
    weights.setflags(write=False)
    return weights


@dataclass(frozen=True)
class _Shape:
    """A tensor's axes merged to kept × projected × kept × projected: [a, p, b, q]."""

    a: int
    p: int
    b: int
    q: int

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: tuple[int, ...]) -> _Shape | None:
        runs = [
            (kept, prod(shape[axis] for axis in run))
            for kept, run in groupby(range(len(shape)), key=lambda axis: axis in axes)
        ]
        if runs and not runs[0][0]:
            runs = [(True, 1), *runs]
        if len(runs) > 4:
            return None
        sizes = [size for _, size in runs] + [1] * (4 - len(runs))
        return cls(*sizes)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Ranges of a and p, contiguous in memory and in order: several whole a, or a part of one."""
        each = self.p * self.b * self.q
        if each <= BLOCK or self.b * self.q == 1:
            step = max(1, BLOCK // max(each, 1))
            for start in range(0, self.a, step):
                yield slice(start, min(start + step, self.a)), slice(0, self.p)
            return
        step = max(1, BLOCK // (self.b * self.q))
        for a in range(self.a):
            for start in range(0, self.p, step):
                yield slice(a, a + 1), slice(start, min(start + step, self.p))


def sketch_tensor(
    source: Reader,
    info: TensorInfo,
    axes: Sequence[int],
    *,
    seed: int = 0,
    norms: bool = False,
    on_bytes: Callable[[memoryview], None] | None = None,
) -> Sketch:
    """Project a tensor onto probes, in one pass over its bytes.

    Args:
        source: where the bytes come from.
        info: name, dtype and shape.
        axes: the axes to keep; all others are projected away.
        seed: which probes.
        norms: also the norms of what is projected.
        on_bytes: called with all bytes of the tensor, in order, once.

    Raises:
        InputError: not a floating-point dtype of at least 16 bits.
        RunError: reading failed.
    """
    kept = tuple(sorted(axes))
    shape = _Shape.of(info.shape, kept)
    if shape is None:
        raise InputError(
            "the dims of a site lie on too many separate axes",
            where=info.name,
            got=f"axes {kept} of {info.shape}",
        )
    weights = _Weights.of(shape, seed)
    out = weights.empty(shape)
    squares = np.zeros((shape.a, shape.b)) if norms else None
    for part, rows, values in _floats(source, info, shape, on_bytes):
        with np.errstate(all="ignore"):
            out[part] += weights.project(values, rows)
            if squares is not None:
                squares[part] += np.einsum("apbq,apbq->ab", values, values)
    if not np.isfinite(out).all():
        out, squares = _with_stand_ins(source, info, shape, weights, norms)
    lead = tuple(info.shape[axis] for axis in kept)
    found = np.sqrt(squares).reshape(lead) if squares is not None else None
    return Sketch(out.reshape(*lead, out.shape[-1]), found, kept)


@dataclass(frozen=True)
class _Weights:
    """Probes of the two projected axes; None where an axis has one position and needs none."""

    p: Floats | None
    q: Floats | None

    @classmethod
    def of(cls, shape: _Shape, seed: int) -> _Weights:
        # An axis of one position is kept as it is only where nothing else is projected.
        return cls(
            probes(shape.p, seed) if shape.p > 1 else None,
            probes(shape.q, seed + 1) if shape.q > 1 else None,
        )

    def empty(self, shape: _Shape) -> Floats:
        count = 1 if self.p is None and self.q is None else PROBES
        return np.zeros((shape.a, shape.b, count))

    def project(self, values: Floats, rows: slice) -> Floats:
        """[a, p, b, q] -> [a, b, probes]."""
        a, p, b, q = values.shape
        if self.q is not None:
            seen = values.reshape(a * p * b, q) @ self.q
            if self.p is None:
                return seen.reshape(a, p, b, PROBES)[:, 0]
            return np.einsum("apbk,pk->abk", seen.reshape(a, p, b, PROBES), self.p[rows])
        if self.p is None:
            return values.reshape(a, b, 1)
        if b == 1:
            return (values.reshape(a, p) @ self.p[rows]).reshape(a, 1, PROBES)
        return np.matmul(self.p[rows].T, values.reshape(a, p, b)).transpose(0, 2, 1)


def _floats(
    source: Reader, info: TensorInfo, shape: _Shape, on_bytes: Callable[[memoryview], None] | None
) -> Iterator[tuple[slice, slice, Floats]]:
    """The tensor block by block as float64 [a, p, b, q], read about READ_BYTES at a time."""
    bits = bits_dtype(info.dtype)
    buffer = np.empty(0, dtype=bits)
    at = 0
    for group in _grouped(shape, bits.itemsize):
        sizes = [_count(shape, *block) for block in group]
        total = sum(sizes)
        if len(buffer) < total:
            buffer = np.empty(total, dtype=bits)
        raw = buffer[:total].view(np.uint8).data
        source.readinto(info.name, at * bits.itemsize, raw)
        if on_bytes is not None:
            on_bytes(raw)
        start = 0
        for (part, rows), size in zip(group, sizes, strict=True):
            chunk = buffer[start : start + size]
            start += size
            values = to_float64(chunk, info.dtype)
            lead = (part.stop - part.start, rows.stop - rows.start)
            yield part, rows, values.reshape(*lead, shape.b, shape.q)
        at += total


def _count(shape: _Shape, part: slice, rows: slice) -> int:
    return int((part.stop - part.start) * (rows.stop - rows.start) * shape.b * shape.q)


def _grouped(shape: _Shape, itemsize: int) -> Iterator[list[tuple[slice, slice]]]:
    group: list[tuple[slice, slice]] = []
    size = 0
    for block in shape.blocks():
        group.append(block)
        size += _count(shape, *block) * itemsize
        if size >= READ_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _with_stand_ins(
    source: Reader, info: TensorInfo, shape: _Shape, weights: _Weights, norms: bool
) -> tuple[Floats, Floats | None]:
    """The sketch of a tensor with NaNs or infinities, in two further passes.

    Each stands for a finite number of its sign that grows with its row, so that a sign, a power of two or a
    new order acts on the sketch as on a finite row: one of them too many, or in another place, is seen. Alone
    in its row it stands for a constant, which no power of two acts on: `exact` with scales fails there.
    """
    sizes = np.zeros((shape.a, shape.b))
    for part, _, values in _floats(source, info, shape, None):
        sizes[part] += np.abs(np.where(np.isfinite(values), values, 0.0)).sum(axis=(1, 3))
    sizes[sizes == 0.0] = 1.0
    out = weights.empty(shape)
    squares = np.zeros((shape.a, shape.b)) if norms else None
    for part, rows, values in _floats(source, info, shape, None):
        code = np.where(np.isnan(values), NAN_CODE, INF_CODE) * sizes[part][:, None, :, None]
        finite = np.where(np.isfinite(values), values, np.copysign(code, values))
        out[part] += weights.project(finite, rows)
        if squares is not None:
            squares[part] += np.einsum("apbq,apbq->ab", finite, finite)
    return out, squares


@dataclass(frozen=True)
class Noise:
    """What rounding to a dtype does: half an ulp relative to a value, and at least `floor`."""

    relative: float
    floor: float
    projected: int  # how many values a sketch sums


def shake(sketch: Sketch, noise: Noise, random: np.random.Generator) -> Sketch:
    """The sketch as if every value of the tensor had been moved by half an ulp, up or down.

    The sum of many such moves is a normal variable, so the norm of the row is all that it takes.
    """
    scale = np.hypot(noise.relative * _ULP_RMS * sketch.sizes, noise.floor * np.sqrt(noise.projected))
    if sketch.values.shape[-1] > 1:
        scale = scale * _PROBE_RMS
    moves = scale[..., None] * random.standard_normal(sketch.values.shape)
    return replace(sketch, values=sketch.values + moves)
