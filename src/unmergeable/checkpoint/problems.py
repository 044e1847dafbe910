"""Collecting what is wrong with an input, so that one run names all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InputError

_SHOWN = 20


class Problems:
    """A list of input errors about one thing.

    Args:
        where: the file or folder that all of them are about.
    """

    def __init__(self, where: object) -> None:
        self.where = where
        self.found: list[InputError] = []

    def add(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        """Notes one problem; the arguments are those of `InputError`."""
        place = self.where if where is None else where
        self.found.append(InputError(what, where=place, expected=expected, got=got, hint=hint))

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Notes an `InputError` that the block raises and goes on behind the block."""
        try:
            yield
        except InputError as error:
            self.found.append(error)

    def raise_any(self) -> None:
        """Raises the one problem as it is, several as one `InputError`, and nothing if there is none."""
        if not self.found:
            return
        if len(self.found) == 1:
            raise self.found[0]
        lines = []
        for error in self.found[:_SHOWN]:
            text, _, hint = str(error).partition("\nhint: ")
            lines.append(f"\n  - {text}" + (f" (hint: {hint})" if hint else ""))
        if len(self.found) > _SHOWN:
            lines.append(f"\n  - and {len(self.found) - _SHOWN} more")
        raise InputError(f"{len(self.found)} problems" + "".join(lines), where=self.where)


def quoted(name: object, limit: int = 120) -> str:
    """A name from a file as printable ASCII of bounded length, fit for a message on any terminal."""
    text = ascii(str(name))
    return text if len(text) <= limit else f"{text[:limit]}…'"
