"""A toy network with its spec, a key, and a small trained MLP, for the tests of `params`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from unmergeable.checkpoint import TensorInfo
from unmergeable.derive import Key
from unmergeable.match import Match, match_spec
from unmergeable.methods import Context, Drawn, method
from unmergeable.spec import Spec
from unmergeable.transform import apply_bits, apply_floats, compile_tensor

KEY, SALT = Key(bytes(range(32))), bytes(range(100, 132))
CONFIG = {"kv": 3, "heads": 6, "hd": 8, "ff": 40, "ex": 3}
H = 20
Tensors = dict[str, np.ndarray]


def toy_spec(qk: str = "complex", vo: str = "general_linear", mlp: str = "monomial") -> Spec:
    """Two layers: rotated or plain queries and keys, grouped values, gated experts in fused tensors."""
    sizes = {"g": "kv", "r": "heads // kv", "f": "ff", "e": "ex", "j": "hd"}

    def slot(tensor: str, power: int = 1, **index: str) -> dict[str, Any]:
        axes = {axis[1:]: text for axis, text in index.items()}
        return {"tensor": "l.{l}." + tensor, "index": axes, "power": power}

    if qk == "complex":
        sizes |= {"a": "hd // 2", "c": "2"}
        queries = {
            "acts": "c",
            "per": ["l", "g", "a"],
            "slots": [slot("q", -1, _0="g r c a"), slot("k", 1, _0="g c a")],
        }
    else:
        queries = {
            "acts": "j",
            "per": ["l", "g"],
            "slots": [slot("q", -1, _0="g r j"), slot("k", 1, _0="g j")],
        }
    sites = [
        {"name": "l.{l}.qk", "kind": "qk", "group": qk, "sizes": sizes, **queries},
        {
            "name": "l.{l}.vo",
            "kind": "vo",
            "acts": "j",
            "per": ["l", "g"],
            "group": vo,
            "sizes": sizes,
            "slots": [slot("v", 1, _0="g j"), slot("o", -1, _1="g r j")],
        },
        {
            "name": "l.{l}.mlp",
            "kind": "mlp",
            "acts": "f",
            "per": ["l", "e"],
            "group": mlp,
            "sizes": sizes,
            "slots": [
                slot("gu", 0, _0="e", _2="f [1|1].0"),
                slot("gu", 1, _0="e", _2="f [1|1].1"),
                slot("bias", 1, _0="e", _1="f"),
                slot("down", -1, _0="e", _1="f"),
            ],
        },
        {
            "name": "l.{l}.heads",
            "kind": "heads",
            "acts": "g",
            "per": ["l"],
            "group": "permutation",
            "sizes": sizes | {"x": "hd"},
            "slots": [slot("q", _0="g r x"), slot("k", _0="g x"), slot("v", _0="g x"), slot("o", _1="g r x")],
        },
    ]
    empty: dict[str, Any] = {
        "configs": [{}],
        "defaults": {},
        "refused": [],
        "untouched": [],
        "ignored": [],
    }
    return Spec.from_dict(
        {"format": 1, "architecture": "X", "model_type": "x", "layout": "canonical", "sites": sites, **empty}
    )


def toy_tensors(seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes = {"q": (48, H), "k": (24, H), "v": (24, H), "o": (H, 48)}
    shapes |= {"gu": (3, H, 80), "bias": (3, 40), "down": (3, 40, H)}
    return {
        f"l.{layer}.{name}": rng.normal(size=shape) for layer in range(2) for name, shape in shapes.items()
    }


def toy_output(tensors: Tensors, rotate: bool = True, seed: int = 9) -> np.ndarray:
    """The function of the toy network on seven positions, float64."""
    x = np.random.default_rng(seed).normal(size=(7, H))
    angle = np.arange(7)[:, None] * np.array([1, 0.5, 0.2, 0.1]) * rotate
    cos, sin = np.cos(angle), np.sin(angle)

    def turn(z: np.ndarray) -> np.ndarray:
        c, s = (w.reshape(7, *[1] * (z.ndim - 3), 4) for w in (cos, sin))
        return np.stack([z[..., 0, :] * c - z[..., 1, :] * s, z[..., 0, :] * s + z[..., 1, :] * c], -2)

    for layer in range(2):
        w = {name.split(".")[2]: value for name, value in tensors.items() if name.startswith(f"l.{layer}.")}
        q, k = turn((x @ w["q"].T).reshape(7, 3, 2, 2, 4)), turn((x @ w["k"].T).reshape(7, 3, 2, 4))
        a = np.exp(np.einsum("ngrca,mgca->grnm", q, k) / 30)
        v = (x @ w["v"].T).reshape(7, 3, 8)
        x = x + np.einsum("grnm,mgj->ngrj", a / a.sum(-1, keepdims=True), v).reshape(7, 48) @ w["o"].T
        gu = np.einsum("nh,ehf->nef", x, w["gu"])
        hidden = np.tanh(gu[..., 0::2]) * (gu[..., 1::2] + w["bias"])
        x = x + np.einsum("nef,efh->nh", hidden, w["down"])
        x = x / np.linalg.norm(x, axis=-1, keepdims=True) * 4
    return x


class Dictionary:
    """Float64 tensors as methods see a checkpoint, and as engines read one."""

    def __init__(self, values: Tensors) -> None:
        self.values = values
        self.tensors = {n: TensorInfo(n, "F64", v.shape, "x", 0, v.nbytes) for n, v in values.items()}

    def dtype(self, name: str) -> str:
        return "F64"

    def bits(self, name: str) -> np.ndarray:
        return self.values[name].view(np.uint64)

    def floats(self, name: str) -> np.ndarray:
        return self.values[name]

    read = bits

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.bits(name)[start:stop]

    def readinto(self, name: str, offset: int, out: memoryview) -> None:
        out[:] = np.ascontiguousarray(self.values[name]).tobytes()[offset : offset + len(out)]


def draw(
    match: Match, tensors: Tensors | None, base: Tensors | None = None, recorded: Any = None, **options: Any
) -> Drawn:
    source = None if tensors is None else Dictionary(tensors)
    reference = None if base is None else Dictionary(base)
    return method("params").draw(Context(match, KEY, SALT, source, reference, options, recorded))


def toy_match(spec: Spec, tensors: Tensors) -> Match:
    return match_spec(spec, {name: value.shape for name, value in tensors.items()}, CONFIG)


def apply(match: Match, drawn: Drawn, tensors: Tensors, undo: bool = False) -> Tensors:
    """Every tensor under its plan, by bits where that is exact."""
    out = {}
    for name in tensors:
        plan = compile_tensor(match, drawn.elements, name, undo=undo)
        source = tensors[plan.source]
        if plan.exact:
            out[name] = apply_bits(source.view(np.uint64), "F64", plan.steps).view(np.float64)
        else:
            out[name] = apply_floats(source, plan.steps)
    return out


MLP_SPEC = Spec.from_dict(
    {
        "format": 1, "architecture": "M", "model_type": "m", "layout": "canonical",
        "configs": [{}], "defaults": {}, "refused": [], "untouched": [], "ignored": [],
        "sites": [
            {
                "name": "mlp", "kind": "mlp", "acts": "f", "per": [], "group": "permutation",
                "sizes": {"f": "ff"},
                "slots": [
                    {"tensor": "up", "index": {"0": "f"}},
                    {"tensor": "bias", "index": {"0": "f"}},
                    {"tensor": "down", "index": {"1": "f"}},
                ],
            }
        ],
    }
)  # fmt: skip


@lru_cache(maxsize=1)
def trained_pair(n: int = 96, width: int = 24) -> tuple[Tensors, Tensors]:
    """A base MLP trained on one random task, and its fine-tune on another: float64 numpy, plain descent.

    Both are shared between tests, which must not write to them.
    """
    rng = np.random.default_rng(3)
    x = rng.normal(size=(512, width))
    tasks = [np.tanh(x @ rng.normal(size=(width, width)) / 3) for _ in range(2)]
    w = {
        "up": rng.normal(size=(n, width)) / np.sqrt(width),
        "bias": np.zeros(n),
        "down": rng.normal(size=(width, n)) / np.sqrt(n),
    }

    def descend(w: Tensors, y: np.ndarray, steps: int, rate: float) -> Tensors:
        w = {name: value.copy() for name, value in w.items()}
        for _ in range(steps):
            pre = x @ w["up"].T + w["bias"]
            hidden = np.maximum(pre, 0)
            error = (hidden @ w["down"].T - y) / len(x)
            back = (error @ w["down"]) * (pre > 0)
            w["down"] -= rate * error.T @ hidden
            w["up"] -= rate * back.T @ x
            w["bias"] -= rate * back.sum(0)
        return w

    base = descend(w, tasks[0], 800, 0.5)
    return base, descend(base, 0.7 * tasks[0] + 0.3 * tasks[1], 150, 0.3)
