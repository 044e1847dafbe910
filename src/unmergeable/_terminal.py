"""Asking and telling on a terminal: progress bars and passphrases."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError, UsageError

PASSPHRASE = "UNMERGEABLE_PASSPHRASE"

Progress = Callable[[int, int, str], None]


def mend_streams() -> None:
    """Make standard streams that can be written to: they may be closed, and a terminal may lack a character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # Not closed again: it is this process's, as long as that runs.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def progress(verb: str, quiet: bool, unit: str = "B") -> Iterator[Progress | None]:
    """A callback for (done, total, label) that draws a bar, for work of over a second on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=verb, unit=unit, unit_scale=unit == "B", delay=1, leave=False, dynamic_ncols=True) as bar:

        def told(done: int, total: int, label: str) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if unit != "B":
                bar.set_description(label)

        yield told


def passphrase(args: argparse.Namespace, *, new: bool = False) -> Callable[[], str]:
    """A function that finds the passphrase when a key file needs one: a file, the environment, or a question.

    Args:
        args: with `passphrase_file`.
        new: ask twice, for nobody can recover a slip.
    """

    def find() -> str:
        if args.passphrase_file is not None:
            return _first_line(Path(args.passphrase_file))
        if PASSPHRASE in os.environ:
            return os.environ[PASSPHRASE]
        if not sys.stdin.isatty():
            raise UsageError(
                "the key file needs its passphrase and nobody can be asked",
                hint=f"set {PASSPHRASE} or give --passphrase-file",
            )
        from getpass import getpass

        text = getpass("passphrase: ")
        if new and getpass("once more: ") != text:
            raise UsageError("the two passphrases differ")
        return text

    return find


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the passphrase file cannot be read", where=path, got=error) from None
