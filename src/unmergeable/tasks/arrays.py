"""Arrays of an .npz file, chosen by name or because nothing else could be meant. Pickled ones are refused."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.files import open_regular
from ..checkpoint.problems import quoted
from ..errors import InputError
from .sources import first_line

Array = NDArray[Any]


class Arrays:
    """An open .npz file: arrays are read when they are asked for.

    Raises:
        InputError: not a regular file, or not an .npz.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as stack:  # numpy leaves what it cannot read open
            file = stack.enter_context(os.fdopen(open_regular(path), "rb"))
            try:
                found = np.load(file, allow_pickle=False)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise InputError("not an .npz file", where=path, got=first_line(error)) from error
            if not isinstance(found, np.lib.npyio.NpzFile):
                hint = "write it by np.savez"
                raise InputError("not an .npz file", where=path, got="a single array", hint=hint)
            self._stack, self._file = stack.pop_all(), found

    def __enter__(self) -> Arrays:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """What arrays there are."""
        return list(self._file.files)

    def read(self, name: str) -> Array:
        """One of them.

        Raises:
            InputError: there is none of that name, or it holds pickled objects or is damaged.
        """
        if name not in self.names:
            expected = " | ".join(self.names) or "an array"
            raise InputError("no such array", where=self.path, expected=expected, got=quoted(name))
        try:
            array: Array = self._file[name]
        except ValueError as error:
            raise InputError(
                "an array that cannot be read",
                where=f"{self.path}: {name}",
                expected="numbers: pickled objects are never loaded",
                got=first_line(error),
            ) from error
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(
                "a damaged array", where=f"{self.path}: {name}", got=first_line(error)
            ) from error
        return array

    def choose(
        self, given: str | None, usual: str, fits: Callable[[Array], bool], field: str
    ) -> tuple[str, Array]:
        """The array of a name, of the usual name, or the only one that fits.

        Args:
            given: its name; None to look for one.
            usual: the name that is tried first.
            fits: whether an array may be meant.
            field: of the configuration that names it, for messages.

        Raises:
            InputError: none or several fit, or it cannot be read.
        """
        if given is not None or usual in self.names:
            name = usual if given is None else given
            return name, self.read(name)
        found = [(name, array) for name in self.names if fits(array := self.read(name))]
        if len(found) != 1:
            some = " | ".join(name for name, _ in found) or " | ".join(self.names) or "nothing"
            what = "several arrays could be meant" if found else "no array that fits"
            raise InputError(what, where=self.path, got=some, hint=f"name it by {field}:")
        return found[0]
