"""Places of a hardening: of its checkpoints, by what it is a training of, and of a control beside the result."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoint import check_destination, replacing
from ..checkpoint.files import load_json
from ..errors import UsageError

if TYPE_CHECKING:
    from .objectives import Objective
    from .train import Settings

SUFFIX, CONTROL = ".hardening", "control.json"
_DIGEST = re.compile("[0-9a-f]{16}")
# Of a file: path, bytes, time of its last change.
Stamp = list[Any]


class Places:
    """Where a hardening writes.

    Args:
        source, target, control: the fine-tune, the result, and the plainly trained one if it is wanted.

    Attributes:
        checkpoints: the folder of all trainings whose result goes to `target`.
    """

    def __init__(self, source: Path, target: Path, control: Path | None) -> None:
        self.source, self.target, self.control = source, target, control
        self.checkpoints = target.with_name(target.name + SUFFIX)

    def training(
        self,
        models: Sequence[Path],
        fields: Mapping[str, Any],
        objective: Objective,
        settings: Settings,
        others: Sequence[object],
    ) -> Path:
        """The folder of one training, named by what it is of, so that none goes on from another's checkpoint.

        Args:
            models: the fine-tune, its base and its proxies.
            fields: of the task. objective, settings: of the training.
            others: whatever else its steps depend on.
        """
        train = fields.get("train")
        data = [fields["data"], *([train["data"]] if isinstance(train, Mapping) and "data" in train else [])]
        stamps = [stamp for path in (*models, *data) for stamp in self._stamps(Path(str(path)))]
        # As text: what YAML has may be dates, or mappings of anything.
        given = repr(sorted(fields.items(), key=str))
        facts = [__version__, list(map(str, models)), given, repr(objective), repr(settings), list(others)]
        found = hashlib.sha256(json.dumps([facts, stamps], default=str).encode()).hexdigest()
        return self.checkpoints / found[:16]

    def _stamps(self, place: Path) -> list[Stamp]:
        """Of all files there, but for what this hardening writes itself."""
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        own = [_real(path) for path in (self.target, self.checkpoints, self.control) if path is not None]
        staged = tuple(f".{path.name}.unmergeable-" for path in own)

        def written(file: Path) -> bool:
            real = _real(file)
            return any(_within(real, path) for path in own) or any(
                part.startswith(staged) for part in real.parts
            )

        return [_stamp(file) for file in files if file.is_file() and not (place.is_dir() and written(file))]

    def check_control(self, folder: Path) -> bool:
        """Refuse a control that has no place of its own; says whether this training has written it already.

        Raises:
            UsageError: it is the result's folder or that of checkpoints, or in one of these. InputError: it exists,
                and is not from this training.
        """
        assert self.control is not None
        place = _real(self.control)
        for taken in map(_real, (self.target, self.checkpoints)):
            if _within(place, taken) or _within(taken, place):
                raise UsageError(
                    "the control and the result cannot be the same folder", where="control", got=self.control
                )
        note = folder / CONTROL
        if note.is_file() and load_json(note) == self._control():
            return True
        size = sum(one.stat().st_size for one in self.source.iterdir() if one.is_file())
        check_destination(self.source, self.control, size)
        return False

    def note_control(self, folder: Path) -> None:
        """Remember that the control is this training's: a kill before the result is there must not be in its way."""
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / CONTROL) as file:
            file.write(json.dumps(self._control()).encode())

    def _control(self) -> dict[str, Any]:
        assert self.control is not None
        files = sorted(_real(self.control).rglob("*")) if self.control.is_dir() else []
        return {"files": [_stamp(file) for file in files if file.is_file()]}

    def clear(self, folder: Path, *, all_of_them: bool = False) -> None:
        """Remove a training's checkpoints, or those of all trainings, and nothing else that may lie beside them."""
        others: Iterable[Path] = ()
        if all_of_them and self.checkpoints.is_dir():
            others = [one for one in self.checkpoints.iterdir() if _DIGEST.fullmatch(one.name)]
        for one in {folder, *others}:
            shutil.rmtree(one, ignore_errors=True)
        with suppress(OSError):  # not there, or not empty
            self.checkpoints.rmdir()


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _within(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    return [str(file), found.st_size, found.st_mtime_ns]
