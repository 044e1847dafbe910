"""The header reader takes what the safetensors library writes and refuses everything else, cheaply."""

from __future__ import annotations

import json
import os
import random
import re
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from checkpoint_files import arrays, by_hand, entry
from unmergeable.checkpoint import BITS, Shard, build_shard, read_header
from unmergeable.checkpoint.header import MAX_HEADER, reference_order
from unmergeable.errors import InputError


def parse(content: bytes, size: int | None = None) -> Shard:
    """Reads the header of a file that exists in memory only; `size` makes it longer, with a hole."""
    fd = os.memfd_create("header")
    try:
        os.pwrite(fd, content, 0)
        if size is not None:
            os.ftruncate(fd, size)
        return read_header(fd, "f.safetensors")
    finally:
        os.close(fd)


def test_reads_what_the_library_writes() -> None:
    named = arrays()
    content = save(named, {"format": "pt", "é": "ü\n"})
    shard = parse(content)
    assert shard.header + content[len(shard.header) :] == content
    assert shard.size == len(content)
    assert shard.metadata == {"format": "pt", "é": "ü\n"}
    assert [info.start for info in shard.tensors] == sorted(info.start for info in shard.tensors)
    for info in shard.tensors:
        assert info.shape == named[info.name].shape
        assert info.file == "f.safetensors"
        assert content[info.start : info.stop] == named[info.name].tobytes()


def test_takes_empty_tensors_and_no_tensors() -> None:
    assert parse(save({"a": np.zeros((0, 3), np.float32), "b": np.ones(2, np.float32)})).size > 0
    assert parse(by_hand("{}")).tensors == []
    assert (
        parse(by_hand(' {"a" : {"dtype":"U8" ,"shape":[],"data_offsets":[0,1]} }  '[1:], b"x"))
        .tensors[0]
        .nbytes
        == 1
    )


def test_builds_the_bytes_that_the_library_writes() -> None:
    kinds = (
        "uint64 int64 float64 complex64 float32 uint32 int32 bfloat16 float16 uint16 int16 int8 uint8 bool"
    )
    named = {
        f"t{i}": torch.ones(i % 3 + 1, 2).to(getattr(torch, kind)) for i, kind in enumerate(kinds.split())
    }
    named |= {"é": torch.ones(1), "a": torch.ones(2), "scalar": torch.tensor(1.0)}
    metadata = {"format": "pt"}
    content = save_torch(named, metadata)
    tensors = [(info.name, info.dtype, info.shape) for info in parse(content).tensors]
    shuffled = random.Random(0).sample(tensors, len(tensors))
    ordered = sorted(shuffled, key=lambda t: reference_order(t[0], t[1]))
    assert ordered == tensors
    built = build_shard("f.safetensors", ordered, metadata)
    assert built == parse(content)


def test_does_not_build_what_cannot_be_stored() -> None:
    for tensor in [("a", "F12", (1,)), ("a", "F4", (3,)), ("__metadata__", "U8", (1,))]:
        with pytest.raises(InputError, match="cannot hold"):
            build_shard("f", [tensor], {})
    with pytest.raises(InputError, match="cannot hold"):
        build_shard("f", [("a", "U8", (1,)), ("a", "U8", (1,))], {})


GOOD = entry("F32", [2], 0, 8)
TEXT = json.dumps(GOOD)
BAD = {
    "empty": (b"", "too short"),
    "cut prefix": (b"\1\0\0", "too short"),
    "header beyond file": (by_hand("{}", length=99), "claims more bytes"),
    "length of all ones": (b"\xff" * 16, "too long"),
    "not utf-8": (by_hand(b'{"\xff": 1}'), "not valid"),
    "not an object": (by_hand("[1, 2]"), "begin with a brace"),
    "leading space": (by_hand(" {}"), "begin with a brace"),
    "empty header": (by_hand(""), "begin with a brace"),
    "cut json": (by_hand('{"a": {"dtype": "F32"'), "does not end"),
    "rubbish behind": (by_hand("{} x"), "more behind"),
    "nan": (by_hand('{"a": {"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b"\0" * 8), "whole number"),
    "float": (
        by_hand('{"a": {"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', b"\0" * 8),
        "whole number",
    ),
    "tensor twice": (
        by_hand(f'{{"a": {TEXT}, "a": {TEXT}}}', b"\0" * 8),
        "'a' occurs twice",
    ),
    "field twice": (
        by_hand('{"a": {"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "'dtype' occurs twice",
    ),
    "metadata twice": (by_hand('{"__metadata__": {}, "__metadata__": {}}'), "occurs twice"),
    "metadata field twice": (by_hand('{"__metadata__": {"a": "", "a": ""}}'), "occurs twice"),
    "metadata not text": (by_hand({"__metadata__": {"a": 1}}), "begin a string"),
    "metadata a list": (by_hand({"__metadata__": []}), "not valid"),
    "surrogate": (by_hand(f'{{"\\ud800": {TEXT}}}', b"\0" * 8), "surrogate"),
    "dtype unknown": (by_hand({"a": entry("F33", [2], 0, 8)}, b"\0" * 8), "unknown dtype 'F33'"),
    "dtype a list": (by_hand({"a": GOOD | {"dtype": ["F32"]}}, b"\0" * 8), "unknown dtype"),
    "shape a number": (by_hand({"a": GOOD | {"shape": 2}}, b"\0" * 8), "shape is not"),
    "shape negative": (by_hand({"a": entry("F32", [-2, -1], 0, 8)}, b"\0" * 8), "shape is not"),
    "shape of booleans": (by_hand({"a": entry("F32", [2, True], 0, 8)}, b"\0" * 8), "shape is not"),
    "shape too long": (by_hand({"a": entry("F32", [1] * 65, 0, 4)}, b"\0" * 4), "shape is not"),
    "shape overflows": (by_hand({"a": entry("F32", [2**62, 4, 0x10], 0, 0)}), "too many bytes"),
    "shape wraps": (by_hand({"a": entry("F32", [2**62, 4], 0, 0)}), "dtype and shape make"),
    "number too long": (by_hand({"a": entry("F32", [10**3000], 0, 8)}, b"\0" * 8), "shape is not"),
    "offsets of booleans": (
        by_hand({"a": GOOD | {"data_offsets": [False, 8]}}, b"\0" * 8),
        "offsets are not",
    ),
    "offsets three": (by_hand({"a": GOOD | {"data_offsets": [0, 4, 8]}}, b"\0" * 8), "offsets are not"),
    "offsets reversed": (by_hand({"a": entry("F32", [2], 8, 0)}, b"\0" * 8), "the offsets -8"),
    "size disagrees": (by_hand({"a": entry("F32", [3], 0, 8)}, b"\0" * 8), "make 12 bytes, the offsets 8"),
    "bits left over": (by_hand({"a": entry("F4", [3], 0, 1)}, b"\0"), "dtype and shape make"),
    "field missing": (by_hand({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8), "exactly"),
    "field unknown": (by_hand({"a": GOOD | {"x": 1}}, b"\0" * 8), "exactly"),
    "entry a list": (by_hand({"a": [1]}, b"\0" * 8), "does not begin an entry"),
    "overlap": (by_hand({"a": GOOD, "b": entry("F32", [2], 4, 12)}, b"\0" * 12), "overlaps"),
    "same place": (by_hand({"a": GOOD, "b": GOOD}, b"\0" * 8), "overlaps"),
    "hole": (by_hand({"a": GOOD, "b": entry("F32", [1], 12, 16)}, b"\0" * 16), "hole"),
    "hole in front": (by_hand({"a": entry("F32", [1], 4, 8)}, b"\0" * 8), "hole"),
    "data cut": (by_hand({"a": GOOD}, b"\0" * 7), "claims more bytes than the file has"),
    "data too long": (by_hand({"a": GOOD}, b"\0" * 9), "goes on behind"),
    "deep object": (by_hand('{"a":' * 50_000), "not valid"),
    "deep list": (by_hand('{"a":{"shape":' + "[" * 3000 + "}"), "nested too deeply|not valid"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_refuses(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(content)
    assert caught.value.where == "f.safetensors"
    assert str(caught.value).isprintable() or "\n" in str(caught.value)


def test_names_all_problems_at_once() -> None:
    header = {f"t{i}": entry("F33", [1], 0, 1) for i in range(30)}
    with pytest.raises(InputError, match="30 problems") as caught:
        parse(by_hand(header, b"\0"))
    assert "'t0'" in str(caught.value)
    assert "and 10 more" in str(caught.value)


def test_odd_names_are_printable_in_messages() -> None:
    with pytest.raises(InputError) as caught:
        parse(by_hand({"\x1b[2J\n" + "x" * 9000: entry("F33", [1], 0, 1)}, b"\0"))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "bomb",
    [
        b'{"a":{"shape":[' + b"0," * 1_000_000,
        b'{"a":{"shape":[' + b"[]," * 700_000 + b"0]}}",
        b'{"__metadata__":{"a":[' + b"[]," * 700_000 + b'""]}}',
        b'{"__metadata__":' + b"[" * 2_000_000,
        b'{"a":' + b"{" * 2_000_000,
        b'{"a":"' + b"x" * 2_000_000,
        b"{" + b" " * 2_000_000,
        b"{" + b'"a":{},' * 300_000,
        b"{" + b"".join(b'"%d":{},' % i for i in range(150_000)) + b'"":{}}',
    ],
    ids=range(9),
)
def test_a_bomb_costs_a_small_multiple_of_its_bytes(bomb: bytes) -> None:
    content = by_hand(bomb)
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            parse(content)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(content) + (1 << 20)
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 2


def test_very_many_tensors_cost_a_small_multiple_of_their_header() -> None:
    text = "".join(f'"{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}},' for i in range(30_000))
    content = by_hand("{" + text[:-1] + "}", bytes(30_000))
    tracemalloc.start()
    try:
        assert len(parse(content).tensors) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 12 * len(content)
    finally:
        tracemalloc.stop()


def test_a_huge_sparse_file_is_refused_without_reading_it() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="too long"):
            parse((MAX_HEADER + 1).to_bytes(8, "little"), size=1 << 40)
        with pytest.raises(InputError, match="goes on behind"):
            parse(by_hand({"a": GOOD}), size=1 << 40)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


_TOKENS = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"-", b"0", b"9" * 20, b"true", b"null", b"1e9", b"\0",
    b"\xff", b"__metadata__", b"dtype", b"shape", b"data_offsets", b"F32", b"BF16", b"\\ud800",
    b"\\u0000",
]  # fmt: skip


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One to four edits: bits, bytes, deletions, repetitions, tokens, numbers, lengths, cuts."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.3 else rng.randrange(min(len(data), 600) + 1)
        span = rng.randint(1, 40)
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + span]
            case 2:
                data[at:at] = data[at : at + span] * rng.randint(1, 50)
            case 3:
                data[at:at] = rng.choice(_TOKENS)
            case 4:
                data[at : at + rng.randint(0, 8)] = rng.choice(_TOKENS)
            case 5:
                numbers = list(re.finditer(rb"\d+", bytes(data[:600])))
                if numbers:
                    where = rng.choice(numbers)
                    new = rng.choice(
                        [0, 1, 2**31, 2**63, 2**64, 10**30, int(where.group()[:18]) + rng.randint(-9, 9)]
                    )
                    data[where.start() : where.end()] = str(new).encode()
            case 6:
                data[:8] = rng.choice(
                    [rng.randrange(2 * len(data) + 2), rng.getrandbits(64), 2**63, MAX_HEADER]
                ).to_bytes(8, "little")
            case _:
                del data[at:]
    return bytes(data)


def test_ten_thousand_mutated_files_do_no_harm() -> None:
    rng = random.Random(20240917)
    seeds = [save(arrays(count=count), {"format": "pt"} if count % 2 else None) for count in range(1, 5)]
    seeds.append(
        by_hand({"a": GOOD, "é": entry("I64", [], 8, 16), "z": entry("U8", [0, 7], 16, 16)}, b"\0" * 16)
    )
    refused = 0
    slowest = 0.0
    started = time.perf_counter()
    tracemalloc.start()
    try:
        for _ in range(10_000):
            content = mutate(rng, rng.choice(seeds))
            before = time.perf_counter()
            try:
                shard = parse(content)
            except InputError:
                refused += 1
            else:  # what is accepted is consistent
                assert shard.size == len(content)
                assert all(0 < info.start <= info.stop <= len(content) for info in shard.tensors)
            slowest = max(slowest, time.perf_counter() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused > 7_000
    assert peak < 8 << 20
    assert slowest < 1
    assert time.perf_counter() - started < 60  # about five seconds alone


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F33"]) | _JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=4) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 99), min_size=2, max_size=2) | _JSON,
    }
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.text(max_size=12) | st.just("__metadata__"), _ENTRY | _JSON, max_size=4),
    st.binary(max_size=64),
)
def test_any_json_is_read_or_refused(header: dict[str, object], data: bytes) -> None:
    with suppress(InputError):
        parse(by_hand(json.dumps(header), data))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    for whole in (content, by_hand(content)):
        with suppress(InputError):
            parse(whole)


_TEXT = st.text(st.characters(codec="utf-8"), max_size=9).filter(lambda name: name != "__metadata__")
_KIND = st.tuples(
    st.sampled_from([dtype for dtype, bits in BITS.items() if bits % 8 == 0]),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(_TEXT, _KIND, max_size=5), st.dictionaries(_TEXT, _TEXT, max_size=3))
def test_what_is_built_is_read_back(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    built = build_shard("f.safetensors", [(name, *kind) for name, kind in tensors.items()], metadata)
    again = parse(built.header, size=built.size)
    assert (again.header, again.metadata, again.size) == (built.header, built.metadata, built.size)
    assert {info.name: info for info in again.tensors} == {info.name: info for info in built.tensors}


def test_where_names_the_path(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(b"12345678{}")
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(InputError) as caught:
            read_header(fd, "f.safetensors", path)
    finally:
        os.close(fd)
    assert caught.value.where == str(path)
