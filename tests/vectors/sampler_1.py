"""The derivation and the sampler once more, in plain Python from their description in docs/formats.md.

It shares no line with the package: the test vectors must agree with both. Run as a script it prints them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Iterator

MASK = 0xFFFFFFFF
MASTER = bytes(range(32))
SALT = bytes(range(100, 132))


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    prk = hmac.new(salt, secret, hashlib.sha256).digest()
    out, block, counter = b"", b"", 1
    while len(out) < length:
        block = hmac.new(prk, block + info + bytes([counter]), hashlib.sha256).digest()
        out, counter = out + block, counter + 1
    return out[:length]


def _quarter(state: list[int], a: int, b: int, c: int, d: int) -> None:
    for left, right, target, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        state[left] = (state[left] + state[right]) & MASK
        mixed = state[target] ^ state[left]
        state[target] = ((mixed << turn) | (mixed >> (32 - turn))) & MASK


def chacha20_block(key: bytes, counter: int, nonce: bytes) -> bytes:
    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter]
    start += struct.unpack("<3I", nonce)
    state = list(start)
    for _ in range(10):
        for column in ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)):
            _quarter(state, *column)
        for diagonal in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
            _quarter(state, *diagonal)
    return struct.pack("<16I", *((x + y) & MASK for x, y in zip(state, start, strict=True)))


def chacha20_poly1305(key: bytes, nonce: bytes, plaintext: bytes) -> bytes:
    """RFC 8439, section 2.8, without associated data: ciphertext and tag."""
    blocks = range(1, 1 + -(-len(plaintext) // 64))
    pad = b"".join(chacha20_block(key, counter, nonce) for counter in blocks)
    ciphertext = bytes(x ^ y for x, y in zip(plaintext, pad, strict=False))
    authentic = ciphertext + bytes(-len(ciphertext) % 16) + struct.pack("<2Q", 0, len(ciphertext))
    once = chacha20_block(key, 0, nonce)
    r = int.from_bytes(once[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for start in range(0, len(authentic), 16):
        total = (total + int.from_bytes(authentic[start : start + 16] + b"\1", "little")) * r % (2**130 - 5)
    tag = (total + int.from_bytes(once[16:32], "little")) % 2**128
    return ciphertext + tag.to_bytes(16, "little")


def seal(plaintext: bytes, context: str) -> bytes:
    nonce_key = hkdf(MASTER, SALT, b"unmergeable/1/nonce|" + context.encode())
    nonce = hmac.new(nonce_key, plaintext, hashlib.sha256).digest()[:12]
    key = hkdf(MASTER, SALT, b"unmergeable/1/seal|" + context.encode())
    return nonce + chacha20_poly1305(key, nonce, plaintext)


class Reference:
    """The stream of a key, a salt and a label, word by word."""

    def __init__(self, label: str) -> None:
        key = hkdf(MASTER, SALT, b"unmergeable/1|" + label.encode())
        self.source = self._words(key)

    @staticmethod
    def _words(key: bytes) -> Iterator[int]:
        for counter in range(2**32):
            yield from struct.unpack("<8Q", chacha20_block(key, counter, bytes(12)))

    def words(self, n: int) -> list[int]:
        return [next(self.source) for _ in range(n)]

    def permutation(self, n: int) -> list[int]:
        words = self.words(n)
        return sorted(range(n), key=lambda index: (words[index], index))

    def signs(self, n: int) -> list[int]:
        return [-1 if word >= 2**63 else 1 for word in self.words(n)]

    def uniform(self, n: int) -> list[float]:
        return [(word >> 11) / 2**53 for word in self.words(n)]

    def integers(self, bound: int, n: int) -> list[int]:
        limit = 2**64 - 2**64 % bound
        words = self.words(n)
        while rejected := [index for index, word in enumerate(words) if word >= limit]:
            for index in rejected:
                words[index] = next(self.source)
        return [word % bound for word in words]


def vectors() -> dict[str, object]:
    """All test vectors as JSON values; floats in hexadecimal."""
    order = Reference("order")
    mixed = {
        "words": [str(word) for word in order.words(3)],
        "permutation": order.permutation(7),
        "signs": order.signs(5),
        "integers of 3 * 2**61": [str(value) for value in order.integers(3 * 2**61, 6)],
        "uniform": [value.hex() for value in order.uniform(2)],
    }
    batch = Reference("batch")
    bounds = {"1": 5, "6": 12, "1000": 8, str(2**63): 3, str(2**62 + 1): 8}
    large = json.dumps(Reference("large").permutation(5000), separators=(",", ":"))
    return {
        "master": MASTER.hex(),
        "id": "um1-" + hmac.new(MASTER, b"unmergeable/1/id", hashlib.sha256).hexdigest()[:16],
        "salt": SALT.hex(),
        "domain salt of 'house'": hkdf(MASTER, bytes(32), b"unmergeable/1/domain|house").hex(),
        "mac of 'payload'": hmac.new(
            hkdf(MASTER, SALT, b"unmergeable/1/mac"), b"payload", hashlib.sha256
        ).hexdigest(),
        "box of 'payload', context 'manifest'": seal(b"payload", "manifest").hex(),
        "stream key, label 'words'": hkdf(MASTER, SALT, b"unmergeable/1|words").hex(),
        "words(10), label 'words'": [str(word) for word in Reference("words").words(10)],
        "permutation(16), label 'permutation'": Reference("permutation").permutation(16),
        "permutation(5, batch=3), label 'batch'": [batch.permutation(5) for _ in range(3)],
        "signs(16), label 'signs'": Reference("signs").signs(16),
        "uniform(6), label 'uniform'": [value.hex() for value in Reference("uniform").uniform(6)],
        "integers(bound, n), label 'integers <bound>'": {
            bound: [str(value) for value in Reference(f"integers {bound}").integers(int(bound), n)]
            for bound, n in bounds.items()
        },
        "SHA-256 of permutation(5000) as JSON without spaces, label 'large'": hashlib.sha256(
            large.encode()
        ).hexdigest(),
        "one stream, label 'order'": mixed,
    }


def document() -> str:
    """The vectors as the text of sampler-1.json, one a line."""
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in vectors().items())
    return f"{{\n{lines}\n}}\n"


if __name__ == "__main__":
    print(document(), end="")
