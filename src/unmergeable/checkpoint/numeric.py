"""Raw bits to floating-point numbers and back: F64, F32, F16, BF16.

Reading is exact. Writing rounds once, to nearest, ties to even, also from float64 to BF16, where going
through float32 would round twice. Infinities stay, numbers beyond the largest become infinite, a NaN stays a
NaN.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .header import BITS

FLOATS = ("F64", "F32", "F16", "BF16")
Bits = npt.NDArray[np.unsignedinteger[Any]]


def bits_dtype(dtype: str) -> np.dtype[np.unsignedinteger[Any]]:
    """The unsigned integer type that holds one item of a safetensors dtype.

    Raises:
        InputError: the dtype is unknown or its items are smaller than a byte.
    """
    bits = BITS.get(dtype, 0)
    if bits not in (8, 16, 32, 64):
        raise InputError("items of this dtype are not whole bytes", got=dtype)
    return np.dtype(f"<u{bits // 8}")


def is_float(dtype: str) -> bool:
    """Whether tensors of this dtype can be computed with here."""
    return dtype in FLOATS


def to_float32(bits: Bits, dtype: str) -> npt.NDArray[np.float32]:
    """The numbers in float32, same shape: exact for BF16, F16, F32, rounded for F64. A new array or a view.

    Raises:
        InputError: not a floating-point dtype of at least 16 bits.
    """
    if dtype == "BF16":
        wide = bits.astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return _view(bits, dtype).astype(np.float32, copy=False)


def to_float64(bits: Bits, dtype: str) -> npt.NDArray[np.float64]:
    """The numbers in float64, same shape: exact for all four dtypes. A new array or a view.

    Raises:
        InputError: not a floating-point dtype of at least 16 bits.
    """
    narrow = to_float32(bits, dtype) if dtype == "BF16" else _view(bits, dtype)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return narrow.astype(np.float64, copy=False)


def to_bits(values: npt.NDArray[np.floating[Any]], dtype: str) -> Bits:
    """Float32 or float64 numbers as raw bits of `dtype`, rounded once to nearest even, same shape.

    Raises:
        InputError: not a floating-point dtype of at least 16 bits, or values of another type.
    """
    if values.dtype not in (np.float32, np.float64):
        raise InputError("only float32 and float64 are rounded", got=values.dtype)
    shape = values.shape
    values = np.ascontiguousarray(values)
    if dtype == "BF16":
        bits = values.view(np.uint32) if values.dtype == np.float32 else _round_to_odd(values)
        return _upper_half(bits).reshape(shape)
    target = {"F16": np.float16, "F32": np.float32, "F64": np.float64}.get(dtype)
    if target is None:
        raise InputError(
            "not a floating-point dtype of at least 16 bits", expected=", ".join(FLOATS), got=dtype
        )
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(target, copy=False).view(bits_dtype(dtype)).reshape(shape)


def _view(bits: Bits, dtype: str) -> npt.NDArray[np.floating[Any]]:
    if dtype not in FLOATS:
        raise InputError(
            "not a floating-point dtype of at least 16 bits", expected=", ".join(FLOATS), got=dtype
        )
    return bits.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])


def _upper_half(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    """Rounds float32 bits to their upper 16, to nearest even; carries run on into the exponent."""
    bits = bits.reshape(-1)
    work = bits >> np.uint32(16)
    work &= np.uint32(1)
    work += np.uint32(0x7FFF)
    work += bits
    rounded = np.ascontiguousarray(work.view(np.uint16)[int(sys.byteorder == "little") :: 2])
    # One pass over the numbers: a maximum with a NaN in it is NaN.
    if bits.size and np.isnan(bits.view(np.float32).max()):
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        kept = (bits[nan] >> np.uint32(16)).astype(np.uint16)
        # A NaN whose payload is in the lower half alone would turn into an infinity.
        kept[(kept & 0x7F) == 0] |= np.uint16(0x40)
        rounded[nan] = kept
    return rounded


def _round_to_odd(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint32]:
    """Float64 as float32 bits, an inexact one at its odd neighbour: the next rounding is then right.

    Source: S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", IEEE Transactions on Computers 57(4), 2008.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        back = near.astype(np.float64)
    bits: npt.NDArray[np.uint32] = near.view(np.uint32)
    even = (back != values) & ~np.isnan(values) & ((bits & np.uint32(1)) == 0)
    beyond = np.abs(back) > np.abs(values)
    bits[even & beyond] -= np.uint32(1)
    bits[even & ~beyond] += np.uint32(1)
    return bits
