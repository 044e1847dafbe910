"""The owner's key in memory: 32 secret bytes and all that is derived from them.

Everything that a lock keeps secret follows from the key and a salt through HKDF-SHA256 under separate
labels: the streams that pick a site's element, the key that signs a manifest, the key that seals what the
manifest must carry unseen. docs/formats.md lists the labels and the test vectors; none of them ever changes.
"""

from __future__ import annotations

import hmac
import os
import unicodedata
from typing import NoReturn

from .errors import InputError, UsageError
from .sampler import Stream

KEY_BYTES = 32
SALT_BYTES = 32


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869): `length` bytes (at most 8160) bound to `salt` and `info`."""
    pseudorandom = hmac.digest(salt or bytes(32), secret, "sha256")
    block, out = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(pseudorandom, block + info + bytes([counter]), "sha256")
        out += block
    return out[:length]


def fresh_salt() -> bytes:
    """32 random bytes from the operating system, for one lock."""
    return os.urandom(SALT_BYTES)


def domain_salt(name: str, key: Key) -> bytes:
    """The salt that all locks of one domain under one key share.

    It depends on the key, so that the salt in a manifest cannot be searched for the domain's name.

    Returns: 32 bytes.
    Raises: UsageError if the name is empty or not text.
    """
    text = _encode(unicodedata.normalize("NFC", name), "the domain's name")
    return key._derive(bytes(SALT_BYTES), b"unmergeable/1/domain|" + text)


class Key:
    """The owner's secret. Immutable, safe between threads and across a fork; never shown, never pickled.

    Args:
        master: the 32 secret bytes.

    Attributes:
        id: the public name of the key, `um1-` and 16 hexadecimal characters, derived by HMAC-SHA256.
    """

    __slots__ = ("_master", "id")

    _master: bytes
    id: str

    def __init__(self, master: bytes) -> None:
        if len(master) != KEY_BYTES:
            raise UsageError(
                "a key has the wrong length", expected=f"{KEY_BYTES} bytes", got=f"{len(master)} bytes"
            )
        object.__setattr__(self, "_master", bytes(master))
        digest = hmac.digest(self._master, b"unmergeable/1/id", "sha256")
        object.__setattr__(self, "id", "um1-" + digest[:8].hex())

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a key cannot be changed")

    def __repr__(self) -> str:
        return f"Key({self.id})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and hmac.compare_digest(self._master, other._master)

    def __hash__(self) -> int:
        return hash(self.id)

    def __copy__(self) -> Key:
        return self

    def __deepcopy__(self, memo: object) -> Key:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is never pickled, load it from its file where it is needed")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__reduce__()

    def _derive(self, salt: bytes, info: bytes) -> bytes:
        if len(salt) != SALT_BYTES:
            # HMAC pads a short salt with zeros, so salts of different lengths could mean the same.
            raise UsageError(
                "a salt has the wrong length",
                expected=f"{SALT_BYTES} bytes",
                got=f"{len(salt)} bytes",
                hint="make one with fresh_salt() or domain_salt(name, key)",
            )
        return hkdf(self._master, salt, info)

    def stream(self, salt: bytes, label: str) -> Stream:
        """The secret words for one purpose: HKDF-SHA256(key, salt, "unmergeable/1|" + label) -> ChaCha20.

        Args:
            salt: 32 bytes, public, of this lock.
            label: what the words are for, unique within the lock: method, site and instance.

        Raises: UsageError for a salt of another length or an empty label.
        """
        return Stream(self._derive(salt, b"unmergeable/1|" + _encode(label, "a stream's label")))

    def mac(self, salt: bytes, payload: bytes) -> bytes:
        """HMAC-SHA256 of `payload` under a key of its own. Returns 32 bytes."""
        return hmac.digest(self._derive(salt, b"unmergeable/1/mac"), payload, "sha256")

    def check_mac(self, salt: bytes, payload: bytes, mac: bytes) -> bool:
        """Whether `mac` is the MAC of `payload`, compared in constant time."""
        return hmac.compare_digest(self.mac(salt, payload), mac)

    def seal(self, salt: bytes, plaintext: bytes, context: str = "") -> bytes:
        """Encrypt and authenticate `plaintext`, bound to the key, the salt and `context`.

        ChaCha20-Poly1305 with a nonce made from the plaintext by HMAC: the same input gives the same box,
        and one nonce does not meet two plaintexts. Returns nonce (12 bytes), ciphertext, tag (16 bytes).
        """
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        nonce_key = self._derive(salt, b"unmergeable/1/nonce|" + context.encode())
        nonce = hmac.digest(nonce_key, plaintext, "sha256")[:12]
        cipher = ChaCha20Poly1305(self._derive(salt, b"unmergeable/1/seal|" + context.encode()))
        return nonce + cipher.encrypt(nonce, plaintext, None)

    def open(self, salt: bytes, box: bytes, context: str = "") -> bytes:
        """What `seal` was given.

        Raises: InputError if the box was made with another key, salt or context, or altered since.
        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        cipher = ChaCha20Poly1305(self._derive(salt, b"unmergeable/1/seal|" + context.encode()))
        try:
            if len(box) >= 12 + 16:
                return cipher.decrypt(box[:12], box[12:], None)
        except InvalidTag:
            pass  # the same error as for a box that is too short
        raise InputError(
            "a sealed box cannot be opened, it was altered or sealed with another key", got=self.id
        )


def _encode(text: str, what: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not valid text", got=ascii(text)) from None
    if not data:
        raise UsageError(f"{what} is empty")
    return data
