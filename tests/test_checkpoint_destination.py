"""What is refused about a destination before the first byte is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from checkpoint_files import folder, snapshot
from unmergeable.checkpoint import check_destination
from unmergeable.errors import InputError, RunError


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return folder(tmp_path / "src")


def refused(src: Path, dst: Path | str, message: str, base: Path) -> None:
    before = snapshot(base)
    with pytest.raises(InputError, match=message) as caught:
        check_destination(src, dst, 10)
    assert caught.value.exit_code == 3
    assert snapshot(base) == before


def test_a_free_name_passes(tmp_path: Path, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_destination(src, tmp_path / "dst", 10)
    check_destination(src / "model.safetensors", src / "other.safetensors", 10)
    check_destination(str(src), str(tmp_path / "src-locked"), 10)
    monkeypatch.chdir(tmp_path)
    check_destination("src", "dst", 10)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "link"])
def test_existing(tmp_path: Path, src: Path, kind: str) -> None:
    dst = tmp_path / "dst"
    if kind == "file":
        dst.write_text("x")
    elif kind == "folder":
        dst.mkdir()
    else:
        dst.symlink_to("nowhere" if kind == "dangling link" else tmp_path)
    message = "the source lies inside the destination" if kind == "link" else "the destination exists"
    refused(src, dst, message, tmp_path)


def test_the_source_itself_by_any_name(tmp_path: Path, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alias").symlink_to(src)
    (tmp_path / "sub").mkdir()
    (tmp_path / "up").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    same = "source and destination are the same"
    for dst in (src, "src", "sub/../src", tmp_path / "alias", "up/src", "./src/."):
        refused(src, dst, same, tmp_path)
    refused(tmp_path / "alias", src, same, tmp_path)
    file = src / "model.safetensors"
    os.link(file, tmp_path / "hard.safetensors")
    refused(file, file, same, tmp_path)
    refused(file, tmp_path / "hard.safetensors", same, tmp_path)


def test_inside_the_source(tmp_path: Path, src: Path) -> None:
    (src / "sub").mkdir()
    (tmp_path / "alias").symlink_to(src / "sub")
    for dst in (src / "dst", src / "sub" / "dst", tmp_path / "alias" / "dst"):
        refused(src, dst, "the destination lies inside the source", tmp_path)
    (tmp_path / "srclink").symlink_to(src)
    refused(tmp_path / "srclink", src / "dst", "the destination lies inside the source", tmp_path)


def test_holding_the_source(tmp_path: Path, src: Path) -> None:
    refused(src, tmp_path, "the source lies inside the destination", tmp_path)


def test_no_place_and_no_name(tmp_path: Path, src: Path) -> None:
    refused(src, tmp_path / "no" / "dst", "parent folder of the destination is missing", tmp_path)
    refused(src, src / "config.json" / "dst", "parent folder of the destination is missing", tmp_path)
    refused(src, tmp_path / "src" / "..", "no name of its own", tmp_path)
    refused(src, "/", "no name of its own", tmp_path)
    refused(src, tmp_path / ("x" * 231), "name of the destination is too long", tmp_path)
    refused(tmp_path / "gone", tmp_path / "dst", "the source cannot be read", tmp_path)


def test_not_enough_room(tmp_path: Path, src: Path) -> None:
    with pytest.raises(RunError, match="not enough room on the disk") as caught:
        check_destination(src, tmp_path / "dst", 1 << 60)
    assert caught.value.exit_code == 4


READ_ONLY = """
import os, sys
from unmergeable.checkpoint import Staging, check_destination
from unmergeable.errors import InputError, RunError
if os.geteuid() == 0:
    os.setgroups([])
    os.setuid(65534)
src, dst = sys.argv[1:]
try:
    check_destination(src, dst, 10)
except InputError as error:
    assert "read-only" in error.what, error
else:
    raise AssertionError("not refused")
try:
    Staging(dst).__enter__()
except RunError as error:
    assert "cannot be made" in error.what, error
else:
    raise AssertionError("not refused")
"""


def test_a_read_only_folder(src: Path) -> None:
    # The superuser may write anywhere, so the check runs as nobody, in a folder that nobody can reach.
    base = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(src, base / "src")
        base.chmod(0o555)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", READ_ONLY, base / "src", base / "dst"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert os.listdir(base) == ["src"]
    finally:
        base.chmod(0o755)
        shutil.rmtree(base)
