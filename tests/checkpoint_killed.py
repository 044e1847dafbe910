"""Run by test_checkpoint_killed.py: kills children that write a destination and looks at what is left.

    python checkpoint_killed.py SRC FOLDER folder|file events|times

With `events` a child is killed before every single operation on files that the run makes, one child each;
with `times` twenty children are killed at random moments. Prints how many children left the destination
absent and how many whole.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from test_checkpoint_staging import copy
from unmergeable.checkpoint import ShardWriter, StagedFile, open_checkpoint, sweep, write_file

OPERATIONS = {"open", "mkdir", "flock", "ftruncate", "pwrite", "write", "fsync", "close"} | {
    "link",
    "unlink",
    "rename",
    "rmdir",
    "listdir",
    "scandir",
}


def write_single(src: Path, dst: Path) -> None:
    with open_checkpoint(src / "model.safetensors") as checkpoint, StagedFile(dst) as staged:
        shard = checkpoint.shards[0]
        with ShardWriter(staged.path, shard.header, shard.size) as writer:
            for info in shard.tensors:
                writer.write_at(info.start, checkpoint.read(info.name))
        write_file(staged.manifest_path, b"{}")
        staged.commit()


def contents(path: Path) -> dict[str, bytes] | bytes | None:
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return path.read_bytes() if path.exists() else None


def child(run: Callable[[], None], kill_at: int) -> int:
    """Forks; the child runs and is killed before its operation number `kill_at` (never, if negative)."""
    pid = os.fork()
    if pid:
        return pid
    seen = 0

    def count() -> None:
        nonlocal seen
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    def called(_: FrameType, event: str, function: object) -> None:
        if event == "c_call" and getattr(function, "__name__", "") in OPERATIONS:
            count()

    def audited(event: str, _: object) -> None:
        if event == "ctypes.dlsym":  # renameat2 comes next
            count()

    sys.addaudithook(audited)
    sys.setprofile(called)
    run()
    os._exit(0)


def main(src: Path, base: Path, kind: str, how: str) -> None:
    dst = base / "dst"
    sidecar = base / "dst.unmergeable.json"
    write = copy if kind == "folder" else write_single
    expected = contents(src if kind == "folder" else src / "model.safetensors")
    rng = random.Random(7)
    began = time.perf_counter()
    os.waitpid(child(lambda: write(src, dst), -1), 0)
    whole_run = time.perf_counter() - began
    assert contents(dst) == expected, "an undisturbed run"
    counts = {"absent": 0, "whole": 0}
    number, status = 0, 1
    while status != 0 if how == "events" else number < 20:
        for path in sorted(base.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        pid = child(lambda: write(src, dst), number if how == "events" else -1)
        if how == "times":
            time.sleep(rng.uniform(0, 1.1 * whole_run))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        found = contents(dst)
        assert found is None or found == expected, f"half of the destination after kill {number}"
        assert found is None or kind == "folder" or contents(sidecar) == b"{}", (
            f"no manifest after kill {number}"
        )
        counts["absent" if found is None else "whole"] += 1
        sweep(dst)
        left = sorted(os.listdir(base))
        assert left == ([] if found is None else ["dst"] + ["dst.unmergeable.json"] * (kind == "file")), left
        if found is None and number % 5 == 0:
            write(src, dst)
            assert contents(dst) == expected, f"the next run after kill {number}"
        number += 1
    print(counts["absent"], counts["whole"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
