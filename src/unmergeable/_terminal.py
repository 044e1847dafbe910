"""Asking and telling on a terminal: progress bars and passphrases."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError, UsageError

PASSPHRASE = "UNMERGEABLE_PASSPHRASE"

Progress = Callable[[int, int, str], None]


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
