"""The header of a safetensors file, read without trusting a byte of it.

A file is an 8-byte little-endian length n, n bytes of JSON, then the data:
`{"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {"format": "pt"}}`,
offsets relative to the data. Here every tensor must have a known dtype and the size that its shape says, and
the tensors must cover the data without overlap or hole, as the reference implementation demands.
The JSON is taken apart one tensor at a time, so that a hostile header cannot make more of itself in memory
than a small multiple of its length.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import InputError
from .files import read_into, unique_pairs
from .problems import Problems, quoted

MAX_HEADER = 100_000_000
MAX_DIMS = 64
_MAX_ENTRY = 4096
_MAX_PROBLEMS = 1000
_METADATA = "__metadata__"
# In the order in which the reference implementation lays tensors out, last first.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: absolute byte offsets `start` to `stop` in the file named `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its header verbatim (length and JSON), and its tensors in offset order."""

    file: str
    header: bytes
    metadata: dict[str, str]
    tensors: list[TensorInfo]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.tensors[-1].stop if self.tensors else len(self.header)


def read_header(fd: int, file: str, where: object = None) -> Shard:
    """Reads and checks the header of the open file `fd`.

    Args:
        fd: a descriptor of a regular file.
        file: the name that the tensors get as their `file`.
        where: what messages call the file; `file` if not given.

    Raises:
        InputError: anything that is not exactly a safetensors file; all problems of the tensors at once.
    """
    where = file if where is None else where
    size = os.fstat(fd).st_size
    if size < 8:
        raise InputError("too short for a safetensors file", where=where, expected=">= 8 bytes", got=size)
    prefix = bytearray(8)
    read_into(fd, memoryview(prefix), 0, where)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        hint = "this is hardly a safetensors file; check the download"
        raise InputError(
            "the header is too long", where=where, expected=f"<= {MAX_HEADER} bytes", got=length, hint=hint
        )
    if length > size - 8:
        hint = "the file is cut off; download it again"
        what = "the header claims more bytes than the file has"
        raise InputError(what, where=where, expected=f"<= {size - 8} bytes", got=length, hint=hint)
    header = bytearray(8 + length)
    read_into(fd, memoryview(header), 0, where)
    metadata, tensors = _parse(header, file, where)
    return Shard(file, bytes(header), metadata, _in_order(tensors, 8 + length, size, where))


def build_shard(
    file: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> Shard:
    """The layout of a new file with these tensors (name, dtype, shape), one after the other in this order.

    The bytes are those that the reference implementation writes for the same order.

    Raises:
        InputError: a dtype that safetensors does not have, or a header longer than its limit.
    """
    table: dict[str, object] = {_METADATA: metadata} if metadata else {}
    placed: list[tuple[str, str, tuple[int, ...], int, int]] = []
    at = 0
    for name, dtype, shape in tensors:
        bits = BITS.get(dtype, 0) * math.prod(shape)
        if dtype not in BITS or bits % 8 or name in table or name == _METADATA:
            raise InputError(
                "a safetensors file cannot hold this tensor",
                where=file,
                got=f"{quoted(name)}: {dtype} {shape}",
            )
        stop = at + bits // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        placed.append((name, dtype, shape, at, stop))
        at = stop
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise InputError(
            "too many tensors for one file", where=file, expected=f"<= {MAX_HEADER} bytes", got=len(text)
        )
    base = 8 + len(text)
    infos = [TensorInfo(name, dtype, shape, file, base + a, base + b) for name, dtype, shape, a, b in placed]
    return Shard(file, len(text).to_bytes(8, "little") + text, dict(metadata), infos)


def reference_order(name: str, dtype: str) -> tuple[int, str]:
    """Sorting by this gives the order in which the reference implementation writes tensors."""
    return (-list(BITS).index(dtype), name)


class _Scanner:
    """Walks over the outer JSON objects and hands the small inner ones to `json`. Raises ValueError."""

    _space = re.compile(r"[ \t\n\r]*")
    _decoder = json.JSONDecoder(
        object_pairs_hook=unique_pairs,
        parse_float=lambda text: _refuse(text),
        parse_constant=lambda text: _refuse(text),
    )

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def skip(self) -> None:
        match = self._space.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def take(self, char: str) -> bool:
        self.skip()
        found = self.text.startswith(char, self.at)
        self.at += found
        return found

    def need(self, char: str) -> None:
        if not self.take(char):
            raise ValueError(f"character {self.at} is not {char!r}")

    def string(self) -> str:
        self.skip()
        if not self.text.startswith('"', self.at):
            raise ValueError(f"character {self.at} does not begin a string")
        value, self.at = self._decoder.raw_decode(self.text, self.at)
        assert isinstance(value, str)
        value.encode("utf-8")  # a lone surrogate: UnicodeEncodeError is a ValueError
        return value

    def members(self) -> Iterator[str]:
        """The names of an object's members; the caller consumes each value."""
        self.need("{")
        if self.take("}"):
            return
        while True:
            name = self.string()
            self.need(":")
            yield name
            if self.take("}"):
                return
            self.need(",")

    def flat_object(self) -> object:
        """A small object without objects inside: it ends at the first closing brace."""
        self.skip()
        if not self.text.startswith("{", self.at):
            raise ValueError(f"character {self.at} does not begin an entry")
        stop = self.text.find("}", self.at, self.at + _MAX_ENTRY)
        if stop < 0:
            raise ValueError(f"the entry at character {self.at} does not end")
        try:
            value = self._decoder.decode(self.text[self.at : stop + 1])
        except ValueError as error:
            raise ValueError(f"the entry at character {self.at}: {error}") from None
        self.at = stop + 1
        return value


def _refuse(text: str) -> object:
    raise ValueError(f"{text[:40]} is not a whole number")


def _parse(header: bytearray, file: str, where: object) -> tuple[dict[str, str], list[TensorInfo]]:
    """The metadata of a header and its tensors, each checked by itself, in the order of the header."""
    metadata: dict[str, str] | None = None
    tensors: dict[str, TensorInfo] = {}
    problems = Problems(where)
    try:
        text = str(memoryview(header)[8:], "utf-8")
        if not text.startswith("{"):
            raise ValueError("it does not begin with a brace")
        scanner = _Scanner(text)
        for name in scanner.members():
            if name == _METADATA:
                if metadata is not None:
                    raise ValueError(f"the name {_METADATA!r} occurs twice")
                metadata = _metadata(scanner)
                continue
            if name in tensors:
                raise ValueError(f"the tensor {quoted(name)} occurs twice")
            entry = scanner.flat_object()
            try:
                tensors[name] = _tensor(name, entry, file, len(header))
            except ValueError as error:
                problems.add(f"tensor {quoted(name)}: {error}")
                if len(problems.found) >= _MAX_PROBLEMS:
                    problems.raise_any()
        scanner.skip()
        if scanner.at != len(text):
            raise ValueError(f"there is more behind its end, from character {scanner.at}")
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:300]
        hint = "this is not a safetensors file, or it is damaged; download or save it again"
        raise InputError("the header is not valid", where=where, got=ascii(reason)[1:-1], hint=hint) from None
    problems.raise_any()
    return metadata or {}, list(tensors.values())


def _metadata(scanner: _Scanner) -> dict[str, str]:
    found: dict[str, str] = {}
    for field in scanner.members():
        if field in found:
            raise ValueError(f"the metadata {quoted(field)} occurs twice")
        found[field] = scanner.string()
    return found


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # type() and not isinstance(): true is no number


def _tensor(name: str, entry: object, file: str, base: int) -> TensorInfo:
    """One tensor, its offsets counted from `base`, where the data begin; ValueError says what is wrong."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("the entry does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"unknown dtype {quoted(dtype, 40)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_natural, shape)):
        raise ValueError(f"the shape is not a list of at most {MAX_DIMS} whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise ValueError("the offsets are not two whole numbers")
    start, stop = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or bits // 8 != stop - start:
        said = f"{bits // 8} bytes" if bits < 2**70 else "too many bytes"
        raise ValueError(f"dtype and shape make {said}, the offsets {stop - start}")
    return TensorInfo(name, sys.intern(dtype), tuple(shape), file, base + start, base + stop)


def _in_order(tensors: list[TensorInfo], base: int, size: int, where: object) -> list[TensorInfo]:
    """Sorts tensors by offset and checks that they cover the data from `base` to `size`."""
    problems = Problems(where)
    tensors.sort(key=lambda info: (info.start, info.stop))
    at = base
    for info in tensors:
        if info.start != at and len(problems.found) < _MAX_PROBLEMS:
            kind = "overlaps the one before it" if info.start < at else "leaves a hole before it"
            problems.add(
                f"tensor {quoted(info.name)} {kind}",
                expected=f"offset {at - base}",
                got=info.start - base,
            )
        at = max(at, info.stop)
    if at > size:
        hint = "the file is cut off; download it again"
        problems.add(
            "the header claims more bytes than the file has", expected=f"{at} bytes", got=size, hint=hint
        )
    elif at < size:
        problems.add("the file goes on behind its last tensor", expected=f"{at} bytes", got=size)
    problems.raise_any()
    return tensors
