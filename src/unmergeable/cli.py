"""The command line: parse, run one verb, print. The only module that prints or decides an exit code."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from ._parser import build_parser
from ._terminal import mend_streams
from .errors import InputError, RunError, UnmergeableError

if TYPE_CHECKING:
    from ._commands import Outcome

# What a verb needs beyond the package's own requirements; `prove`, where a verb is not here.
_EXTRAS = {verb: verb for verb in ("merge", "attack", "audit", "harden", "demo")}
INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141


class _Terminated(BaseException):
    """SIGTERM: unwinds like an interrupt, so that nothing half written is left behind."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `unmergeable` with these arguments (default: the process's) and return its exit code.

    0 done and the claim holds, 1 a claim failed, 2 usage, 3 bad input, 4 failed while running,
    130 interrupted, 143 terminated.
    """
    args: argparse.Namespace | None = None
    given = list(sys.argv[1:] if argv is None else argv)
    mend_streams()
    with suppress(ValueError):  # raised outside of the main thread: somebody else's signals
        signal.signal(signal.SIGTERM, _terminate)
    try:
        args = build_parser().parse_args(given)
        from ._commands import run

        outcome = run(args)
        _print(args, outcome)
        return outcome.code
    except UnmergeableError as error:
        return _report(args, error, asked="--json" in given)
    except ImportError as error:
        if args is None or (error.name or "").partition(".")[0] in ("", __package__):
            return _unexpected(args, error)
        return _report(args, _missing(args, error))
    except BrokenPipeError:
        return _nobody_reads()
    except KeyboardInterrupt:
        print("unmergeable: interrupted", file=sys.stderr)
        return INTERRUPTED
    except _Terminated:
        print("unmergeable: terminated", file=sys.stderr)
        return TERMINATED
    except MemoryError:
        return _report(args, RunError("out of memory", hint="give it more memory, or fewer --jobs"))
    except OSError as error:
        return _report(args, RunError(error.strerror or str(error), where=error.filename))
    except Exception as error:
        return _unexpected(args, error)


def _nobody_reads() -> int:
    """The reader has gone, as in `unmergeable inspect MODEL | head`; nothing may be flushed to it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _unexpected(args: argparse.Namespace | None, error: Exception) -> int:
    """A bug: say so with all that helps to find it, and not by exit code 1."""
    traceback.print_exc()
    return _report(args, RunError(f"unexpected {type(error).__name__}: {error}"))


def _missing(args: argparse.Namespace, error: ImportError) -> InputError:
    """A package that is not installed, or is too old, and the extra that brings it."""
    verb = args.verb
    extra = "audit" if getattr(args, "audit", None) else _EXTRAS.get(verb, "prove")
    if verb == "lock" and (error.name or "").startswith("scipy"):
        extra = "params"
    hint = f"pip install 'unmergeable[{extra}]'"
    return InputError("a package is missing, or too old", where=verb, got=error, hint=hint)


def _print(args: argparse.Namespace, outcome: Outcome) -> None:
    if getattr(args, "json", False):
        _print_json(outcome.document)
    elif outcome.text:
        print(outcome.text.rstrip("\n"))
    sys.stdout.flush()
    for note in outcome.notes:
        print(f"unmergeable: {note}", file=sys.stderr)


def _report(args: argparse.Namespace | None, error: UnmergeableError, *, asked: bool = False) -> int:
    """Say what went wrong; as a document too where one was asked for: `asked`, of a command line that is not read."""
    if getattr(args, "json", False) or (args is None and asked):
        verb = None if args is None else args.verb
        try:
            _print_json({"document": "unmergeable.error", "version": 1, "command": verb, **error.as_dict()})
            sys.stdout.flush()
        except BrokenPipeError:
            _nobody_reads()  # what went wrong decides the exit code all the same
    message, _, hint = str(error).partition("\nhint: ") if error.hint else (str(error), "", "")
    print(f"unmergeable: error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return error.exit_code


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


if __name__ == "__main__":
    sys.exit(main())
