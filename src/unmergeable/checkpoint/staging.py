"""Making a destination appear whole or not at all.

While a run lasts, a private folder stands beside DST, `.<name of DST>.unmergeable-<16 hex>` (mode 0700):

    lock            held by flock for as long as the run lives
    <name of DST>   what becomes DST, made with the modes that it will keep
    <name of DST>.unmergeable.json    a single file's manifest

The lock lies beside the result and not in it, so it never needs to be removed before the rename, and no
moment exists at which a living run looks dead. A run that is killed leaves the folder; the next one for the
same DST gets its lock and removes it. The result is synced and renamed without replacing anything.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import InputError, RunError
from .formats import SIDECAR
from .write import run_error, sync

_LOCK = "lock"
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


class Staging:
    """A folder under way: write into `path`, then `commit`. Leaving without commit removes it.

    Args:
        dst: where the folder will be; it must not exist, its parent must.

    Raises (on entering and in `commit`):
        InputError: DST exists, or came into being meanwhile. Nothing is left behind.
        RunError: the disk is full or fails. Nothing is left behind.
    """

    def __init__(self, dst: str | os.PathLike[str]) -> None:
        self.dst = Path(dst)
        self._folder: Path | None = None
        self._lock = -1
        self.committed = False

    @property
    def path(self) -> Path:
        """The folder (or file) that becomes DST."""
        assert self._folder is not None, "enter the staging first"
        return self._folder / self.dst.name

    def __enter__(self) -> Self:
        sweep(self.dst)
        if os.path.lexists(self.dst):
            raise _exists(self.dst)
        try:
            while self._folder is None:
                self._try_claim(self.dst.parent / f"{_prefix(self.dst)}{secrets.token_hex(8)}")
            self._create()
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise run_error(error, self.dst.parent, "the destination cannot be made") from error
            raise
        return self

    def _try_claim(self, folder: Path) -> None:
        self._folder = folder  # before it is made: an interrupt right behind mkdir leaves nothing either
        os.mkdir(folder, 0o700)
        lock = _take_lock(folder, wait=True)
        if lock is None:  # another run's sweep was quicker than our lock, and the folder is gone
            self._folder = None
        else:
            self._lock = lock

    def _create(self) -> None:
        os.mkdir(self.path)

    def commit(self) -> None:
        """Syncs everything to disk and gives it its name.

        Raises:
            InputError: DST exists by now; RunError: the disk failed. DST is absent then, or whole
            if all that failed was to sync its parent folder.
        """
        try:
            _sync_tree(self.path)
            self._publish()
            self.committed = True
            sync(self.dst.parent)
        except OSError as error:
            raise run_error(error, self.dst) from error
        finally:
            self._discard()

    def _publish(self) -> None:
        rename_noreplace(self.path, self.dst)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        if self._folder is not None:
            # What cannot be removed now is removed by the next run; it must not hide the error under way.
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class StagedFile(Staging):
    """A single file under way: write weights to `path` and the manifest to `manifest_path`, then `commit`.

    The manifest appears first and the weights last: weights without their manifest never exist. The arguments
    and errors are those of `Staging`; a manifest that lies where this one will be is refused on entering.
    """

    @property
    def manifest_path(self) -> Path:
        """The manifest that becomes `<DST>.unmergeable.json`; need not be written."""
        return self.path.with_name(self.path.name + SIDECAR)

    def _create(self) -> None:
        sidecar = _sidecar(self.dst)
        if os.path.lexists(sidecar):
            raise _exists(sidecar)

    def _publish(self) -> None:
        if not self.manifest_path.exists():
            rename_noreplace(self.path, self.dst)
            return
        sidecar = _sidecar(self.dst)
        sync(self.manifest_path)
        try:
            # A link and not a rename: as long as both names exist, a sweep can tell that the manifest is
            # ours.
            os.link(self.manifest_path, sidecar)
        except FileExistsError:
            raise _exists(sidecar) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            rename_noreplace(self.manifest_path, sidecar)
        try:
            sync(self.dst.parent)
            rename_noreplace(self.path, self.dst)
        except BaseException:
            os.unlink(sidecar)
            raise


_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def _exists(path: Path) -> InputError:
    return InputError("the destination exists", where=path, hint="choose another name, or remove it first")


def _sidecar(dst: Path) -> Path:
    return dst.with_name(dst.name + SIDECAR)


def _prefix(dst: Path) -> str:
    """How the staging folders of a destination begin; a name too long to be part of another is hashed."""
    name = dst.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.unmergeable-"


def sweep(dst: Path) -> None:
    """Removes what dead runs for this destination left beside it; living ones hold their lock and stay.

    Raises:
        InputError: the parent folder cannot be listed.
    """
    pattern = re.compile(re.escape(_prefix(dst)) + "[0-9a-f]{16}")
    try:
        names = [name for name in os.listdir(dst.parent) if pattern.fullmatch(name)]
    except OSError as error:
        raise InputError("the folder cannot be listed", where=dst.parent, got=error.strerror) from None
    for name in names:
        _sweep_one(dst, dst.parent / name)


def _sweep_one(dst: Path, folder: Path) -> None:
    try:
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return
        lock = _take_lock(folder, wait=False)
    except OSError:
        return  # it went away or is not ours: not for us to remove
    if lock is None:
        return
    try:
        sidecar = _sidecar(dst)
        staged = folder / sidecar.name
        if (
            staged.exists()
            and sidecar.exists()
            and os.path.samefile(staged, sidecar)
            and not os.path.lexists(dst)
        ):
            os.unlink(sidecar)  # killed between manifest and weights
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _take_lock(folder: Path, *, wait: bool) -> int | None:
    """A staging folder's lock, held, as a descriptor; None if another has it or removed the folder."""
    path = folder / _LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
    except FileNotFoundError:
        pass  # whoever had the lock before us removed the folder
    except OSError as error:
        if wait and error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            return fd  # a file system without locks: nothing there is ever taken for dead
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            os.close(fd)
            raise
    os.close(fd)
    return None


def rename_noreplace(source: Path, target: Path) -> None:
    """Renames a file or folder to a name that must be free.

    Uses renameat2(RENAME_NOREPLACE). Where the file system does not have it (NFS, older FUSE), a file is
    linked and unlinked, which is as safe; a folder is renamed behind a look: rename itself then refuses any
    file, link or folder with something in it, and what could be replaced is an empty folder made in that very
    instant.

    Raises:
        InputError: the name is taken. RunError: the file system can do neither. OSError: it failed.
    """
    try:
        _renameat2(source, target)
        return
    except FileExistsError:
        raise _exists(target) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
    if os.path.lexists(target):
        raise _exists(target)
    try:
        if source.is_dir():
            os.rename(source, target)
        else:
            os.link(source, target)
            os.unlink(source)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _exists(target) from None
        if error.errno in _NO_LINKS:
            hint = "write to another file system and copy the result"
            raise RunError(
                "the file system cannot rename without replacing", where=target, hint=hint
            ) from None
        raise


def _renameat2(source: Path, target: Path) -> None:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    old, new = os.fsencode(source), os.fsencode(target)
    if (
        call(
            _AT_FDCWD, ctypes.c_char_p(old), _AT_FDCWD, ctypes.c_char_p(new), ctypes.c_uint(_RENAME_NOREPLACE)
        )
        != 0
    ):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(target))


def _raise(error: OSError) -> None:
    raise error


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for folder, _, files in os.walk(path, topdown=False, onerror=_raise):
            for name in files:
                sync(Path(folder, name))
            sync(Path(folder))
    else:
        sync(path)
