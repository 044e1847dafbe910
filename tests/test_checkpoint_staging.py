"""A destination appears whole or not at all, whatever happens and whenever."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from checkpoint_files import folder
from unmergeable.checkpoint import (
    ShardWriter,
    StagedFile,
    Staging,
    copy_file,
    copy_side_files,
    open_checkpoint,
    rename_noreplace,
    sweep,
    write_file,
)
from unmergeable.checkpoint import staging as module
from unmergeable.errors import InputError, RunError


def fill(path: Path) -> None:
    (path / "sub").mkdir()
    write_file(path / "sub" / "a.txt", b"a")
    with ShardWriter(path / "m.safetensors", b"header", 10) as writer:
        writer.write_at(6, b"data")


def copy(src: Path, dst: Path) -> None:
    """What the engine does, without the transformation."""
    with open_checkpoint(src) as checkpoint, Staging(dst) as staging:
        for shard in checkpoint.shards:
            with ShardWriter(staging.path / shard.file, shard.header, shard.size) as writer:
                for info in shard.tensors:
                    writer.write_at(info.start, checkpoint.read(info.name))
        copy_side_files(
            src, checkpoint.side_files, checkpoint.side_folders, checkpoint.generated, staging.path
        )
        staging.commit()


@pytest.mark.parametrize("shards", [1, 3])
def test_a_copy_is_the_same(tmp_path: Path, shards: int) -> None:
    src = folder(tmp_path / "src", shards=shards)
    (src / "empty" / "deeper").mkdir(parents=True)
    copy(src, tmp_path / "dst")
    assert (
        subprocess.run(["diff", "-r", src, tmp_path / "dst"], capture_output=True, check=False).returncode
        == 0
    )
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with Staging(tmp_path / "d") as staging:
            assert stat.S_IMODE(staging.path.parent.stat().st_mode) == 0o700
            fill(staging.path)
            staging.commit()
        with StagedFile(tmp_path / "f") as staged:
            write_file(staged.path, b"x")
            write_file(staged.manifest_path, b"y")
            staged.commit()
    finally:
        os.umask(before)
    for path in (tmp_path / "d", tmp_path / "d" / "sub"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
    for name in ("d/sub/a.txt", "d/m.safetensors", "f", "f.unmergeable.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with Staging(tmp_path / "d") as staging:
        fill(staging.path)
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "d") as staging:  # noqa: PT012
        fill(staging.path)
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), StagedFile(tmp_path / "d") as staged:  # noqa: PT012
        write_file(staged.path, b"x")
        _ = 1 / 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("what", [Staging, StagedFile])
def test_never_replaces(tmp_path: Path, kind: str, late: bool, what: type[Staging]) -> None:
    dst = tmp_path / "d"

    def appear() -> None:
        if kind == "folder":
            dst.mkdir()
        elif kind == "file":
            dst.write_text("mine")
        else:
            dst.symlink_to("nowhere")

    if not late:
        appear()
    with pytest.raises(InputError, match="the destination exists"), what(dst) as staging:  # noqa: PT012
        assert late
        if what is Staging:
            fill(staging.path)
        else:
            write_file(staging.path, b"x")
            write_file(staging.path.with_name("d.unmergeable.json"), b"y")
        appear()
        staging.commit()
    assert os.listdir(tmp_path) == ["d"]
    assert not dst.is_dir() or os.listdir(dst) == []


@pytest.mark.parametrize("late", [False, True])
def test_never_replaces_a_manifest(tmp_path: Path, late: bool) -> None:
    sidecar = tmp_path / "f.unmergeable.json"
    if not late:
        sidecar.write_text("mine")

    def run() -> None:
        with StagedFile(tmp_path / "f") as staged:
            write_file(staged.path, b"x")
            write_file(staged.manifest_path, b"y")
            sidecar.write_text("mine")
            staged.commit()

    with pytest.raises(InputError, match=r"f\.unmergeable\.json: the destination exists"):
        run()
    assert sidecar.read_text() == "mine"
    assert os.listdir(tmp_path) == ["f.unmergeable.json"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL])
def test_file_systems_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def missing(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, "_renameat2", missing)
    for name in ("folder", "file"):
        (tmp_path / "a").mkdir() if name == "folder" else write_file(tmp_path / "a", b"x")
        (tmp_path / "taken").symlink_to("nowhere")
        with pytest.raises(InputError, match="exists"):
            rename_noreplace(tmp_path / "a", tmp_path / "taken")
        rename_noreplace(tmp_path / "a", tmp_path / name)
        (tmp_path / "taken").unlink()
        assert os.listdir(tmp_path) == [name]
        (tmp_path / name).rmdir() if name == "folder" else (tmp_path / name).unlink()


def test_two_runs_into_one_destination(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", shards=3)
    barrier = threading.Barrier(6)
    results: list[str] = []

    def run() -> None:
        barrier.wait()
        try:
            copy(src, tmp_path / "dst")
            results.append("done")
        except InputError as error:
            results.append(error.what)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["done", *["the destination exists"] * 5]
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_sweeps_the_dead_and_spares_the_living(tmp_path: Path) -> None:
    dst = tmp_path / "d"
    with Staging(dst) as living:
        fill(living.path)
        dead = tmp_path / ".d.unmergeable-0123456789abcdef"
        (dead / "d").mkdir(parents=True)
        (dead / "d" / "x").write_text("x")
        others = [
            ".e.unmergeable-0123456789abcdef",
            ".d.unmergeable-0123",
            ".d.unmergeable-0123456789abcdeg",
            "d.x",
        ]
        for name in others:
            (tmp_path / name).mkdir()
        (tmp_path / ".d.unmergeable-aaaaaaaaaaaaaaaa").symlink_to(tmp_path / "d.x")
        (tmp_path / ".d.unmergeable-bbbbbbbbbbbbbbbb").write_text("a file")
        with Staging(dst):
            pass
        assert not dead.exists()
        assert (living.path / "sub" / "a.txt").exists()
        assert {name for name in others if (tmp_path / name).is_dir()} == set(others)
        assert (tmp_path / ".d.unmergeable-aaaaaaaaaaaaaaaa").is_symlink()
        assert (tmp_path / ".d.unmergeable-bbbbbbbbbbbbbbbb").exists()
        living.commit()
    assert (dst / "m.safetensors").read_bytes() == b"headerdata"


def test_a_manifest_of_a_dead_run_is_swept_and_a_strangers_is_not(tmp_path: Path) -> None:
    dead = tmp_path / ".f.unmergeable-0123456789abcdef"
    dead.mkdir()
    (dead / "f.unmergeable.json").write_text("same words")
    (tmp_path / "f.unmergeable.json").write_text("same words")
    sweep(tmp_path / "f")
    assert os.listdir(tmp_path) == ["f.unmergeable.json"]
    dead.mkdir()
    os.link(tmp_path / "f.unmergeable.json", dead / "f.unmergeable.json")
    sweep(tmp_path / "f")
    assert os.listdir(tmp_path) == []


def test_a_long_name(tmp_path: Path) -> None:
    for name in ("x" * 230, "é" * 115):
        with StagedFile(tmp_path / name) as staged:
            write_file(staged.path, b"x")
            write_file(staged.manifest_path, b"y")
            staged.commit()
        assert (tmp_path / name).read_bytes() == b"x"


def test_a_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be listed"), Staging(tmp_path / "no" / "d"):
        pass


def test_shard_writer(tmp_path: Path) -> None:
    data = np.arange(1000, dtype=np.uint16).reshape(10, 100)
    writer = ShardWriter(tmp_path / "a", b"head", 4 + data.nbytes)
    threads = [
        threading.Thread(target=writer.write_at, args=(4 + i * 200, data[i])) for i in range(10)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.write_at(4, np.zeros((0, 3), np.uint16))
    writer.close()
    writer.close()
    assert (tmp_path / "a").read_bytes() == b"head" + data.tobytes()
    with pytest.raises(RunError, match="writing failed"):
        ShardWriter(tmp_path / "a", b"", 0)  # exists
    short = ShardWriter(tmp_path / "b", b"head", 8)
    for start, content in ((-1, b"x"), (5, b"xxxx")):
        with pytest.raises(RunError, match="outside of the file"):
            short.write_at(start, content)
    short.write_at(4, b"xxx")
    with pytest.raises(RunError, match=r"incomplete shard, expected 8 bytes written, got 7"):
        short.close()


def test_copies_follow_links_and_stop_at_traps(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5_000_000)
    (tmp_path / "link").symlink_to("a")
    copy_file(tmp_path / "link", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"x" * 5_000_000
    assert not (tmp_path / "b").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="named pipe"):
        copy_file(tmp_path / "pipe", tmp_path / "c")
    with pytest.raises(RunError, match="copying failed"):
        copy_file(tmp_path / "a", tmp_path / "b")


LIMITED = """
import resource, sys
from pathlib import Path
from test_checkpoint_staging import copy
from unmergeable.errors import RunError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    copy(Path(sys.argv[1]), Path(sys.argv[2]))
except RunError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("limit", [0, 20, 60, 300])
def test_a_full_disk(tmp_path: Path, limit: int) -> None:
    src = folder(tmp_path / "src")
    (src / "notes.txt").write_bytes(b"x" * 70)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LIMITED, src, tmp_path / "dst", str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "no space left to write" in done.stdout
    assert "hint: make room" in done.stdout
    assert os.listdir(tmp_path) == ["src"]
