"""The documents as their readers do them: every command is typed in and compared, but for the numbers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shell import COMMAND, steps, typed

ROOT = Path(__file__).resolve().parents[1]
# With its sign: the limit of an interval lies on either side of 0.
NUMBER = re.compile(r"(?:(?<![\w.#-])-)?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?")


def blocks(document: str) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


def plain(text: str) -> list[str]:
    """Lines without numbers, key ids, hashes, the width of columns, and which of them went to stderr."""
    text = re.sub(r"\b[0-9a-f]{16}\b", "#", re.sub(r"^! ", "", text, flags=re.MULTILINE))
    text = re.sub(r"worst: \w+", "worst: #", text)  # either of the attentions
    # What an audit finds is a lock's own: which merge is best, and by how much.
    text = re.sub(r"^(Level \d .*?\): ).*$|^(\d  +\d\.\d\d  ).*$", r"\1\2", text, flags=re.MULTILINE)
    return [" ".join(NUMBER.sub("#", line).split()) for line in text.strip().splitlines() if line.strip()]


@pytest.mark.filterwarnings("ignore")  # of packages that merge
@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("tutorial", 15),
        ("merging", 12),
        ("attacks", 15),
        ("audit", 8),
        pytest.param("harden", 5, marks=pytest.mark.slow),  # a training of several minutes
    ],
)
def test_commands(name: str, commands: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("UNMERGEABLE_CACHE", str(tmp_path / ".cache"))
    before = signal.getsignal(signal.SIGTERM)
    count = 0
    for language, text in blocks((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")):
        if language in ("python", "yaml") and (file := re.match(r"# (\w+\.\w+)\n", text)):
            (tmp_path / file[1]).write_text(text)
        for step in steps(text) if language == "console" else ():
            assert plain(typed(step.command)) == plain(step.expected), step.command
            count += 1
    signal.signal(signal.SIGTERM, before)
    assert count >= commands


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/index.md",
        "docs/tutorial.md",
        "docs/methods.md",
        "docs/merging.md",
        "docs/attacks.md",
        "docs/audit.md",
        "docs/harden.md",
        "docs/results.md",
        "docs/licensed-users.md",
        "docs/formats.md",
    ],
)
def test_links_lead_somewhere(name: str) -> None:
    document = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document):
        if "://" not in target:
            assert (ROOT / name).parent.joinpath(target).exists(), target


def test_one_script_writes_the_figures_of_audits(tmp_path: Path) -> None:
    """From what is kept of the audits: the page of results and the table of the README, as they stand."""
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    command = [sys.executable, "bench/audits.py", "-d", str(tmp_path / "work"), "--tables"]
    written = ["--docs", str(tmp_path / "results.md"), "--readme", str(tmp_path / "README.md")]
    subprocess.run([*command, *written], cwd=ROOT, check=True)
    for name, kept in (("results.md", "docs/results.md"), ("README.md", "README.md")):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / kept).read_text(encoding="utf-8")
