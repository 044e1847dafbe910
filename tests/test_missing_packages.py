"""A package that an extra brings and that is not there: which, for what, and how to have it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from unmergeable.zoo import copy_to

AUDIT = "version: 1\nbase: models/base\nprotected: {model: models/fashion, task: fashion}\n"


def run(missing: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from unmergeable.cli import main;"
        f"sys.exit(main({arguments!r}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("missing")
    copy_to(path / "models")
    (path / "audit.yaml").write_text(AUDIT)
    assert run("nothing", ["keygen"], path).returncode == 0
    return path


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("scipy", ["lock", "models/fashion", "out", "-k", "unmergeable.key", "-m", "params"], "params"),
        ("yaml", ["audit", "audit.yaml", "-o", "out"], "audit"),
        ("pydantic", ["audit", "audit.yaml", "-o", "out"], "audit"),
        ("torch", ["audit", "audit.yaml", "-o", "out"], "audit"),
        (
            "torch",
            ["merge", "models/fashion", "models/digits", "--base", "models/base", "-o", "out"],
            "merge",
        ),
        (
            "accelerate",
            ["harden", "models/fashion", "out", "--base", "models/base", "--data", "audit.yaml"],
            "harden",
        ),
        ("torch", ["demo"], "demo"),
        ("yaml", ["attack", "wide", "models/fashion", "out", "--audit", "audit.yaml"], "audit"),
    ],
)
def test_it_is_named_and_nothing_is_written(
    missing: str, arguments: list[str], extra: str, folder: Path
) -> None:
    done = run(missing, arguments, folder)
    assert done.returncode == 3
    assert missing in done.stderr
    assert f"hint: pip install 'unmergeable[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()


def test_a_module_of_ours_that_is_missing_is_a_bug(folder: Path) -> None:
    done = run("unmergeable.verify", ["verify", "models/fashion", "models/digits"], folder)
    assert done.returncode == 4
    assert "Traceback" in done.stderr
