"""A key's secret is never shown: not by repr, str, pickle, errors, nor tracebacks with local variables."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest

from unmergeable import keys
from unmergeable.errors import RunError, UnmergeableError
from unmergeable.keys import Key, domain_salt, generate_key, load_key

FIXTURES = Path(__file__).parent / "fixtures"
PHRASE = "correct horse battery staple"
MASTER, SALT = bytes(range(32)), bytes(range(100, 132))
KEY = Key(MASTER)


def private(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(0o600)
    return path


def key_line(path: Path) -> str:
    return path.read_text().splitlines()[-1]


def shown(secret: bytes) -> list[str]:
    """Every way in which the secret could be written out."""
    text = keys._to_text(secret)
    return [secret.hex(), text, text[:20], text[-20:], repr(secret)[2:-1], str(list(secret))[1:-1]]


def assert_hidden(text: str, secret: bytes) -> None:
    for form in shown(secret):
        assert form not in text


def test_a_key_shows_its_id_alone() -> None:
    for text in (repr(KEY), str(KEY), f"{KEY}", f"{KEY!r:>40}", repr([KEY]), repr({"key": KEY})):
        assert KEY.id in text
        assert_hidden(text, MASTER)
    assert not hasattr(KEY, "__dict__")
    assert KEY.id == "um1-36a5d74c670c1c7f"


def test_a_key_is_neither_pickled_nor_changed() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(KEY, protocol)
    with pytest.raises(TypeError, match="never pickled"):
        KEY.__reduce__()
    for name in ("id", "_master", "other"):
        with pytest.raises(AttributeError):
            setattr(KEY, name, "x")
    assert copy.copy(KEY) is KEY
    assert copy.deepcopy({"key": KEY})["key"] is KEY
    assert {KEY: 1}[Key(MASTER)] == 1
    assert Key(MASTER) != MASTER


def failures(tmp_path: Path) -> list[Any]:
    """Calls that fail while a key or its file is in hand, the fixture key in a file that is damaged."""
    line = key_line(FIXTURES / "key-1.txt")
    body = line.rpartition(":")[0]
    good = private(tmp_path / "good", line)
    key = load_key(good)
    open_mode = private(tmp_path / "open", line)
    open_mode.chmod(0o644)
    cases = [
        line[:-1],
        line[:-1] + "z",
        f"{line}\n{line}",
        "X" + line,
        keys._checked(body + ":x"),
        line + "é",
        body,
    ]
    bad = [private(tmp_path / f"bad{i}", case) for i, case in enumerate(cases)]
    return [
        *(lambda path=path: load_key(path) for path in [*bad, open_mode]),
        lambda: generate_key(good),
        lambda: key.open(SALT, bytes(50)),
        lambda: key.stream(b"", "x"),
        lambda: key.stream(SALT, ""),
        lambda: domain_salt("", key),
        lambda: pickle.dumps(key),
    ]


def test_no_traceback_shows_the_secret_even_with_local_variables(tmp_path: Path) -> None:
    key = load_key(private(tmp_path / "k", (FIXTURES / "key-1.txt").read_bytes()))
    for call in failures(tmp_path):
        try:
            call()
        except (UnmergeableError, TypeError) as error:
            frames = traceback.TracebackException.from_exception(error, capture_locals=True)
            assert_hidden("".join(frames.format()), key._master)
            assert_hidden(repr(error) + str(error), key._master)
            if isinstance(error, UnmergeableError):
                assert_hidden(str(error.as_dict()), key._master)
        else:
            pytest.fail("did not fail")


def test_no_traceback_of_a_full_disk_shows_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "urandom", lambda n: MASTER[:n])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError) as caught:
        generate_key(tmp_path / "k")
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert_hidden("".join(frames.format()), MASTER)
    assert os.listdir(tmp_path) == []


def test_a_locked_key_file_does_not_hold_the_secret(tmp_path: Path) -> None:
    key = generate_key(tmp_path / "k", PHRASE)
    assert_hidden((tmp_path / "k").read_text(), key._master)
