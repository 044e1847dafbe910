"""Small checkpoints for the tests of the checkpoint layer, made by hand or by the safetensors library."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def arrays(seed: int = 0, count: int = 4) -> dict[str, np.ndarray]:
    """A few named arrays: float32 and float16 matrices, a vector, a scalar."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for i in range(count):
        found[f"layers.{i}.weight"] = rng.standard_normal((6, 4)).astype(np.float32)
        found[f"layers.{i}.bias"] = rng.standard_normal(6).astype(np.float16)
    found["scale"] = np.array(rng.standard_normal(), np.float32)
    return found


def folder(root: Path, *, shards: int = 1, seed: int = 0, config: dict[str, Any] | None = None) -> Path:
    """A folder as save_pretrained writes it, with one shard or several and an index."""
    root.mkdir(parents=True)
    named = arrays(seed)
    if shards == 1:
        save_file(named, root / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {name: named[name] for name in list(named)[i::shards]}
            save_file(part, root / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        write_index(root, weight_map)
    (root / "config.json").write_text(json.dumps({"model_type": "tiny"} if config is None else config))
    (root / "tokenizer.json").write_text('{"tok": 1}\n')
    return root


def write_index(root: Path, weight_map: dict[str, Any], name: str = "model.safetensors.index.json") -> None:
    """Writes an index with this weight map."""
    (root / name).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def edit_index(root: Path, **changes: Any) -> None:
    """Changes entries of the weight map; None removes one."""
    path = root / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"] | changes
    write_index(root, {name: file for name, file in weight_map.items() if file is not None})


def by_hand(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header: an object, or text or bytes as they are."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: list[Any], start: int, stop: int) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def snapshot(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything that a source must keep: names, kinds, modes, times of change, bytes, targets of links."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        content: Any = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_ino, content)
    return found
