"""The key file: make one, read one. docs/formats.md describes the format.

`Key`, the salts and the streams are here too for whoever uses them; derive.py and sampler.py define them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import stat
import unicodedata
from collections.abc import Callable

from .derive import KEY_BYTES, Key, domain_salt, fresh_salt, hkdf
from .errors import InputError, RunError
from .sampler import Stream

__all__ = ["Key", "Stream", "domain_salt", "fresh_salt", "generate_key", "hkdf", "load_key", "read_bounded"]

Passphrase = str | Callable[[], str]

MAX_KEY_FILE = 64 * 1024

# 128 n r bytes: 128 MiB and about a third of a second. A file may ask for twice that, not more.
SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**17, 8, 1
_SCRYPT_MIN_N, _SCRYPT_MAX_BYTES, _SCRYPT_MAX_P = 2**14, 256 * 2**20, 4

_ANY = "UNMERGEABLE-KEY-"  # of any version
_PLAIN = f"{_ANY}1"
_SCRYPT = f"{_PLAIN}-SCRYPT"
_NOTE = "# unmergeable key: keep it secret and keep a backup, without it nothing can be unlocked"


def generate_key(path: str | os.PathLike[str], passphrase: Passphrase | None = None) -> Key:
    """Make a new key and write it to `path`, mode 0600.

    Args:
        path: the new file; it is never overwritten.
        passphrase: text (or a function that returns it) that the file shall need from then on.

    Returns: the key.
    Raises: InputError if the file exists or cannot be made, or the passphrase is empty; RunError if the
        disk is full, in which case no file is left.
    """
    key = Key(os.urandom(KEY_BYTES))
    content = _compose(key, passphrase)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        raise InputError(
            "the file exists, a key file is never overwritten", where=path, hint="choose another name"
        ) from None
    except OSError as error:
        raise InputError("the key file cannot be made", where=path, got=error.strerror) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content())
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        os.unlink(path)
        if isinstance(error, OSError):
            raise RunError("the key file cannot be written", where=path, got=error.strerror) from None
        raise
    return key


def load_key(path: str | os.PathLike[str], passphrase: Passphrase | None = None) -> Key:
    """Read a key file.

    Args:
        path: the file; a link to a regular file is followed.
        passphrase: text, or a function that returns it and is called only if the file needs one.

    Raises: InputError if the file is missing, not a regular file, readable by others, too large, damaged,
        of a newer format, or the passphrase is missing or wrong. No error shows any of its content.
    """
    # No frame that raises holds the file's text: some tracebacks print local variables.
    found, problem, hint = _parse(read_bounded(path, MAX_KEY_FILE, "key file", private=True))
    if isinstance(found, Key):
        return found
    if found is None:
        raise InputError(problem, where=path, hint=hint)
    if passphrase is None:
        raise InputError(
            "the key file needs its passphrase", where=path, hint="give the passphrase it was made with"
        )
    key = found.open(passphrase)
    if key is None:
        raise InputError("the passphrase is wrong", where=path)
    return key


def holds_key(path: str | os.PathLike[str]) -> bool:
    """Whether a file has a key in it, of any version, with a passphrase or without. Raises InputError."""
    if os.stat(path).st_size > MAX_KEY_FILE:
        return False
    content = read_bounded(path, MAX_KEY_FILE, "file")
    return any(line.strip().startswith(_ANY.encode()) for line in content.splitlines())


def read_bounded(path: str | os.PathLike[str], limit: int, kind: str, *, private: bool = False) -> bytes:
    """All bytes of a small regular file (links to one are followed).

    Args:
        limit: the most bytes it may have.
        kind: what to call it in errors.
        private: also refuse a file that group or others may access.

    Raises: InputError for anything else, without waiting on a FIFO and without opening a device.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"the {kind} is not a regular file", where=path)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags | getattr(os, "O_CLOEXEC", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"the {kind} is not a regular file", where=path)
            if private and os.name == "posix" and status.st_mode & 0o077:
                raise InputError(
                    f"others may access the {kind}",
                    where=path,
                    expected="mode 600",
                    got=f"mode {stat.S_IMODE(status.st_mode):03o}",
                    hint=f"chmod 600 {path}",
                )
            # The size first, so that a huge file is refused without being read; then what really came.
            content = b"" if status.st_size > limit else file.read(limit + 1)
    except FileNotFoundError:
        raise InputError(f"there is no such {kind}", where=path) from None
    except (OSError, ValueError) as error:
        got = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"the {kind} cannot be read", where=path, got=got) from None
    size = max(status.st_size, len(content))
    if size > limit:
        raise InputError(
            f"the {kind} is too large", where=path, expected=f"at most {limit} bytes", got=f"{size} bytes"
        )
    return content


class _Locked:
    """The fields of a key line that needs a passphrase, within bounds."""

    def __init__(self, head: str, n: int, r: int, p: int, salt: bytes, box: bytes) -> None:
        self.head, self.n, self.r, self.p, self.salt, self.box = head, n, r, p, salt, box

    def open(self, passphrase: Passphrase) -> Key | None:
        """The key, or None if the passphrase is wrong."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        cipher = ChaCha20Poly1305(_stretch(passphrase, self.salt, self.n, self.r, self.p))
        try:
            return Key(cipher.decrypt(bytes(12), self.box, self.head.encode()))
        except InvalidTag:
            return None


def _compose(key: Key, passphrase: Passphrase | None) -> Callable[[], bytes]:
    """The key file's bytes, behind a function: some tracebacks print local variables."""
    line = _plain_line(key) if passphrase is None else _scrypt_line(key, passphrase)
    content = f"{_NOTE}\n# public key id: {key.id}\n{line}\n".encode("ascii")
    return lambda: content


def _plain_line(key: Key) -> str:
    return _checked(f"{_PLAIN}:{_to_text(key._master)}")


def _scrypt_line(key: Key, passphrase: Passphrase) -> str:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    salt = os.urandom(16)
    head = f"{_SCRYPT}:{SCRYPT_N}:{SCRYPT_R}:{SCRYPT_P}:{_to_text(salt)}"
    # The nonce may be zero: the salt makes the key, and it seals this once.
    cipher = ChaCha20Poly1305(_stretch(passphrase, salt, SCRYPT_N, SCRYPT_R, SCRYPT_P))
    return _checked(f"{head}:{_to_text(cipher.encrypt(bytes(12), key._master, head.encode()))}")


def _stretch(passphrase: Passphrase, salt: bytes, n: int, r: int, p: int) -> bytes:
    text = passphrase if isinstance(passphrase, str) else passphrase()
    try:
        secret = unicodedata.normalize("NFC", text).encode()
    except UnicodeEncodeError:
        raise InputError("the passphrase is not valid text") from None
    if not secret:
        raise InputError("the passphrase is empty")
    try:
        return hashlib.scrypt(
            secret, salt=salt, n=n, r=r, p=p, maxmem=128 * r * (n + p + 2) + 2**20, dklen=32
        )
    except (MemoryError, ValueError) as error:
        raise RunError("scrypt failed, it needs memory", expected=f"{128 * n * r} bytes", got=error) from None


def _parse(content: bytes) -> tuple[Key | _Locked | None, str, str | None]:
    """The key of a key file, or why there is none and what to do; never an error, see load_key."""
    damaged = "restore the file from a backup"
    try:
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError:
        return None, "the key file is not text", damaged
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) != 1:
        return None, f"the key file has {len(lines)} key lines instead of one", damaged
    name, *fields = lines[0].split(":")
    if name not in (_PLAIN, _SCRYPT):
        version = name.removeprefix(_ANY).partition("-")[0]
        if name.startswith(_ANY) and version.isascii() and version.isdigit() and version != "1":
            return None, "the key file has a format that this version does not know", "upgrade unmergeable"
        return None, "the file is not an unmergeable key", "make a key with `unmergeable keygen`"
    body = lines[0].rpartition(":")[0]
    if len(fields) != (2 if name == _PLAIN else 6) or not _same(_checked(body), lines[0]):
        return None, "the key file is damaged, its checksum differs", damaged
    if name == _PLAIN:
        master = _from_text(fields[0], KEY_BYTES)
        return (None, "the key file is damaged", damaged) if master is None else (Key(master), "", None)
    salt, box = _from_text(fields[3], 16), _from_text(fields[4], KEY_BYTES + 16)
    if salt is None or box is None or not all(_is_number(field) for field in fields[:3]):
        return None, "the key file is damaged", damaged
    n, r, p = (int(field) for field in fields[:3])
    bounded = n >= _SCRYPT_MIN_N and 128 * n * r <= _SCRYPT_MAX_BYTES and 1 <= p <= _SCRYPT_MAX_P
    if not bounded or r < 1 or n & (n - 1):
        return None, "the key file asks for scrypt parameters out of bounds", "use a key file that you trust"
    return _Locked(body.rpartition(":")[0], n, r, p, salt, box), "", None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9 and str(int(text)) == text


def _checked(body: str) -> str:
    """A key line: its body and eight characters that notice a slip."""
    return f"{body}:{hashlib.sha256(body.encode()).hexdigest()[:8]}"


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode(), b.encode())


def _to_text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _from_text(text: str, length: int) -> bytes | None:
    """The `length` bytes that `_to_text` writes as exactly this text, else None."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        return None
    return data if len(data) == length and _same(_to_text(data), text) else None
