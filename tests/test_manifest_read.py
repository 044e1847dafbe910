"""Strict reading of a manifest: whatever is not exactly one is refused, and the error says where."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmergeable.errors import InputError
from unmergeable.keys import Key
from unmergeable.manifest import MAX_MANIFEST, Manifest

FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE: dict[str, Any] = json.loads((FIXTURES / "manifest-1.json").read_text())
KEY = Key(bytes(range(32)))
HASH = "0123456789abcdef" * 4


def put(*path: Any) -> str:
    """The fixture with the value at a path replaced: put("a", "b", value)."""
    document = inner = copy.deepcopy(FIXTURE)
    for step in path[:-2]:
        inner = inner[step]
    inner[path[-2]] = path[-1]
    return json.dumps(document)


def without(*path: str) -> str:
    """The fixture without the field at a path."""
    document = inner = copy.deepcopy(FIXTURE)
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return json.dumps(document)


PART = ("components", "text_encoder")
BAD = [
    ("", "not JSON"),
    ("{", "not JSON"),
    ("\ufeff{}", "not JSON"),
    (b"\xff", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('{"a":' * 100_000, "not JSON"),
    ("9" * 5000, "not JSON"),
    ('{"format": 1e999}', "not JSON"),
    ('{"format": NaN}', "not finite"),
    ('{"format": -Infinity}', "not finite"),
    ("null", "expected an object, got null"),
    ("[]", "expected an object, got a list"),
    ("{}", "has no format"),
    ('{"format": 1, "format": 1}', 'names a key twice, got "format"'),
    ((FIXTURES / "manifest-1.json").read_text().replace('"method"', '"tool"'), 'twice, got "tool"'),
    ('{"format": 2, "anything": []}', "locked with a newer format, expected format 1, got format 2"),
    (put("format", 10**30), "locked with a newer format"),
    (put("format", 0), "field format is malformed, expected 1, got 0"),
    (put("format", -1), "field format is malformed"),
    (put("format", True), "field format is malformed, expected 1, got true"),
    (put("format", 1.0), "field format is malformed"),
    (put("format", "1"), "field format is malformed"),
    (put("extra", 1), 'has an unknown field, got "extra"'),
    (put(*PART, "extra", 1), 'component "text_encoder" has an unknown field, got "extra"'),
    (put("tool", 1), "field tool is malformed, expected a version, got 1"),
    (put("tool", "x" * 65), "field tool is malformed"),
    (put("tool", "1.0\n"), "field tool is malformed"),
    (put("key", None), "field key is malformed"),
    (put("key", "um1-973CA0314e622158"), "field key is malformed"),
    (put("method", []), "field method is malformed"),
    (put("method", "../x"), "field method is malformed"),
    (put("options", []), "field options is malformed, expected an object, got a list"),
    (put("salt", ""), "field salt is malformed, expected 64 hexadecimal characters"),
    (put("salt", HASH.upper()), "field salt is malformed"),
    (put("salt", 5), "field salt is malformed"),
    (put("domain", 1), "field domain is malformed, expected true or false, got 1"),
    (put("domain", "house"), "field domain is malformed"),
    (put("components", []), "field components is malformed"),
    (put("components", {}), "at least one component"),
    (put(*PART, None), 'component "text_encoder" is malformed'),
    (put(*PART, "spec", ""), "field spec is malformed"),
    (put(*PART, "spec", False), "field spec is malformed"),
    (put(*PART, "tensors", None), "field tensors is malformed"),
    (put(*PART, "tensors", "w", 1), 'tensors, "w" is malformed'),
    (put(*PART, "tensors", "w", HASH[1:]), 'tensors, "w" is malformed'),
    (put(*PART, "tensors", "w", HASH[1:] + "g"), 'tensors, "w" is malformed'),
    (put(*PART, "shards", "../x", HASH), "outside of its folder"),
    (put(*PART, "files", "/etc/passwd", HASH), "outside of its folder"),
    (put(*PART, "files", "a//b", HASH), "outside of its folder"),
    (put(*PART, "files", ".", HASH), "outside of its folder"),
    (put(*PART, "files", "", HASH), "outside of its folder"),
    (put(*PART, "files", "a\0b", HASH), "outside of its folder"),
    (put("components", "..", FIXTURE["components"]["."]), "outside of its folder"),
    (put("sealed", None), "field sealed is malformed, expected base64, got null"),
    (put("sealed", "A"), "field sealed is malformed"),
    (put("sealed", "QQ"), "field sealed is malformed"),
    (put("sealed", "QR=="), "field sealed is malformed"),
    (put("sealed", "Q Q=="), "field sealed is malformed"),
    (put("sealed", "é==="), "field sealed is malformed"),
    (put("mac", None), "field mac is malformed"),
    (put("mac", HASH[2:]), "field mac is malformed"),
    (put("options", "x", json.loads("[" * 40 + "]" * 40)), "nested too deep"),
    *((without(name), f"lacks a field, expected {name}") for name in FIXTURE if name != "format"),
    *(
        (without("components", ".", name), f'component "." lacks a field, expected {name}')
        for name in ("spec", "tensors", "shards", "files")
    ),
]


@pytest.mark.parametrize(("content", "what"), BAD, ids=range(len(BAD)))
def test_anything_else_is_refused_and_says_where(tmp_path: Path, content: str | bytes, what: str) -> None:
    path = tmp_path / "unmergeable.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        Manifest.read(path)
    assert what in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 600


def test_a_newer_format_says_to_upgrade(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"format": 2}')
    with pytest.raises(InputError) as caught:
        Manifest.read(tmp_path / "m")
    assert caught.value.hint == "upgrade unmergeable"


def test_hostile_names_are_escaped_and_cut_in_errors(tmp_path: Path) -> None:
    for name in ("\x1b[31m", "\ud800", "x" * 10_000):
        (tmp_path / "m").write_text(json.dumps({**FIXTURE, name: 1}))
        with pytest.raises(InputError) as caught:
            Manifest.read(tmp_path / "m")
        assert "\x1b" not in str(caught.value)
        assert len(str(caught.value)) < 400
        str(caught.value).encode()


def test_special_missing_and_oversize_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            Manifest.read(path)
    with pytest.raises(InputError, match="no such manifest"):
        Manifest.read(tmp_path / "missing")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(MAX_MANIFEST + 1)
    with pytest.raises(InputError, match="too large, expected at most 268435456 bytes"):
        Manifest.read(tmp_path / "huge")


def test_a_link_to_a_manifest_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(FIXTURES / "manifest-1.json")
    assert Manifest.read(tmp_path / "link") == Manifest.read(FIXTURES / "manifest-1.json")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_bytes_are_read_or_refused_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    content = bytearray((FIXTURES / "manifest-1.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_bytes(bytes(content))
    with pytest.raises(InputError):  # one way or another: KEY is not the fixture's
        Manifest.read(path).check(KEY)


def test_reading_stays_quick_with_many_keys(tmp_path: Path) -> None:
    text = ",".join(f'"{i}":0' for i in range(300_000))
    (tmp_path / "m").write_text(f'{{{text},"0":0}}')
    with pytest.raises(InputError, match="twice"):
        Manifest.read(tmp_path / "m")
