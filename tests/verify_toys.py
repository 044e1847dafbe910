"""Locks of the toy by every method, ways to tamper with them, and short questions to certificates."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import toy
from unmergeable.certificate import Certificate, Check
from unmergeable.checkpoint import open_checkpoint, to_bits, to_float64
from unmergeable.lock import lock
from unmergeable.manifest import Component, Manifest
from unmergeable.verify import verify

Edit = Callable[[np.ndarray], np.ndarray]


def make_models(root: Path) -> Path:
    """A folder with `src`, and locks of it by method."""
    toy.write(root / "src", toy.tensors(layers=1), shards=2)
    for method in ("exact", "gauge", "mergelock"):
        lock(root / "src", root / method, key=toy.key(), spec=toy.spec(), method=method)
    return root


def check(src: Path, dst: Path, **options: Any) -> Certificate:
    return verify(src, dst, **{"spec": toy.spec(), "run": "never", **options})


def copy(models: Path, tmp_path: Path, method: str = "exact") -> Path:
    return Path(shutil.copytree(models / method, tmp_path / "copy"))


def edit(folder: Path, name: str, change: Edit, *, refresh: bool = False) -> None:
    """Change a tensor on disk; with `refresh` the manifest's hash of it and its signature as well."""
    with open_checkpoint(folder) as found:
        info = found.tensors[name]
        bits = to_bits(change(to_float64(found.read(name), info.dtype)), info.dtype)
    path = folder / info.file if folder.is_dir() else folder
    with open(path, "r+b") as file:
        file.seek(info.start)
        file.write(bits.tobytes())
    if refresh:
        resign(folder, {name: hashlib.sha256(bits.tobytes()).hexdigest()})


def resign(folder: Path, tensors: dict[str, str], **fields: Any) -> None:
    path = folder / "unmergeable.json"
    manifest = Manifest.read(path)
    part = manifest.components["."]
    part = Component(part.spec, {**part.tensors, **tensors}, part.shards, part.files)
    manifest = replace(manifest, components={".": part}, **fields).sign(toy.key())
    path.unlink()
    manifest.write(path)


def named(certificate: Certificate, name: str) -> Check:
    return next(check for check in certificate.checks if check.name == name)


def failed(certificate: Certificate) -> list[str]:
    return [check.name for check in certificate.checks if check.held is False]
