"""A model is locked by both of the methods that change all of it, and the exact lock undone."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path

import toy
import unmergeable as um
from unmergeable.report import LockReport


def locks(folder: Path) -> Iterator[tuple[str, LockReport]]:
    """Lock folder/model as folder/exact and folder/gauge, one by one; then undo the exact one, to the bit."""
    for method in ("exact", "gauge"):
        yield method, um.lock(folder / "model", folder / method, key=toy.key(), method=method)
    um.unlock(folder / "exact", folder / "back", key=toy.key())
    name = "model.safetensors"
    assert filecmp.cmp(folder / "model" / name, folder / "back" / name, shallow=False)
