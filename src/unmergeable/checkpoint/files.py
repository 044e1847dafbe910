"""Touching files that nobody vouches for: never block, never follow a trap, never trust a size."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError
from .problems import Problems, quoted

MAX_JSON = 256 * 1024 * 1024
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFDIR: "a folder",
}


def require_regular(path: Path) -> os.stat_result:
    """The status of a regular file, links followed, without opening it.

    Raises:
        InputError: it is missing, a dangling link, a named pipe, a device, a socket or a folder.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if os.path.islink(path):
            hint = "download the checkpoint again, or replace the link by the file"
            raise InputError("the link leads nowhere", where=path, got=_target(path), hint=hint) from None
        raise InputError("the file cannot be read", where=path, got=error.strerror) from None
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise InputError("not a regular file", where=path, got=kind)
    return status


def _target(path: Path) -> str:
    try:
        return quoted(os.readlink(path))
    except OSError as error:  # the link went away in between: its status is all there is to say
        return error.strerror or "nothing"


def open_regular(path: Path) -> int:
    """Opens a regular file to read and returns its descriptor; a pipe put there meanwhile cannot block.

    Raises:
        InputError: as `require_regular`, and for a file that may not be read.
    """
    require_regular(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InputError("the file cannot be opened", where=path, got=error.strerror) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError("not a regular file", where=path)
    return fd


def read_into(fd: int, out: memoryview, start: int, where: object) -> None:
    """Fills `out` (bytes) from absolute offset `start`.

    Raises:
        RunError: the file ends before that, or the disk fails: it was changed since it was checked.
    """
    done = 0
    while done < len(out):
        try:
            count = os.preadv(fd, [out[done:]], start + done)
        except OSError as error:
            raise RunError("reading failed", where=where, got=error.strerror) from error
        if count == 0:
            raise RunError("the file became shorter while it was read", where=where)
        done += count


def read_head(path: Path, count: int) -> bytes:
    """The first `count` bytes of a regular file, or what there is.

    Raises:
        InputError: as `open_regular`, and when the disk fails.
    """
    fd = open_regular(path)
    try:
        return os.pread(fd, count, 0)
    except OSError as error:
        raise InputError("the file cannot be read", where=path, got=error.strerror) from None
    finally:
        os.close(fd)


def load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of bounded size; a name that occurs twice in one object is refused.

    Raises:
        InputError: not a regular file, too big, not JSON, or not an object.
    """
    value = _parse_json(path)
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=path, got=type(value).__name__)
    return value


def load_json_list(path: Path) -> list[Any]:
    """The list in a JSON file, under the conditions of `load_json`."""
    value = _parse_json(path)
    if not isinstance(value, list):
        raise InputError("not a JSON list", where=path, got=type(value).__name__)
    return value


def _parse_json(path: Path) -> object:
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_JSON:
            raise InputError(
                "the file is too big for JSON", where=path, expected=f"<= {MAX_JSON} bytes", got=size
            )
        data = bytearray(size)
        read_into(fd, memoryview(data), 0, path)
    finally:
        os.close(fd)
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError("not valid JSON", where=path, got=reason) from None


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that refuses a name given twice (ValueError)."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(name for name, after in pairwise(names) if name == after)
        raise ValueError(f"the name {quoted(twice)} occurs twice")
    return found


@dataclass(frozen=True)
class Tree:
    """What a folder holds: names relative to it, sorted, with `/` between the parts.

    `files` maps each regular file (links followed) to its size in bytes.
    """

    files: dict[str, int]
    folders: list[str]

    @property
    def top(self) -> list[str]:
        """The names of the files directly in the folder."""
        return [name for name in self.files if "/" not in name]


def walk(root: Path, skip: frozenset[str] = frozenset()) -> Tree:
    """Lists a folder without opening anything; top-level names in `skip` are left out.

    Raises:
        InputError: a dangling link, a link to a folder, a pipe, device or socket, or an unreadable folder;
            all of them at once.
    """
    files: dict[str, int] = {}
    folders: list[str] = []
    problems = Problems(root)
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            entries = sorted(entry.name for entry in os.scandir(root / folder))
        except OSError as error:
            problems.add("the folder cannot be listed", where=root / folder, got=error.strerror)
            continue
        for name in entries:
            relative = f"{folder}/{name}" if folder else name
            if relative in skip:
                continue
            path = root / relative
            if path.is_dir():
                if path.is_symlink():
                    problems.add("a link to a folder", where=path, hint="put the folder itself there")
                else:
                    folders.append(relative)
                    pending.append(relative)
                continue
            with problems.collect():
                files[relative] = require_regular(path).st_size
    problems.raise_any()
    return Tree(dict(sorted(files.items())), sorted(folders))


def safe_name(name: object) -> bool:
    """Whether a name taken from a file is a plain file name: no separator, no `..`, nothing odd."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    try:
        return len(name.encode("utf-8")) <= 255
    except UnicodeEncodeError:
        return False


def out_of_space(error: OSError) -> bool:
    """Whether an error says that there is no room: disk full, quota, or file size limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
