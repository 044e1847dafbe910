"""Writing a destination's files: shards by offset, side files byte for byte, and the checks before that."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import InputError, RunError
from .files import open_regular, out_of_space

_CHUNK = 1 << 22


def run_error(error: OSError, where: object, what: str = "writing failed") -> RunError:
    """The `RunError` that says what an operating system error means here."""
    if out_of_space(error):
        hint = "make room (disk, quota, ulimit -f) and run again; nothing was left at the destination"
        return RunError("no space left to write", where=where, got=error.strerror, hint=hint)
    return RunError(what, where=where, got=error.strerror)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class ShardWriter:
    """One safetensors file, written in pieces at any offset by any number of threads.

    Args:
        path: the file to make; it must not exist. Its mode is 0666 less the umask.
        header: length and JSON, verbatim.
        size: bytes of the whole file.

    Raises:
        RunError: no room (found here already where the file may not get that big), or the disk fails.
    """

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self.path = path
        self.size = size
        self._written = 0
        self._counter = threading.Lock()
        try:
            self._fd = _create(path)
            try:
                os.ftruncate(self._fd, size)
            except OSError:
                os.close(self._fd)
                raise
        except OSError as error:
            raise run_error(error, path) from error
        self.write_at(0, header)

    def write_at(self, start: int, buffer: Any) -> None:
        """Writes a contiguous buffer (bytes, memoryview or array) at an absolute offset. Raises RunError."""
        view = memoryview(buffer)
        if view.nbytes == 0:
            return
        view = view.cast("B")
        if start < 0 or start + len(view) > self.size:
            got = f"{start}:{start + len(view)}"
            raise RunError(
                "a write outside of the file", where=self.path, expected=f"within {self.size}", got=got
            )
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], start + done)
        except OSError as error:
            raise run_error(error, self.path) from error
        with self._counter:
            self._written += len(view)

    def close(self) -> None:
        """Syncs and closes the file; a second call does nothing.

        Raises:
            RunError: not every byte was written exactly once, or the disk failed.
        """
        if self._fd < 0:
            return
        try:
            if self._written != self.size:
                expected = f"{self.size} bytes written"
                raise RunError("incomplete shard", where=self.path, expected=expected, got=self._written)
            os.fsync(self._fd)
        except OSError as error:
            raise run_error(error, self.path) from error
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Closes the file as it is, because the whole run is given up."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def write_file(path: Path, data: bytes) -> None:
    """Makes a new small file with mode 0666 less the umask and syncs it. Raises RunError."""
    try:
        with os.fdopen(_create(path), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise run_error(error, path) from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is there whole or not at all, in the place of an earlier one.

    Raises:
        RunError: the disk is full or fails. The earlier one is as it was then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise run_error(error, path) from error
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copies a regular file's bytes into a new file with mode 0666 less the umask and syncs it.

    Raises:
        InputError: the source is not a regular file (any more). RunError: reading or writing failed.
    """
    read = open_regular(source)
    try:
        with os.fdopen(_create(target), "wb", buffering=0) as file:
            while chunk := memoryview(os.read(read, _CHUNK)):
                while chunk:
                    chunk = chunk[file.write(chunk) :]
            os.fsync(file.fileno())
    except OSError as error:
        raise run_error(error, target, "copying failed") from error
    finally:
        os.close(read)


def copy_side_files(
    root: Path, files: Iterable[str], folders: Iterable[str], generated: dict[str, bytes], target: Path
) -> None:
    """Copies everything that is not weights: folders (empty ones too), files byte for byte, generated files.

    Args:
        root: the source folder; files and folders are relative to it.
        target: the new folder.

    Raises:
        as `copy_file`.
    """
    try:
        for folder in sorted(folders):
            os.makedirs(target / folder, exist_ok=True)
    except OSError as error:
        raise run_error(error, target) from error
    for name in files:
        copy_file(root / name, target / name)
    for name, data in generated.items():
        write_file(target / name, data)


def check_destination(src: str | os.PathLike[str], dst: str | os.PathLike[str], needed_bytes: int) -> None:
    """Everything about a destination that can be refused before the first byte is written.

    Args:
        src: the source folder or file, which exists.
        dst: the destination, which must not.
        needed_bytes: what will be written there.

    Raises:
        InputError: DST exists (be it an empty folder or a dangling link), is SRC by whatever path, lies in
        SRC or
            holds it; its parent is missing or may not be written to.
        RunError: the disk has not enough room.
    """
    source, target = Path(src), Path(dst)
    parent = target.parent
    if target.name in ("", "..", "."):
        raise InputError(
            "the destination has no name of its own", where=target, hint="name the folder or file to make"
        )
    if len(os.fsencode(target.name)) > 230:
        raise InputError("the name of the destination is too long", where=target, expected="<= 230 bytes")
    if not parent.is_dir():
        raise InputError(
            "the parent folder of the destination is missing", where=parent, hint="make it first"
        )
    try:
        origin = os.stat(source)
    except OSError as error:
        raise InputError("the source cannot be read", where=source, got=error.strerror) from None
    if target.exists():
        if os.path.samestat(origin, os.stat(target)):
            raise InputError(
                "source and destination are the same", where=target, hint="choose another destination"
            )
        if _inside(source, os.stat(target)):
            raise InputError(
                "the source lies inside the destination", where=target, hint="choose another destination"
            )
    if os.path.lexists(target):
        hint = "choose another name, or remove it first; nothing is ever overwritten"
        raise InputError("the destination exists", where=target, hint=hint)
    if _inside(target, origin):
        raise InputError(
            "the destination lies inside the source", where=target, hint="choose a place outside of it"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError("the folder of the destination is read-only", where=parent)
    disk = os.statvfs(parent)
    free = disk.f_bavail * disk.f_frsize
    if free < needed_bytes:
        raise RunError(
            "not enough room on the disk", where=parent, expected=f"{needed_bytes} bytes", got=f"{free} bytes"
        )


def _inside(path: Path, folder: os.stat_result) -> bool:
    """Whether a path lies in a folder, however either is spelt: by the identity of its true parents."""
    return any(os.path.samestat(folder, os.stat(above)) for above in Path(os.path.realpath(path)).parents)
