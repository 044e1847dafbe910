"""One error family: what went wrong, where, what was expected and got, and what to do about it.

The library raises, only the command line prints. Every error knows the exit code that the command line
returns for it, so that scripts can tell a failed claim from a bad input.
"""

from __future__ import annotations


class UnmergeableError(Exception):
    """Base of every error that unmergeable raises on purpose.

    Args:
        what: a sentence about the thing, lower case, no final period.
        where: the file, tensor or site that it happened at.
        expected: what would have been right.
        got: what was found instead.
        hint: what the reader can do next.
    """

    exit_code = 4

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.got = None if got is None else str(got)
        self.hint = hint

    def __str__(self) -> str:
        parts = [self.what if self.where is None else f"{self.where}: {self.what}"]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.got is not None:
            parts.append(f"got {self.got}")
        message = ", ".join(parts)
        return message if self.hint is None else f"{message}\nhint: {self.hint}"

    def as_dict(self) -> dict[str, str | None]:
        """The same facts as JSON-ready fields, for `--json`."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "got": self.got,
            "hint": self.hint,
        }


class InputError(UnmergeableError):
    """A checkpoint, key, manifest, spec or configuration that cannot be used. Exit code 3."""

    exit_code = 3


class Contradiction(InputError):  # noqa: N818
    """A checkpoint that contradicts its own configuration: damaged, not merely unknown."""


class ClaimError(UnmergeableError):
    """Something that was claimed does not hold: a lock is not exact, a threshold is missed. Exit code 1."""

    exit_code = 1


class UsageError(UnmergeableError):
    """A call that makes no sense as written: options that contradict each other. Exit code 2."""

    exit_code = 2


class RunError(UnmergeableError):
    """Failed while running: disk full, a worker died. Nothing was left at the destination. Exit code 4."""

    exit_code = 4
