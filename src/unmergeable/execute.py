"""One tensor under its plan, a block of rows at a time.

A row of the destination depends on one row of the source, or, where matrices mix rows, on the rows of its
own block. So a tensor is written in blocks of whole rows that no matrix crosses: no second copy of it is ever
in memory, and none at all where its rows stay in place. Exact plans move raw bits; others are computed in
float32 for 16-bit dtypes, whose rounding is 2**14 times coarser, and in float64 for F32 and F64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from .checkpoint.numeric import FLOATS, bits_dtype, to_bits, to_float32, to_float64
from .errors import InputError
from .groups import Ints
from .transform import Array, Mix, Step, Take, TensorPlan, apply_bits, apply_floats

BLOCK_BYTES = 1 << 20  # of output: what is read and written of a block stays in a core's cache
DENSE_BLOCK_BYTES = 1 << 18  # the same where it is computed with, in twice to four times the bytes
DIRECT_ROW_BYTES = 1 << 16  # rows at least this long are read one by one, from wherever they come

ReadRows = Callable[[int, int], Array]


@dataclass(frozen=True)
class Chain:
    """A plan compiled for one tensor of a given shape and dtype.

    Attributes:
        shape: of source and destination, rows first.
        stored, written: safetensors dtypes of source and destination.
        breaks: rows at which a block may begin, and the number of rows at the end.
        whole: whether the source must be in memory as a whole, for its rows come from anywhere.
    """

    plan: TensorPlan
    shape: tuple[int, ...]
    stored: str
    written: str
    breaks: Ints
    whole: bool

    @property
    def exact(self) -> bool:
        """Whether bits are moved without rounding."""
        return self.plan.exact and self.stored == self.written

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * bits_dtype(self.written).itemsize

    def blocks(self) -> list[tuple[int, int]]:
        """Row ranges of about a block's bytes that no matrix crosses."""
        rows = max(1, (BLOCK_BYTES if self.exact else DENSE_BLOCK_BYTES) // max(self.row_bytes, 1))
        out, start = [], 0
        stops = self.breaks[1:]
        while start < self.shape[0]:
            at = int(np.searchsorted(stops, start + rows, side="right"))
            stop = int(stops[at - 1]) if at and stops[at - 1] > start else int(stops[at])
            out.append((start, stop))
            start = stop
        return out

    @property
    def memory(self) -> int:
        """Bytes of working memory that `run` needs at most, the whole source included where it is read."""
        largest = max((stop - start for start, stop in self.blocks()), default=0) * self.row_bytes
        wide = 4 if self.exact else 6 * (2 if self.written in ("F16", "BF16", "F32") else 1)
        source = prod(self.shape) * bits_dtype(self.stored).itemsize
        return wide * largest + (source if self.whole else 0)


def compile_chain(
    plan: TensorPlan,
    shape: tuple[int, ...],
    stored: str,
    written: str,
    where: str = "",
    *,
    ordered: bool = False,
) -> Chain:
    """Prepare a plan for a tensor.

    Args:
        ordered: read the source from its first row to its last, whatever the plan does with them.

    Raises:
        InputError: the plan needs arithmetic that the dtype does not have.
    """
    exact = plan.exact and stored == written
    signed = any(not isinstance(step, Take) or step.factor is not None for step in plan.steps)
    if (signed or not exact) and (stored not in FLOATS or written not in FLOATS):
        raise InputError("no arithmetic for this dtype", where=where, expected=" | ".join(FLOATS), got=stored)
    rows = shape[0]
    moving = any(isinstance(step, Take) and step.axis == 0 for step in plan.steps)
    long_rows = prod(shape[1:]) * bits_dtype(stored).itemsize >= DIRECT_ROW_BYTES
    breaks = _breaks(plan.steps, rows)
    local = bool(np.all(np.diff(breaks) * prod(shape[1:]) * bits_dtype(stored).itemsize <= 4 * BLOCK_BYTES))
    crossing = any(isinstance(step, Mix) and step.axis == 0 for step in plan.steps)
    whole = (moving and (ordered or not long_rows)) or (crossing and (moving or not local))
    return Chain(plan, shape, stored, written, breaks, whole)


def run(
    chain: Chain,
    read_rows: ReadRows,
    emit: Callable[[int, int, Array, Array | None], None],
) -> None:
    """Compute the destination, block by block in order.

    Args:
        read_rows: rows [start, stop) of the source as raw bits.
        emit: called with start, stop, the block's raw bits, and its values before rounding (None if exact).
    """
    source = read_rows(0, chain.shape[0]) if chain.whole else None
    for start, stop in chain.blocks():
        wanted = np.arange(start, stop, dtype=np.int64)
        trail: list[tuple[Step, Ints, Ints]] = []  # step, rows that it gives, rows that it is given
        for step in reversed(chain.plan.steps):
            given = wanted
            if step.axis == 0:
                assert step.outer is None  # rows are exchanged within nothing larger
                given = step.take[wanted] if isinstance(step, Take) else _closure(step, wanted)
            trail.append((step, wanted, given))
            wanted = given
        bits = _gather(source, read_rows, wanted)
        if chain.exact:
            for step, gives, given in reversed(trail):
                bits = _exact(bits, chain.stored, step, gives, given)
            emit(start, stop, bits, None)
            continue
        wide = chain.written in ("F32", "F64")
        values: Array = to_float64(bits, chain.stored) if wide else to_float32(bits, chain.stored)
        for step, gives, given in reversed(trail):
            values = _floats(values, step, gives, given)
        emit(start, stop, to_bits(values, chain.written), values)


def _breaks(steps: tuple[Step, ...], rows: int) -> Ints:
    """Rows of the destination at which no block of a matrix is cut."""
    crossed = np.zeros(rows + 1, dtype=np.int64)
    to_output: Ints = np.arange(rows, dtype=np.int64)
    for step in reversed(steps):
        if step.axis != 0 or step.outer is not None:
            continue
        if isinstance(step, Take):
            # out[j] = in[take[j]]: the input's row i ends up at the rows j with take[j] = i
            onward = np.empty(rows, dtype=np.int64)
            onward[step.take] = np.arange(rows, dtype=np.int64)
            to_output = to_output[onward]
            continue
        at = to_output[step.positions]  # [b, n, r]
        low, high = at.min(axis=1).reshape(-1), at.max(axis=1).reshape(-1)
        np.add.at(crossed, low + 1, 1)
        np.add.at(crossed, high + 1, -1)
    return np.flatnonzero(np.cumsum(crossed) == 0).astype(np.int64)


def _closure(step: Mix, wanted: Ints) -> Ints:
    """`wanted` and behind it every further row that the matrices need for it."""
    touched = np.isin(step.positions, wanted).any(axis=1)  # [b, r]
    need = step.positions.transpose(0, 2, 1)[touched].reshape(-1)
    return np.concatenate([wanted, np.setdiff1d(need, wanted)])


def _gather(source: Array | None, read_rows: ReadRows, rows: Ints) -> Array:
    """Rows of the source in the order asked for: contiguous ones by one read."""
    ordered = bool(np.all(np.diff(rows) == 1))
    if source is not None:
        if ordered:
            return source[rows[0] : rows[-1] + 1]
        return np.take(source, rows, axis=0, mode="clip")
    if ordered:
        return read_rows(int(rows[0]), int(rows[-1]) + 1)
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return np.concatenate([read_rows(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, cuts)])


def _exact(bits: Array, dtype: str, step: Step, gives: Ints, given: Ints) -> Array:
    """One exact step on a block; a gather of rows has been done by reading them in order."""
    assert isinstance(step, Take)
    if step.axis == 0:
        return bits if step.factor is None else flip(bits, dtype, step.factor[gives], 0)
    if step.outer is None:
        bits = np.take(bits, step.take, axis=step.axis, mode="clip")
        return bits if step.factor is None else flip(bits, dtype, step.factor, step.axis)
    if step.outer != 0:
        return apply_bits(bits, dtype, [step])
    return np.stack(
        [apply_bits(part, dtype, [_slice(step, int(e))]) for part, e in zip(bits, given, strict=True)]
    )


def flip(bits: Array, dtype: str, factor: NDArray[np.float64], axis: int) -> Array:
    """Multiply raw bits by signed powers of two along an axis: in place if the array owns its data."""
    if np.any(np.abs(factor) != 1.0):
        identity = Take(axis, np.arange(bits.shape[axis], dtype=np.int64), factor)
        return apply_bits(bits, dtype, [identity])
    along = [1] * bits.ndim
    along[axis] = -1
    top = bits.dtype.type(1 << (bits.dtype.itemsize * 8 - 1))
    mask = np.where(factor < 0, top, bits.dtype.type(0)).reshape(along)
    out = bits if bits.base is None and bits.flags.writeable else np.empty_like(bits)
    return np.bitwise_xor(bits, mask, out=out)


def _floats(values: Array, step: Step, gives: Ints, given: Ints) -> Array:
    if step.axis == 0 and isinstance(step, Take):
        if step.factor is not None:
            along = [-1] + [1] * (values.ndim - 1)
            values = values * step.factor[gives].reshape(along).astype(values.dtype)
        return values
    if step.axis == 0:
        assert isinstance(step, Mix)
        return _mix_rows(values, step, given)[: len(gives)]
    if step.outer == 0:
        return np.stack(
            [apply_floats(part, [_slice(step, int(e))]) for part, e in zip(values, given, strict=True)]
        )
    if isinstance(step, Mix) and step.outer is None and step.axis == values.ndim - 1 == 1:
        return _mix_columns(values, step)
    return apply_floats(values, [step])


def _mix_rows(values: Array, step: Mix, given: Ints) -> Array:
    """Matrices on the rows `given` of the tensor that `values` holds; every block is there as a whole."""
    local = np.full(int(max(given.max(), step.positions.max())) + 1, -1, dtype=np.int64)
    local[given] = np.arange(len(given))
    positions = local[step.positions].transpose(0, 2, 1)  # [b, r, n]
    inside = np.argwhere((positions >= 0).all(axis=2))  # block, repeat
    if not len(inside):
        return values
    rows = positions[inside[:, 0], inside[:, 1]]  # [k, n]
    flat = values.reshape(len(values), -1)
    mixed = _multiply(step.matrix.astype(values.dtype)[inside[:, 0]], flat[rows])
    out = np.empty_like(flat) if rows.size == len(flat) else flat.copy()
    out[rows] = mixed
    return out.reshape(values.shape)


def _multiply(matrix: Array, x: Array) -> Array:
    """matrix [k, n, n] times x [k, n, columns], in tiles."""
    out = np.empty_like(x)
    tile = _tile(matrix.shape[-1])
    for at in range(0, x.shape[2], tile):
        np.matmul(matrix, x[:, :, at : at + tile], out=out[:, :, at : at + tile])
    return out


def _tile(n: int) -> int:
    """Columns of one product with an n × n matrix.

    Small enough for OpenBLAS to stay in the calling thread: the workers here are threads already, and its own
    spin against them (measured on two busy cores: 29 ms for what takes 0.6). Above 128 the product is large
    enough to be worth it either way.
    """
    return max(1, (1 << 18) // n**2) if n <= 128 else 64


def _mix_columns(values: Array, step: Mix) -> Array:
    """Matrices on the columns of a matrix, without transposing it: x · Aᵀ for every block."""
    blocks, n, repeats = step.positions.shape
    columns = step.positions.transpose(0, 2, 1).reshape(-1)  # block, repeat, coordinate
    rows, everything = values.shape[0], len(columns) == values.shape[1]
    in_place = everything and bool(np.all(np.diff(columns) == 1))
    picked = values if in_place else np.take(values, columns, axis=1, mode="clip")
    shaped = picked.reshape(rows, blocks, repeats, n).transpose(1, 2, 0, 3)  # [b, r, rows, n]
    turned = step.matrix.astype(values.dtype).transpose(0, 2, 1)[:, None]  # [b, 1, n, n]
    mixed = np.empty((rows, blocks, repeats, n), dtype=values.dtype)
    out = mixed.transpose(1, 2, 0, 3)
    tile = _tile(n)
    for at in range(0, rows, tile):
        np.matmul(shaped[:, :, at : at + tile], turned, out=out[:, :, at : at + tile])
    if in_place:
        return mixed.reshape(values.shape)
    result = np.empty_like(values) if everything else values.copy()
    result[:, columns] = mixed.reshape(rows, -1)
    return result


def _slice(step: Step, e: int) -> Step:
    """What a step with outer axis 0 does to slice `e` alone."""
    if isinstance(step, Take):
        return Take(step.axis - 1, step.take[e], None if step.factor is None else step.factor[e])
    return replace(step, axis=step.axis - 1, matrix=step.matrix[e], undo=step.undo[e], outer=None)


def apply_plan(bits: Array, plan: TensorPlan, stored: str, written: str | None = None) -> Array:
    """A whole tensor under its plan, in memory: raw bits of the source to raw bits of the result."""
    written = written or stored
    if not plan.steps and stored == written:
        return bits
    if not bits.shape:
        return to_bits(to_float64(bits, stored), written)
    out: Array = np.empty(bits.shape, dtype=bits_dtype(written))

    def emit(start: int, stop: int, block: Array, values: Array | None) -> None:
        out[start:stop] = block

    run(compile_chain(plan, bits.shape, stored, written), lambda a, b: bits[a:b], emit)
    return out
