"""The block-wise engine gives what the plain application of a plan gives, for any layout of sites."""

from __future__ import annotations

import numpy as np
import pytest

import toy
from unmergeable import execute
from unmergeable.checkpoint import to_bits
from unmergeable.execute import apply_plan, compile_chain
from unmergeable.groups import group
from unmergeable.match import match_spec
from unmergeable.methods import Context, method
from unmergeable.transform import Mix, Take, TensorPlan, apply_bits, apply_floats, compile_tensor


@pytest.fixture(params=[64, 4096, 1 << 20])
def small_blocks(request, monkeypatch):
    monkeypatch.setattr(execute, "BLOCK_BYTES", request.param)
    monkeypatch.setattr(execute, "DENSE_BLOCK_BYTES", request.param)
    monkeypatch.setattr(execute, "DIRECT_ROW_BYTES", request.param)


@pytest.mark.parametrize("name", ["exact", "gauge", "mergelock"])
@pytest.mark.parametrize("undo", [False, True])
def test_blocks_are_the_whole(small_blocks, name, undo):
    tensors = toy.tensors()
    match = match_spec(toy.spec(), {n: v.shape for n, v in tensors.items()}, toy.CONFIG)
    drawn = method(name).draw(Context(match, toy.key(), bytes(32), options={}))
    for tensor in tensors:
        plan = compile_tensor(match, drawn.elements, tensor, undo=undo)
        value = tensors[plan.source]
        got = apply_plan(value.view(np.uint64), plan, "F64").view(np.float64)
        if plan.exact:
            want = apply_bits(value.view(np.uint64), "F64", plan.steps).view(np.float64)
            assert np.array_equal(got, want)
        else:
            want = apply_floats(value, plan.steps)
            assert np.allclose(got, want, rtol=1e-12, atol=1e-12)


class Words:
    """A stream of a library's random numbers, for tests."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def permutation(self, n, batch=None):
        return np.argsort(self.rng.random((batch or 1, n)), axis=1)[slice(None) if batch else 0]

    def signs(self, shape):
        return (self.rng.integers(0, 2, shape) * 2 - 1).astype(np.int8)

    def uniform(self, shape):
        return self.rng.random(shape)

    def integers(self, bound, shape):
        return self.rng.integers(0, bound, shape)


def mix(rng, axis, length, n, stray):
    """Matrices on blocks of an axis; with `stray`, blocks lie anywhere and leave some positions out."""
    order = rng.permutation(length) if stray else np.arange(length)
    count = length // n - (1 if stray else 0)
    positions = order[: count * n].reshape(count, n, 1)
    dense = group("general_linear").draw_dense(Words(int(rng.integers(99))), count, n, 5.0)
    return Mix(axis, positions, dense.matrix(1), dense.inverse().matrix(1))


@pytest.mark.parametrize("seed", range(25))
def test_random_plans(small_blocks, seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(6, 40, int(rng.integers(1, 4))))
    steps = []
    for _ in range(int(rng.integers(1, 6))):
        axis = int(rng.integers(len(shape)))
        if rng.random() < 0.5:
            factor = rng.choice([-2.0, -1.0, 1.0, 0.5], shape[axis]) if rng.random() < 0.7 else None
            steps.append(Take(axis, rng.permutation(shape[axis]), factor))
        else:
            steps.append(mix(rng, axis, shape[axis], int(rng.integers(1, 5)), bool(rng.integers(2))))
    plan, value = TensorPlan("x", tuple(steps)), rng.normal(size=shape)
    got = apply_plan(value.view(np.uint64), plan, "F64").view(np.float64)
    assert np.allclose(got, apply_floats(value, plan.steps), rtol=1e-11, atol=1e-11)
    exact = TensorPlan("x", tuple(step for step in steps if isinstance(step, Take)))
    bits = to_bits(value, "BF16")
    assert np.array_equal(apply_plan(bits, exact, "BF16"), apply_bits(bits, "BF16", exact.steps))


def test_rows_that_stay_are_never_read_as_a_whole():
    take = Take(1, np.random.default_rng(0).permutation(4096), None)
    chain = compile_chain(TensorPlan("x", (take,)), (4096, 4096), "BF16", "BF16")
    assert not chain.whole
    assert chain.memory < 8 * execute.BLOCK_BYTES
    moved = compile_chain(TensorPlan("x", (Take(0, take.take, None),)), (4096, 4096), "BF16", "BF16")
    assert moved.whole
    assert moved.memory < 4096 * 4096 * 2 + 8 * execute.BLOCK_BYTES
    slices = Take(0, np.arange(8)[::-1].copy(), None)  # whole matrices that change places are read one by one
    assert not compile_chain(TensorPlan("x", (slices,)), (8, 512, 512), "BF16", "BF16").whole
