"""Where examples lie: paths, packages that read them, and data sets that `datasets` has saved to disk."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint.problems import quoted
from ..errors import InputError
from .fields import Source

AnySource = TypeVar("AnySource", bound=Source)

INSTALL = "unmergeable[audit]"  # the extra that brings Pillow and datasets


def needed(module: str, install: str) -> Any:
    """A module of a package that only some tasks need.

    Args:
        module: its name.
        install: what pip installs it by.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        hint = f"pip install '{install}'"
        raise InputError(f"the package {package} is needed", got=first_line(error), hint=hint) from error


def first_line(error: BaseException) -> str:
    """What another package says went wrong, short enough for a message."""
    text = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def locate(folder: Path, data: str, where: str) -> Path:
    """A path of a configuration, relative to the folder that it lies in.

    Raises:
        InputError: there is nothing.
    """
    path = folder / Path(data).expanduser()
    if not path.exists():
        raise InputError("no such file or folder", where=path, hint=f"data of {where}")
    return path


def training_source(
    evaluation: Source, training: AnySource | None, names: tuple[str, ...], folder: Path, where: str
) -> AnySource | None:
    """The source of training examples, with names of arrays or columns that it leaves out filled in.

    Raises:
        InputError: it is what models are scored on.
    """
    if training is None:
        return None
    own = {name: getattr(evaluation, name) for name in names if getattr(training, name) is None}
    filled = training.model_copy(update=own)
    same = all(getattr(filled, name) == getattr(evaluation, name) for name in ("split", *names))
    if same and (folder / filled.data).resolve() == (folder / evaluation.data).resolve():
        raise InputError(
            "training examples are those that models are scored on",
            where=f"{where}: train",
            expected="other data, another split, or other arrays of the file",
            got=quoted(filled.data),
        )
    return filled


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `datasets`: save_to_disk."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_saved(path: Path, split: str | None) -> Any:
    """A data set that was saved to disk, memory mapped.

    Args:
        path: the folder.
        split: which one of a dictionary of them; not needed if it has but one.

    Raises:
        InputError: it cannot be read, has no such split, or is empty.
    """
    datasets = needed("datasets", INSTALL)
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder raises whatever its reader trips over
        raise InputError("the data set cannot be read", where=path, got=first_line(error)) from error
    if isinstance(found, datasets.DatasetDict):
        if split is None and len(found) != 1:
            raise InputError(
                "a data set of several splits", where=path, expected="split: " + " | ".join(found)
            )
        name = next(iter(found)) if split is None else split
        if name not in found:
            raise InputError("no such split", where=path, expected=" | ".join(found), got=quoted(name))
        found = found[name]
    elif split is not None:
        raise InputError("a data set without splits", where=path, got=f"split: {split}")
    if not len(found):
        raise InputError("no examples", where=path)
    return found


def column(found: Any, given: str | None, usual: tuple[str, ...], path: Path, what: str) -> str:
    """The name of a data set's column.

    Args:
        found: the data set.
        given: by the configuration.
        usual: names to look for if it gives none.
        path, what: where, and the field that would name it, for messages.

    Raises:
        InputError: there is none.
    """
    names = list(found.column_names)
    for name in usual if given is None else (given,):
        if name in names:
            return name
    missing = quoted(given) if given is not None else f"none of {', '.join(usual)}"
    hint = None if given is not None else f"name it by {what}:"
    raise InputError("no such column", where=path, expected=" | ".join(names), got=missing, hint=hint)
