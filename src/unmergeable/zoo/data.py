"""Where the embedded models and images lie, and how to read them. numpy only."""

from __future__ import annotations

import json
import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

BASE = "base"
SPLITS = ("test", "few")


def _root() -> Path:
    root = files(__package__)
    if not isinstance(root, Path):
        raise InputError(
            "the embedded zoo is inside an archive", where=root, hint="install the package unzipped"
        )
    return root


@cache
def facts() -> dict[str, Any]:
    """What `bench/make_zoo.py` measured and how it ran: tasks, merges, seed, versions, command."""
    document: dict[str, Any] = json.loads((_root() / "zoo.json").read_text(encoding="utf-8"))
    return document


def tasks() -> list[str]:
    """The tasks, which are also the names of the fine-tunes."""
    return list(facts()["tasks"])


def _check(task: str) -> str:
    if task not in tasks():
        raise InputError(f"the embedded zoo has no task {task!r}", expected=", ".join(tasks()))
    return task


def model_path(name: str) -> Path:
    """The folder of `base` or of a task's fine-tune, as `save_pretrained` writes it.

    The base's head has the classes of all tasks; a fine-tune's head is its task's rows of it. So no head
    has the shape of the base's, and mergers leave heads alone: they are private to their tasks.

    Raises:
        InputError: no such model.
    """
    return _root() / "models" / (name if name == BASE else _check(name))


def labels(task: str) -> list[str]:
    """The names of a task's classes, in the order of its head's rows."""
    config = json.loads((model_path(_check(task)) / "config.json").read_text(encoding="utf-8"))
    names: dict[str, str] = config["id2label"]
    return [names[str(index)] for index in range(len(names))]


def images(task: str, split: str = "test") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A task's images (n, 28, 28), white on black, and their labels (n,).

    Any prefix is balanced to within one image a class. `test` was never trained on (and holds no font
    family that was); `few` is 16 training images a class, for attacks that are given labels.

    Raises:
        InputError: no such task or split.
    """
    if split not in SPLITS:
        raise InputError(f"the embedded zoo has no split {split!r}", expected=", ".join(SPLITS))
    with np.load(_root() / "data" / f"{_check(task)}.npz", allow_pickle=False) as file:
        return file[f"{split}_images"], file[f"{split}_labels"].astype(np.int64)


def pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, 28, 28) uint8 -> (n, 1, 28, 28) float32 in -1 to 1, as the models were trained."""
    return (images[:, None].astype(np.float32) / np.float32(127.5)) - np.float32(1)


def copy_to(folder: str | Path) -> dict[str, Path]:
    """Copies every model out, writable, to `folder/NAME`; returns the folders by name.

    Raises:
        InputError: one of them exists already.
    """
    copies = {name: Path(folder) / name for name in (BASE, *tasks())}
    for copy in copies.values():
        if copy.exists():
            raise InputError("destination exists", where=copy, hint="choose a folder without it")
    for name, copy in copies.items():
        copy.mkdir(parents=True)
        for file in sorted(model_path(name).iterdir()):
            shutil.copyfile(file, copy / file.name)
    return copies
