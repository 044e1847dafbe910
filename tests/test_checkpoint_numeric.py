"""Bits to numbers and back: every pattern of the 16-bit formats, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmergeable.checkpoint import bits_dtype, is_float, to_bits, to_float32, to_float64
from unmergeable.errors import InputError

ALL = np.arange(65536, dtype=np.uint16)
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}
SPECIAL = [
    0.0, -0.0, 1.0, -1.5, 5e-324, 1e-310, 1.1754943508222875e-38, 65504.0, 65519.99, 65520.0,
    3.3895313892515355e38, 3.3961775292304695e38, 3.4028234663852886e38, 3.4028235677973366e38, 1e39,
    1.7e308, float("inf"),
]  # fmt: skip


def by_torch(dtype: str) -> torch.Tensor:
    return torch.from_numpy(ALL.copy().view(np.int16)).view(TORCH[dtype])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_all_patterns_read_as_torch_reads_them(dtype: str) -> None:
    for read, wide in ((to_float32, torch.float32), (to_float64, torch.float64)):
        ours = read(ALL, dtype)
        theirs = by_torch(dtype).to(wide).numpy()
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(np.signbit(ours), np.signbit(theirs))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("read", [to_float32, to_float64])
def test_all_patterns_survive_the_way_there_and_back(dtype: str, read: object) -> None:
    values = read(ALL, dtype)  # type: ignore[operator]
    back = to_bits(values, dtype)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(back[number], ALL[number])
    assert np.isnan(to_float32(back[~number], dtype)).all()


def test_bf16_nan_payloads_survive_float32() -> None:
    np.testing.assert_array_equal(to_bits(to_float32(ALL, "BF16"), "BF16"), ALL)


def test_a_nan_never_becomes_an_infinity() -> None:
    low = np.array([0x7F800001, 0xFF80FFFF], np.uint32).view(np.float32)
    assert np.isnan(to_float32(to_bits(low, "BF16"), "BF16")).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_midpoints_and_their_neighbours_round_as_torch_rounds(dtype: str) -> None:
    # Between any two neighbouring numbers of the format: the middle, and a hair to each side of it.
    exact = to_float32(ALL[(0x7F80 if dtype == "BF16" else 0x7C00) > ALL], dtype)
    middle = ((exact[:-1].astype(np.float64) + exact[1:]) / 2).astype(np.float32)
    hairs = [middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    with np.errstate(over="ignore"):
        special = np.array(SPECIAL).astype(np.float32)
    for values in (np.concatenate(hairs), -np.concatenate(hairs), special, -special):
        theirs = torch.from_numpy(values.copy()).to(TORCH[dtype]).view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(to_bits(values, dtype), theirs)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_float64_is_rounded_once(dtype: str) -> None:
    exact = to_float64(ALL[(0x7F80 if dtype == "BF16" else 0x7C00) > ALL], dtype)
    middle = (exact[:-1] + exact[1:]) / 2  # exact in float64
    even = ALL[: len(middle)] + (ALL[: len(middle)] & 1)
    np.testing.assert_array_equal(to_bits(middle, dtype), even)
    # A hair that float32 cannot hold decides: through float32 these would all go to the even side.
    np.testing.assert_array_equal(to_bits(np.nextafter(middle, np.inf), dtype), ALL[1 : len(middle) + 1])
    np.testing.assert_array_equal(to_bits(np.nextafter(middle, 0), dtype), ALL[: len(middle)])
    np.testing.assert_array_equal(
        to_bits(-np.nextafter(middle, np.inf), dtype), ALL[1 : len(middle) + 1] | 0x8000
    )


def test_bf16_from_float64_at_the_ends() -> None:
    values = np.array([*SPECIAL, *(-v for v in SPECIAL)])
    limit = (2 - 2**-8) * 2.0**127  # the middle between the largest number and what would be the next
    bits = to_bits(values, "BF16")
    back = to_float64(bits, "BF16")
    np.testing.assert_array_equal(np.isinf(back), np.abs(values) >= limit)
    np.testing.assert_array_equal(np.signbit(back), np.signbit(values))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=64), min_size=1, max_size=30))
def test_bf16_from_float64_is_the_nearest(numbers: list[float]) -> None:
    grid = to_float64(ALL[ALL < 0x7F80], "BF16")
    values = np.array(numbers)
    values = values[np.abs(values) <= grid[-1]]
    bits = to_bits(values, "BF16") & 0x7FFF
    error = np.abs(grid[bits] - np.abs(values))
    below, above = grid[np.maximum(bits, 1) - 1], grid[np.minimum(bits + 1, len(grid) - 1)]
    assert (error <= np.abs(np.abs(values) - below)).all()
    assert (error <= np.abs(above - np.abs(values))).all()


def test_wide_formats_keep_bits_shapes_and_memory() -> None:
    bits = np.random.default_rng(0).integers(0, 2**31, (3, 4), np.uint32)
    assert to_float32(bits, "F32").base is not None
    np.testing.assert_array_equal(to_bits(to_float32(bits, "F32"), "F32"), bits)
    wide = np.random.default_rng(0).standard_normal((2, 5))
    np.testing.assert_array_equal(to_float64(wide.view(np.uint64), "F64"), wide)
    np.testing.assert_array_equal(to_bits(wide, "F64"), wide.view(np.uint64))
    for dtype in ("F64", "F32", "F16", "BF16"):
        for shape in ((), (0, 3), (2, 3)):
            assert to_bits(np.zeros(shape), dtype).shape == shape
        assert to_bits(np.ones((3, 2)).T, dtype).shape == (2, 3)
        assert is_float(dtype)


def test_refuses_other_types() -> None:
    for dtype in ("I32", "F8_E4M3", "X"):
        assert not is_float(dtype)
        for read in (to_float32, to_float64):
            with pytest.raises(InputError, match="floating-point"):
                read(np.zeros(1, np.uint32), dtype)
        with pytest.raises(InputError, match="floating-point"):
            to_bits(np.zeros(1), dtype)
    with pytest.raises(InputError, match="float32 and float64"):
        to_bits(np.zeros(1, np.float16), "BF16")
    with pytest.raises(InputError, match="whole bytes"):
        bits_dtype("F4")
    assert bits_dtype("BOOL") == np.uint8
    assert bits_dtype("C64") == np.uint64
