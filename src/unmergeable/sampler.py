"""The sampler: secret words from a ChaCha20 key stream, and the draws that are made of them.

Every draw consumes a documented number of 64-bit words, so a stream means the same on every machine and in
every release. docs/formats.md writes the rules down, tests/vectors/sampler-1.json holds the test vectors.
Nothing here ever changes: a change would make every locked model impossible to unlock.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError

Shape = int | tuple[int, ...]

# ChaCha20 counts blocks of 64 bytes in 32 bits: 256 GiB a stream.
MAX_WORDS = 2**32 * 8

_CHUNK_WORDS = 1 << 17
_ZEROS = bytes(_CHUNK_WORDS * 8)


class Stream:
    """Draws from one ChaCha20 key stream (RFC 8439; nonce zero, counter from zero), in order.

    A stream is a position in a fixed sequence of words. It is cheap: take one for each purpose by its own
    label (`Key.stream`) and do not share one between threads, for the order of draws decides what they are.
    A forked child continues from the position that it inherited, as a copy.

    Args:
        key: 32 secret bytes that nothing else uses.
    """

    __slots__ = ("_cipher", "_used")

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

        self._cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._used = 0

    def __repr__(self) -> str:
        return f"Stream({self._used} words used)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a stream of secret words is never copied or pickled, derive it again from its key")

    @property
    def used(self) -> int:
        """How many words have been consumed."""
        return self._used

    def words(self, n: int) -> NDArray[np.uint64]:
        """The next `n` words: each is 8 bytes of key stream, little endian.

        Returns: uint64 [n].
        Raises: UsageError if `n` is negative or the stream would pass its end at 2**35 words.
        """
        if n < 0 or self._used + n > MAX_WORDS:
            raise UsageError(
                "a stream cannot give so many words",
                expected=f"0 to {MAX_WORDS - self._used}",
                got=n,
                hint="take a stream for each site",
            )
        out = np.empty(n, dtype="<u8")
        for start in range(0, n, _CHUNK_WORDS):
            part = out[start : start + _CHUNK_WORDS].view(np.uint8)
            self._cipher.update_into(memoryview(_ZEROS)[: part.nbytes], part.data)
        self._used += n
        return out.astype(np.uint64, copy=False)

    def permutation(self, n: int, batch: int | None = None) -> NDArray[np.int64]:
        """A uniform permutation of 0 … n-1, or `batch` independent ones.

        Consumes n words, or batch x n. The permutation is the stable argsort of its n words.

        Returns: int64 [n] or [batch, n].
        """
        if batch is None:
            return np.argsort(self.words(_size(n)), kind="stable").astype(np.int64, copy=False)
        words = self.words(_size((batch, n))).reshape(batch, n)
        return np.argsort(words, axis=1, kind="stable").astype(np.int64, copy=False)

    def signs(self, shape: Shape) -> NDArray[np.int8]:
        """Uniform signs: -1 where the top bit of the word is set, else +1. One word each, row-major.

        Returns: int8 of `shape`.
        """
        top = (self.words(_size(shape)) >> np.uint64(63)).astype(np.int8)
        return (1 - 2 * top).astype(np.int8, copy=False).reshape(shape)

    def uniform(self, shape: Shape) -> NDArray[np.float64]:
        """Uniform multiples of 2**-53 in [0, 1): the top 53 bits of the word. One word each, row-major.

        Returns: float64 of `shape`.
        """
        return ((self.words(_size(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)

    def integers(self, bound: int, shape: Shape) -> NDArray[np.int64]:
        """Uniform integers in [0, bound), without bias, by rejection in rounds.

        The first round draws a word w for every element, row-major. Elements with w >= 2**64 - (2**64 mod
        bound) are rejected; each further round draws one word for each element still rejected, in the same
        order. The element is w mod bound. A bound that is a power of two never rejects.

        Returns: int64 of `shape`.
        Raises: UsageError unless 1 <= bound <= 2**63.
        """
        if not 1 <= bound <= 2**63:
            raise UsageError("a bound for integers is out of range", expected="1 to 2**63", got=bound)
        out = self.words(_size(shape))
        last = np.uint64(2**64 - 2**64 % bound - 1)
        rejected = np.flatnonzero(out > last)
        while rejected.size:
            again = self.words(rejected.size)
            out[rejected] = again
            rejected = rejected[again > last]
        out %= np.uint64(bound)
        return out.astype(np.int64).reshape(shape)


def _size(shape: Shape) -> int:
    """How many elements a shape has; raises UsageError for a negative one."""
    sizes = shape if isinstance(shape, tuple) else (shape,)
    total = 1
    for size in sizes:
        if size < 0:
            raise UsageError("a shape cannot be negative", got=shape)
        total *= int(size)
    return total
