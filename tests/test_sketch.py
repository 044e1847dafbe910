"""Sketches are projections, rows are matched, and findings say whether they hold."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity_toys import Memory
from unmergeable.errors import InputError
from unmergeable.identities import Finding
from unmergeable.matching import match_rows
from unmergeable.sketch import BLOCK, PROBES, probes, sketch_tensor


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rows_are_matched(n: int, m: int, seed: int, noisy: bool) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(-2, 3, (n, m)).astype(float)  # with many copies
    perm = rng.permutation(n)
    b = a[perm] + (1e-4 * rng.normal(size=(n, m)) if noisy else 0.0)
    found = match_rows(a, b)
    assert sorted(found) == list(range(n))
    assert np.abs(b[found] - a).max() <= 1e-3


def test_many_noisy_rows_are_matched_and_foreign_ones_still_permuted() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5000, 6))
    perm = rng.permutation(5000)
    found = match_rows(a, a[perm] + 1e-5 * rng.normal(size=a.shape))
    assert np.array_equal(perm[found], np.arange(5000))
    found = match_rows(a, rng.normal(size=a.shape))
    assert np.array_equal(np.sort(found), np.arange(5000))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((300, 400), (0,)),
        ((300, 400), (1,)),
        ((5, 130, 70), (0, 2)),
        ((5, 130, 70), (1,)),
        ((5, 13, 7), (0, 1, 2)),
        ((3, 200000), (0,)),
        ((200000, 3), (1,)),
        ((3, 4, 5, 6), (1,)),
        ((3, 4, 5, 6), (0, 2)),
        ((9,), (0,)),
        ((6, 1, 3), (0,)),
    ],
)
def test_sketches_are_projections(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    value = rng.normal(size=shape)
    memory = Memory({"x": value})
    seen: list[bytes] = []
    found = sketch_tensor(
        memory, memory.tensors["x"], axes, norms=True, on_bytes=lambda b: seen.append(bytes(b))
    )
    assert b"".join(seen) == value.tobytes()
    assert found.norms is not None
    others = tuple(axis for axis in range(len(shape)) if axis not in axes)
    assert np.allclose(found.norms, np.sqrt((value**2).sum(axis=others)), rtol=1e-12)
    kept = tuple(shape[axis] for axis in axes)
    assert found.values.shape == (*kept, PROBES if prod(kept) < value.size else 1)
    # linear in the tensor, and no element is without weight
    flat = rng.integers(value.size)
    changed = value.copy()
    changed.reshape(-1)[flat] += 1.0
    other = sketch_tensor(Memory({"x": changed}), memory.tensors["x"], axes)
    at = tuple(np.unravel_index(flat, shape)[axis] for axis in axes)
    gap = other.values - found.values
    assert np.abs(gap[at]).min() >= 0.24
    gap[at] = 0
    assert np.abs(gap).max() < 1e-12


def test_large_matrices_are_projected_in_blocks_as_in_one() -> None:
    rng = np.random.default_rng(1)
    value = rng.normal(size=(1000, 700))
    assert value.size > BLOCK
    memory = Memory({"x": value}, "BF16")
    values = memory.floats("x")
    rows_ = sketch_tensor(memory, memory.tensors["x"], (0,), seed=3).values
    assert np.allclose(rows_, values @ probes(700, 3), rtol=1e-12, atol=1e-11)
    columns = sketch_tensor(memory, memory.tensors["x"], (1,), seed=3).values
    assert np.allclose(columns, values.T @ probes(1000, 3), rtol=1e-12, atol=1e-11)


def test_too_many_separate_axes_are_refused() -> None:
    memory = Memory({"x": np.zeros((2, 2, 2, 2, 2))})
    with pytest.raises(InputError, match="too many separate axes"):
        sketch_tensor(memory, memory.tensors["x"], (0, 2, 4))


def test_findings_say_whether_they_hold() -> None:
    finding = Finding(0, "x", 1e-11, 1e-10)
    assert finding.held
    assert not replace(finding, measured=float("nan")).held
    assert not replace(finding, measured=float("inf")).held
