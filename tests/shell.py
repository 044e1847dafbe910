"""Sessions as text: commands with their output, and how to type them in."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from unmergeable import cli

COMMAND = Path(sys.executable).with_name("unmergeable")


@dataclass
class Step:
    """One command, the line that it stands on, and the output that should follow."""

    line: int
    command: str
    expected: str


def steps(transcript: str) -> list[Step]:
    """The commands of a transcript, each with the output that should follow."""
    found: list[Step] = []
    for number, line in enumerate(transcript.splitlines(), 1):
        if line.startswith("$ "):
            found.append(Step(number, line[2:], ""))
        elif found and not line.startswith("# "):
            found[-1].expected += f"{line}\n"
    return found


def typed(command: str) -> str:
    """What a command prints, in the form of a transcript. Plain calls of unmergeable stay in this process."""
    words = shlex.split(command)
    environment = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if words[0] == "unmergeable" and not set(command) & set("|><&;$"):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.StringIO())
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = cli.main(words[1:])
                except SystemExit as stop:  # --help and --version
                    code = int(stop.code or 0)
        stdout, stderr = out.getvalue(), err.getvalue()
    else:
        done = subprocess.run(
            ["bash", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    text = stdout + "".join(f"! {line}\n" for line in stderr.splitlines())
    return text + (f"[exit {code}]\n" if code else "")


def matches(expected: str, got: str) -> bool:
    """Whether an output is what was expected, but for the width of columns.

    `...` stands for any text or, by itself on a line, for any lines.
    """
    expected, got = (re.sub(" {2,}", "  ", text) for text in (expected, got))
    lines = expected.strip("\n").splitlines()
    any_lines, any_text = r"(?:.*\n)*?", ".*?"
    pattern = "".join(
        any_lines if line == "..." else re.escape(line).replace(re.escape("..."), any_text) + "\n"
        for line in lines
    )
    return re.fullmatch(pattern, got.strip("\n") + "\n" if got.strip("\n") else "") is not None
