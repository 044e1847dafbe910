"""Rows on disk by the hash of everything that they depend on: an audit that was stopped goes on where it was.

One file a row, an npz without pickles: a JSON text, and the scores of its points.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..checkpoint import replacing
from ..errors import InputError
from .rows import LEVELS, SIDES, Cost, Floats, Look, Point, Row, State

# Part of every key: raise it when an attack or a score changes what a row would hold.
NUMERICS = 3
_HALVES = ("validation", "test")
STATES = get_args(State)


def row_key(facts: Mapping[str, Any]) -> str:
    """The name of a row: SHA-256 of what it depends on."""
    text = json.dumps({"numerics": NUMERICS, **facts}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """A folder of rows; several audits may share one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError("the folder cannot be made", where=folder, got=error.strerror) from None

    def get(self, key: str) -> Row | None:
        """The row of this name; None if it is not there, or not whole."""
        try:
            with (
                (self.folder / f"{key}.npz").open("rb") as raw,
                np.load(raw, allow_pickle=False) as file,
            ):
                return _row(json.loads(bytes(file["row"]).decode()), file)
        except Exception:  # a file that was not written here may fail in any way
            return None

    def put(self, key: str, row: Row) -> None:
        """Keep a row; it is there whole or not at all.

        Raises:
            RunError: the disk is full or fails.
        """
        arrays = {
            f"{number}|{half}|{task}": scores
            for number, point in enumerate(row.points)
            for half in _HALVES
            for task, scores in getattr(point, half).items()
        }
        text = json.dumps(_document(row)).encode()
        with replacing(self.folder / f"{key}.npz") as file:
            np.savez(file, row=np.frombuffer(text, np.uint8), **arrays)


def _document(row: Row) -> dict[str, Any]:
    document = {name: value for name, value in vars(row).items() if name not in ("points", "looks", "cost")}
    return {
        **document,
        "points": [{"options": dict(point.options), "tasks": list(point.test)} for point in row.points],
        "looks": [[dict(look.options), look.protected, look.own] for look in row.looks],
        "cost": vars(row.cost),
    }


def _row(document: dict[str, Any], arrays: Mapping[str, Any]) -> Row:
    points = tuple(
        Point(
            point["options"],
            *(
                {task: _scores(arrays[f"{number}|{half}|{task}"]) for task in point["tasks"]}
                for half in _HALVES
            ),
        )
        for number, point in enumerate(document.pop("points"))
    )
    looks = tuple(Look(options, protected, own) for options, protected, own in document.pop("looks"))
    cost = Cost(**document.pop("cost"))
    document |= {name: tuple(document[name]) for name in ("chain", "needs")}
    row = Row(**document, points=points, looks=looks, cost=cost)
    if row.side not in SIDES or row.level not in LEVELS or row.state not in STATES:
        raise ValueError("not a row")
    return row


def _scores(values: Any) -> Floats:
    """Scores as they were put there. Raises ValueError for anything else."""
    if values.dtype != np.float64 or values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("not scores")
    found: Floats = values
    return found
