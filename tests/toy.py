"""Toy checkpoints: a small transformer in numpy, with attention, rotary pairs, grouped heads and two kinds of
experts, its spec, and folders of it as save_pretrained would write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from unmergeable.checkpoint import build_shard, to_bits, to_float64
from unmergeable.derive import Key
from unmergeable.lock import lock
from unmergeable.report import LockReport
from unmergeable.spec import Spec

HIDDEN, VOCAB, LAYERS = 24, 40, 2
CONFIG: dict[str, Any] = {
    "architectures": ["ToyModel"],
    "model_type": "toy",
    "layers": LAYERS,
    "kv": 3,
    "heads": 6,
    "head_dim": 8,
    "ff": 12,
    "experts": 4,
    "torch_dtype": "bfloat16",
}
_SIZES = {
    "g": "kv",
    "r": "heads // kv",
    "a": "head_dim // 2",
    "c": "2",
    "f": "ff",
    "e": "experts",
    "j": "head_dim",
}


def key(seed: int = 1) -> Key:
    """A key that is always the same."""
    return Key(bytes([seed]) * 32)


def _slot(tensor: str, index: dict[str, str], power: int = 1) -> dict[str, Any]:
    return {"tensor": f"l.{{l}}.{tensor}", "index": index, "power": power}


def _site(
    name: str, kind: str, acts: str, per: list[str], group: str, slots: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "name": f"l.{{l}}.{name}",
        "kind": kind,
        "acts": acts,
        "per": per,
        "group": group,
        "sizes": _SIZES,
        "slots": slots,
        "evidence": {"error": 1e-12},
    }


def spec_dict() -> dict[str, Any]:
    """The toy's spec as JSON."""
    q, k, v, o = "q.weight", "k.weight", "v.weight", "o.weight"
    sites = [
        _site("qk", "qk", "c", ["l", "g", "a"], "complex",
              [_slot(q, {"0": "g r c a"}, -1), _slot("q.bias", {"0": "g r c a"}, -1),
               _slot(k, {"0": "g c a"})]),
        _site("vo", "vo", "j", ["l", "g"], "general_linear",
              [_slot(v, {"0": "g j"}), _slot("v.bias", {"0": "g j"}), _slot(o, {"1": "g r j"}, -1)]),
        _site("mlp", "mlp", "f", ["l", "e"], "monomial",
              [_slot("gu", {"0": "e", "2": "f [1 | 1].0"}, 0), _slot("gu", {"0": "e", "2": "f [1 | 1].1"}),
               _slot("down", {"0": "e", "1": "f"}, -1)]),
        _site("x.{e}.named", "mlp", "f", ["l", "e"], "monomial",
              [_slot("x.{e}.gate", {"0": "f"}, 0), _slot("x.{e}.up", {"0": "f"}),
               _slot("x.{e}.down", {"1": "f"}, -1)]),
        _site("within", "heads", "r", ["l", "g"], "permutation",
              [_slot(q, {"0": "g r j"}), _slot("q.bias", {"0": "g r j"}), _slot(o, {"1": "g r j"})]),
        _site("heads", "heads", "g", ["l"], "permutation",
              [_slot(q, {"0": "g r j"}), _slot("q.bias", {"0": "g r j"}), _slot(k, {"0": "g j"}),
               _slot(v, {"0": "g j"}), _slot("v.bias", {"0": "g j"}), _slot(o, {"1": "g r j"})]),
        _site("fused", "experts", "e", ["l"], "permutation",
              [_slot("gu", {"0": "e"}), _slot("down", {"0": "e"}), _slot("router", {"0": "e"})]),
        _site("apart", "experts", "e", ["l"], "permutation",
              [_slot("x.{e}.gate", {}), _slot("x.{e}.up", {}), _slot("x.{e}.down", {}),
               _slot("x_router", {"0": "e"})]),
    ]  # fmt: skip
    return {
        "format": 1,
        "architecture": "ToyModel",
        "model_type": "toy",
        "layout": "canonical",
        "configs": [{}],
        "defaults": {},
        "sites": sites,
        "refused": [{"site": "l.{l}.norm", "reason": "a norm has no symmetry of its own"}],
        "untouched": ["embed", "l.{l}.norm"],
        "ignored": ["steps"],
        "evidence": {},
    }


def spec() -> Spec:
    """The toy's spec."""
    return Spec.from_dict(spec_dict())


def tensors(seed: int = 0, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Random weights, float64."""
    rng = np.random.default_rng(seed)
    kv, heads, hd, ff, experts = (CONFIG[n] for n in ("kv", "heads", "head_dim", "ff", "experts"))
    shapes: dict[str, tuple[int, ...]] = {"embed": (VOCAB, HIDDEN)}
    for n in range(layers):
        shapes |= {
            f"l.{n}.norm": (HIDDEN,),
            f"l.{n}.q.weight": (heads * hd, HIDDEN),
            f"l.{n}.q.bias": (heads * hd,),
            f"l.{n}.k.weight": (kv * hd, HIDDEN),
            f"l.{n}.v.weight": (kv * hd, HIDDEN),
            f"l.{n}.v.bias": (kv * hd,),
            f"l.{n}.o.weight": (HIDDEN, heads * hd),
            f"l.{n}.gu": (experts, HIDDEN, 2 * ff),
            f"l.{n}.down": (experts, ff, HIDDEN),
            f"l.{n}.router": (experts, HIDDEN),
            f"l.{n}.x_router": (experts, HIDDEN),
        }
        for e in range(experts):
            shapes |= {
                f"l.{n}.x.{e}.gate": (ff, HIDDEN),
                f"l.{n}.x.{e}.up": (ff, HIDDEN),
                f"l.{n}.x.{e}.down": (HIDDEN, ff),
            }
    out = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return out


def forward(weights: dict[str, np.ndarray], layers: int = LAYERS) -> np.ndarray:
    """The network on seven fixed tokens, float64: [7, VOCAB]."""
    kv, heads, hd, experts = (CONFIG[n] for n in ("kv", "heads", "head_dim", "experts"))
    group = heads // kv
    x = weights["embed"][np.array([1, 5, 2, 33, 17, 8, 9])]
    steps = np.arange(7)[:, None] * np.array([1, 0.5, 0.2, 0.1])
    cos, sin = np.cos(steps), np.sin(steps)

    def turn(z: np.ndarray, c: np.ndarray, s: np.ndarray) -> np.ndarray:
        first, second = z[..., 0, :], z[..., 1, :]
        return np.stack([first * c - second * s, first * s + second * c], -2)

    def normed(z: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return z / np.linalg.norm(z, axis=-1, keepdims=True) * 4 * (1 + 0.1 * scale)

    for n in range(layers):
        w = {
            name.removeprefix(f"l.{n}."): value
            for name, value in weights.items()
            if name.startswith(f"l.{n}.")
        }
        h = normed(x, w["norm"])
        q = (h @ w["q.weight"].T + w["q.bias"]).reshape(7, kv, group, 2, hd // 2)
        k = (h @ w["k.weight"].T).reshape(7, kv, 2, hd // 2)
        q, k = turn(q, cos[:, None, None], sin[:, None, None]), turn(k, cos[:, None], sin[:, None])
        a = np.exp(np.einsum("ngrca,mgca->grnm", q, k) / 60)
        a /= a.sum(-1, keepdims=True)
        v = (h @ w["v.weight"].T + w["v.bias"]).reshape(7, kv, hd)
        x = x + np.einsum("grnm,mgj->ngrj", a, v).reshape(7, heads * hd) @ w["o.weight"].T / 10
        h = normed(x, w["norm"])
        p = np.exp(h @ w["router"].T / 10)
        gu = np.einsum("nh,ehf->nef", h, w["gu"])
        x = x + np.einsum("nef,efh,ne->nh", np.tanh(gu[..., 0::2]) * gu[..., 1::2], w["down"], p) / 100
        p = np.exp(h @ w["x_router"].T / 10)
        for e in range(experts):
            inner = np.tanh(h @ w[f"x.{e}.gate"].T) * (h @ w[f"x.{e}.up"].T)
            x = x + inner @ w[f"x.{e}.down"].T * p[:, e : e + 1] / 100
    return np.asarray(normed(x, np.zeros(HIDDEN)) @ weights["embed"].T)


def write(
    folder: Path,
    values: dict[str, np.ndarray],
    *,
    dtype: str = "BF16",
    shards: int = 1,
    config: dict[str, Any] | None = CONFIG,
    extra: dict[str, bytes] | None = None,
) -> Path:
    """A checkpoint folder: model.safetensors, or shards and their index; config.json; other files."""
    folder.mkdir(parents=True)
    names = sorted(values)
    if shards == 1:
        write_file(folder / "model.safetensors", {name: values[name] for name in names}, dtype=dtype)
    else:
        weight_map = {}
        for k in range(shards):
            file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
            own = {name: values[name] for name in names[k::shards]}
            write_file(folder / file, own, dtype=dtype)
            weight_map |= dict.fromkeys(own, file)
        total = (
            sum(value.size for value in values.values()) * {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}[dtype]
        )
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, data in (extra or {"tokenizer.json": b'{"a": 1}', "notes/readme.txt": b"hello\n"}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_file(path: Path, values: dict[str, np.ndarray], *, dtype: str = "BF16") -> Path:
    """One safetensors file; integers are stored as I64."""
    kinds = {name: dtype if value.dtype.kind == "f" else "I64" for name, value in values.items()}
    shard = build_shard(path.name, [(n, kinds[n], v.shape) for n, v in values.items()], {"format": "pt"})
    with open(path, "wb") as file:
        file.write(shard.header)
        for name, value in values.items():
            file.write((value if kinds[name] == "I64" else to_bits(value, kinds[name])).tobytes())
    return path


def locked(src: Path, dst: Path, **more: Any) -> LockReport:
    """A folder of the toy locked: what `lock` is given by default, its key and its spec."""
    return lock(src, dst, **{"key": key(), "spec": spec(), **more})


def nothing_at(dst: Path) -> bool:
    """Whether nothing was written there, nor anything left beside it on the way."""
    return not dst.exists() and not [p for p in dst.parent.iterdir() if p.name.startswith(f".{dst.name}.")]


def load(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder or file, float64 where they are floating-point."""
    from unmergeable.checkpoint import open_checkpoint

    with open_checkpoint(path) as found:
        return {
            name: to_float64(found.read(name), info.dtype) if info.dtype != "I64" else found.read(name)
            for name, info in found.tensors.items()
        }


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder (or one file): mode and bytes by relative name; folders too."""
    if path.is_file():
        return {path.name: (path.stat().st_mode, path.read_bytes())}
    return {
        str(item.relative_to(path)): (item.stat().st_mode, item.read_bytes() if item.is_file() else b"")
        for item in sorted(path.rglob("*"))
    }
