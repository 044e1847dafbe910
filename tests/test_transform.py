"""Random specs: whatever the layout, a drawn element leaves the function alone and its inverse brings it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmergeable.checkpoint import bits_dtype, to_bits, to_float64
from unmergeable.derive import Key
from unmergeable.index import parse_index
from unmergeable.match import Match, match_spec
from unmergeable.methods import Context, method
from unmergeable.spec import Site, Slot, Spec
from unmergeable.transform import Take, apply_bits, apply_floats, compile_tensor

SALT = bytes(range(32))
TOKENS = 5


@dataclass(frozen=True)
class Block:
    """One random attention and MLP block: its sizes, the layout of its tensors, and what its groups are."""

    g: int
    r: int
    a: int
    f: int
    fused: str  # "no", "parts" or "heads"
    rotary: str  # "", "c a" or "a c"
    gate: str  # "relu", "cat" or "interleaved"
    bias: bool
    hidden: int

    @property
    def d(self) -> int:
        return 2 * self.a

    @property
    def config(self) -> dict[str, int]:
        return {"g": self.g, "r": self.r, "a": self.a, "f": self.f, "d": self.d, "c": 2}

    def rows(self, part: int, inner: str) -> str:
        """The index of the queries (0), keys (1) or values (2) with the head dim written as `inner`."""
        if self.fused == "no":
            return f"g r {inner}" if part == 0 else f"g {inner}"
        body = (
            f"[g r {inner} | g {inner} | g {inner}]"
            if self.fused == "parts"
            else f"g [r {inner} | {inner} | {inner}]"
        )
        return f"{body}.{part}"

    def tensor(self, part: int) -> str:
        return ("q", "k", "v")[part] if self.fused == "no" else "qkv"

    def spec(self) -> Spec:
        sizes = {name: name for name in self.config}

        def slots(part: int, inner: str, power: int) -> list[Slot]:
            index = self.rows(part, inner)
            out = [Slot(f"{self.tensor(part)}.weight", {0: index}, power)]
            return out + ([Slot(f"{self.tensor(part)}.bias", {0: index}, power)] if self.bias else [])

        inner, acts, per, group = (
            (self.rotary, "c", ("g", "a"), "complex") if self.rotary else ("d", "d", ("g",), "general_linear")
        )
        qk = (*slots(0, inner, -1), *slots(1, inner, +1))
        vo = (*slots(2, "d", +1), Slot("o.weight", {1: "g r d"}, -1))
        heads = tuple(Slot(s.tensor, s.index) for part in range(3) for s in slots(part, "d", 1))
        own = tuple(Slot(s.tensor, s.index) for s in slots(0, "d", 1))
        out = Slot("o.weight", {1: "g r d"})
        if self.gate == "relu":
            mlp_group, mlp = "positive_monomial", [Slot("up.weight", {0: "f"}, 1)]
            mlp += [Slot("up.bias", {0: "f"}, 1)] if self.bias else []
        else:
            layout = "[f | f]" if self.gate == "cat" else "f [1 | 1]"
            mlp_group, mlp = "monomial", [Slot("up.weight", {0: f"{layout}.{k}"}, k) for k in (0, 1)]
        mlp.append(Slot("down.weight", {1: "f"}, -1))
        sites = (
            Site("qk", "qk", acts, per, group, sizes, qk),
            Site("vo", "vo", "d", ("g",), "general_linear", sizes, vo),
            Site("mlp", "mlp", "f", (), mlp_group, sizes, tuple(mlp)),
            Site("within", "heads", "r", ("g",), "permutation", sizes, (*own, out)),
            Site("heads", "heads", "g", (), "permutation", sizes, (*heads, out)),
        )
        return Spec("X", "x", "disk", ({},), {}, sites)

    def weights(self, seed: int) -> dict[str, np.ndarray]:
        rng, h, q, kv = np.random.default_rng(seed), self.hidden, self.g * self.r * self.d, self.g * self.d
        shapes: dict[str, tuple[int, ...]] = {"o.weight": (h, q), "down.weight": (h, self.f)}
        parts = {"q": q, "k": kv, "v": kv} if self.fused == "no" else {"qkv": q + 2 * kv}
        parts["up"] = self.f if self.gate == "relu" else 2 * self.f
        for name, rows in parts.items():
            shapes[f"{name}.weight"] = (rows, h)
            if self.bias and not (name == "up" and self.gate != "relu"):
                shapes[f"{name}.bias"] = (rows,)
        return {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def forward(self, w: dict[str, np.ndarray]) -> np.ndarray:
        x = np.random.default_rng(99).normal(size=(TOKENS, self.hidden)) / self.hidden**0.5

        def part(number: int, dims: str) -> np.ndarray:
            name, view = self.tensor(number), parse_index(self.rows(number, dims)).view(self.config)
            y = x @ w[f"{name}.weight"].T + (w[f"{name}.bias"] if self.bias else 0)
            return y[:, view.positions()]

        inner = self.rotary or "d"
        q, k, v = part(0, inner), part(1, inner), part(2, "d")
        if self.rotary:
            turn = np.exp(1j * np.outer(np.arange(TOKENS), 1.0 / (1 + np.arange(self.a))))
            axis = -2 if self.rotary == "c a" else -1

            def rotate(z: np.ndarray, lead: int) -> np.ndarray:
                pair = np.take(z, 0, axis) + 1j * np.take(z, 1, axis)
                pair = pair * turn.reshape(TOKENS, *(1,) * lead, self.a)
                return np.stack([pair.real, pair.imag], axis=axis)

            q, k = rotate(q, 2).reshape(TOKENS, self.g, self.r, -1), rotate(k, 1).reshape(TOKENS, self.g, -1)
        scores = np.einsum("ngrd,mgd->grnm", q, k) / self.d
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        y = np.einsum("grnm,mgd->ngrd", p, v).reshape(TOKENS, -1) @ w["o.weight"].T
        u = y @ w["up.weight"].T
        if self.gate == "relu":
            z = np.maximum(u + (w["up.bias"] if self.bias else 0), 0)
        else:
            halves = (u[:, : self.f], u[:, self.f :]) if self.gate == "cat" else (u[:, ::2], u[:, 1::2])
            z = np.tanh(halves[0]) * halves[1]
        return np.asarray(z @ w["down.weight"].T)


blocks = st.builds(
    Block,
    g=st.integers(1, 3),
    r=st.integers(1, 3),
    a=st.integers(2, 4),
    f=st.integers(4, 9),
    fused=st.sampled_from(["no", "parts", "heads"]),
    rotary=st.sampled_from(["", "c a", "a c"]),
    gate=st.sampled_from(["relu", "cat", "interleaved"]),
    bias=st.booleans(),
    hidden=st.integers(6, 11),
)


def drawn(block: Block, name: str, seed: int) -> tuple[Match, Any]:
    weights = block.weights(seed)
    match = match_spec(block.spec(), {key: value.shape for key, value in weights.items()}, block.config)
    key = Key(bytes([seed + 1]) * 32)
    return match, method(name).draw(Context(match, key, SALT)).elements


@settings(deadline=None, max_examples=60)
@given(blocks, st.sampled_from(["exact", "gauge", "mergelock"]), st.integers(0, 200))
def test_the_function_is_preserved_and_the_inverse_undoes(block: Block, name: str, seed: int) -> None:
    weights = block.weights(seed)
    match, elements = drawn(block, name, seed)
    plans = {tensor: compile_tensor(match, elements, tensor) for tensor in weights}
    locked = {tensor: apply_floats(weights[plan.source], plan.steps) for tensor, plan in plans.items()}
    before, after = block.forward(weights), block.forward(locked)
    assert np.abs(after - before).max() <= 1e-9 * np.abs(before).max()
    touched = [tensor for tensor, plan in plans.items() if plan.steps]
    assert touched
    assert all(
        not np.allclose(locked[tensor], weights[tensor]) for tensor in touched if tensor.endswith("o.weight")
    )
    for tensor in weights:
        plan = compile_tensor(match, elements, tensor, undo=True)
        back = apply_floats(locked[plan.source], plan.steps)
        assert np.allclose(back, weights[tensor], rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(blocks, st.sampled_from(["BF16", "F16", "F32", "F64"]), st.integers(0, 200))
def test_exact_moves_raw_bits_and_agrees_with_floats(block: Block, dtype: str, seed: int) -> None:
    weights = block.weights(seed)
    match, elements = drawn(block, "exact", seed)
    bits = {name: to_bits(value, dtype) for name, value in weights.items()}
    for name in weights:
        plan = compile_tensor(match, elements, name)
        assert plan.exact
        locked = apply_bits(bits[plan.source], dtype, plan.steps)
        by_floats = to_bits(apply_floats(weights[plan.source], plan.steps), dtype)
        assert np.array_equal(locked, by_floats)
        back = compile_tensor(match, elements, name, undo=True)
        assert np.array_equal(apply_bits(locked, dtype, back.steps), bits[name])


@settings(deadline=None, max_examples=30)
@given(blocks, st.integers(0, 200))
def test_an_unbalanced_change_does_change_the_function(block: Block, seed: int) -> None:
    weights = block.weights(seed)
    match, elements = drawn(block, "gauge", seed)
    plan = compile_tensor(match, elements, "o.weight")
    half = {**weights, "o.weight": apply_floats(weights["o.weight"], plan.steps)}
    before = block.forward(weights)
    assert np.abs(block.forward(half) - before).max() > 1e-6 * np.abs(before).max()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("exponent", [-3, -1, 2, 3])
def test_powers_of_two_on_all_bit_patterns(dtype: str, exponent: int) -> None:
    """All 65,536 patterns: zeros, infinities and NaNs stay, the rest is the product, rounded to nearest.

    What keeps to the normal numbers loses nothing, so it comes back.
    """
    bits = np.arange(65536, dtype=bits_dtype(dtype)).reshape(1, -1)
    step = Take(0, np.array([0]), np.array([2.0**exponent]))
    scaled = apply_bits(bits, dtype, [step])
    mantissa, width = (7, 8) if dtype == "BF16" else (10, 5)
    field = (bits.astype(np.int64) >> mantissa) & ((1 << width) - 1)
    fraction = bits.astype(np.int64) & ((1 << mantissa) - 1)
    special = (field == (1 << width) - 1) | ((field == 0) & (fraction == 0))
    assert np.array_equal(scaled[special], bits[special])
    product = to_bits(to_float64(bits[~special], dtype) * 2.0**exponent, dtype)
    assert np.array_equal(scaled[~special], product)
    safe = (
        (field >= 1)
        & (field + exponent >= 1)
        & (field <= (1 << width) - 2)
        & (field + exponent <= (1 << width) - 2)
    )
    assert np.array_equal(apply_bits(scaled, dtype, [step.inverse()])[safe], bits[safe])


def test_weights_that_were_trained_round_instead_of_wrapping() -> None:
    bits = to_bits(np.array([[2.0**-14, 2.0**-13, 30000.0, -30000.0]]), "F16")
    down = apply_bits(bits, "F16", [Take(0, np.array([0]), np.array([2.0**-3]))])
    up = apply_bits(bits, "F16", [Take(0, np.array([0]), np.array([8.0]))])
    assert to_float64(down, "F16").tolist() == [[2.0**-17, 2.0**-16, 3750.0, -3750.0]]
    assert to_float64(up, "F16").tolist() == [[2.0**-11, 2.0**-10, np.inf, -np.inf]]
