"""The key and its file: what it derives, what it refuses, and that it never shows its secret."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmergeable import keys
from unmergeable.errors import InputError, RunError
from unmergeable.keys import Key, fresh_salt, generate_key, load_key

FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE_ID = "um1-973ca0314e622158"
PHRASE = "correct horse battery staple"
MASTER, SALT = bytes(range(32)), bytes(range(100, 132))
KEY = Key(MASTER)


@pytest.fixture(autouse=True)
def _fast_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SCRYPT_N", 2**14)


def private(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(0o600)
    return path


def key_line(path: Path) -> str:
    return path.read_text().splitlines()[-1]


def signed(body: str) -> str:
    return keys._checked(body) + "\n"


def refused(path: Path, passphrase: keys.Passphrase | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        load_key(path, passphrase)
    assert str(path) in str(caught.value)
    return caught.value


# --- the file --------------------------------------------------------------------------------------------


def test_a_new_key_file_is_one_private_line_under_comments(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        key = generate_key(tmp_path / "k")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    lines = (tmp_path / "k").read_text().splitlines()
    assert [line[0] for line in lines] == ["#", "#", "U"]
    assert lines[1] == f"# public key id: {key.id}"
    assert load_key(tmp_path / "k") == key
    assert load_key(str(tmp_path / "k")).id == key.id


def test_two_keys_differ(tmp_path: Path) -> None:
    assert generate_key(tmp_path / "a") != generate_key(tmp_path / "b")
    assert fresh_salt() != fresh_salt()
    assert len(fresh_salt()) == 32


def test_the_keys_of_format_1_are_read_for_ever(tmp_path: Path) -> None:
    plain = private(tmp_path / "plain", (FIXTURES / "key-1.txt").read_bytes())
    locked = private(tmp_path / "locked", (FIXTURES / "key-1-scrypt.txt").read_bytes())
    assert load_key(plain).id == FIXTURE_ID
    assert load_key(locked, PHRASE) == load_key(plain)


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", "\n\n# later\n  \n"])
def test_line_ends_and_comments_do_not_matter(tmp_path: Path, ending: str) -> None:
    line = key_line(FIXTURES / "key-1.txt")
    assert load_key(private(tmp_path / "k", f"# schlüssel\r\n\n  {line}  {ending}")).id == FIXTURE_ID


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    first = generate_key(tmp_path / "k")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("k", "dangling", "."):
        with pytest.raises(InputError, match="never overwritten"):
            generate_key(tmp_path / name)
    assert load_key(tmp_path / "k") == first
    assert sorted(os.listdir(tmp_path)) == ["dangling", "k"]


def test_a_key_file_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be made"):
        generate_key(tmp_path / "missing" / "k")


def test_a_full_disk_leaves_no_key_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(RunError) as caught:
            generate_key(tmp_path / "k")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.got == os.strerror(errno.EFBIG)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o610, 0o666])
def test_a_key_that_others_may_access_is_refused(tmp_path: Path, mode: int) -> None:
    generate_key(tmp_path / "k")
    (tmp_path / "k").chmod(mode)
    error = refused(tmp_path / "k")
    assert error.hint == f"chmod 600 {tmp_path / 'k'}"
    assert error.got == f"mode {mode:03o}"


def test_a_link_to_a_private_key_is_followed_and_to_nothing_refused(tmp_path: Path) -> None:
    key = generate_key(tmp_path / "k")
    (tmp_path / "link").symlink_to("k")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert load_key(tmp_path / "link") == key
    assert "no such key file" in str(refused(tmp_path / "dangling"))
    assert "cannot be read" in str(refused(tmp_path / "loop"))


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), Path("/dev/null")):
        assert "not a regular file" in str(refused(path))
    assert "no such key file" in str(refused(tmp_path / "missing"))
    assert "cannot be read" in str(refused(private(tmp_path / "file", "x") / "below"))


def test_a_path_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_key("a\0b")


def test_an_oversize_file_is_refused_without_being_read(tmp_path: Path) -> None:
    line = key_line(FIXTURES / "key-1.txt")
    limit = keys.MAX_KEY_FILE
    assert load_key(private(tmp_path / "fits", line + "\n" * (limit - len(line)))).id == FIXTURE_ID
    assert "too large" in str(refused(private(tmp_path / "over", line + "\n" * (limit + 1 - len(line)))))
    huge = private(tmp_path / "huge", line)
    os.truncate(huge, 1 << 40)
    assert refused(huge).got == f"{1 << 40} bytes"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "0 key lines"),
        (b"# only a comment\n", "0 key lines"),
        (b"\xff\xfe\x00", "not text"),
        (b"hello\n", "not an unmergeable key"),
        (b"UNMERGEABLE-KEY\n", "not an unmergeable key"),
        (b"UNMERGEABLE-KEY-1X:a:b\n", "not an unmergeable key"),
        (b"AGE-SECRET-KEY-1ABC\n", "not an unmergeable key"),
        (b"UNMERGEABLE-KEY-2:abc:def\n", "format that this version does not know"),
        (b"UNMERGEABLE-KEY-17-ARGON:abc\n", "format that this version does not know"),
        (b"UNMERGEABLE-KEY-1\n", "damaged"),
        (b"UNMERGEABLE-KEY-1:\n", "damaged"),
        (b"UNMERGEABLE-KEY-1::\n", "damaged"),
        (signed("UNMERGEABLE-KEY-1:").encode(), "damaged"),
        (signed("UNMERGEABLE-KEY-1:AAAA").encode(), "damaged"),
        (signed("UNMERGEABLE-KEY-1:" + "A" * 42 + "B").encode(), "damaged"),
        (signed("UNMERGEABLE-KEY-1:" + "A" * 42 + "é").encode(), "damaged"),
        (signed("UNMERGEABLE-KEY-1:" + "A" * 43 + ":A").encode(), "damaged"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    error = refused(private(tmp_path / "k", content))
    assert what in str(error)
    assert error.hint


def test_two_keys_in_one_file_are_refused(tmp_path: Path) -> None:
    line = key_line(FIXTURES / "key-1.txt")
    assert "2 key lines" in str(refused(private(tmp_path / "k", f"{line}\n{line}\n")))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_slip_in_a_key_line_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    name = data.draw(st.sampled_from(["key-1.txt", "key-1-scrypt.txt"]))
    line = key_line(FIXTURES / name)
    place = data.draw(st.integers(0, len(line) - 1))
    new = data.draw(st.sampled_from(["", "A", "x", ":", "-", "0", line[place] * 2]))
    slip = line[:place] + new + line[place + 1 :]
    if slip == line:
        return
    path = private(tmp_path_factory.mktemp("slip") / "k", slip)
    assert refused(path, PHRASE).exit_code == 3
    assert line[20:50] not in str(refused(path, PHRASE))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: f"UNMERGEABLE-KEY-1{text}".encode()))
def test_no_content_makes_anything_but_our_error(content: bytes) -> None:
    found, problem, hint = keys._parse(content)
    assert found is None
    assert problem
    assert hint


# --- the passphrase --------------------------------------------------------------------------------------


def test_a_passphrase_is_needed_and_asked_for_only_then(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask() -> str:
        asked.append("asked")
        return PHRASE

    plain = generate_key(tmp_path / "plain")
    assert load_key(tmp_path / "plain", ask) == plain
    assert load_key(tmp_path / "plain", "not needed") == plain
    assert asked == []
    locked = generate_key(tmp_path / "locked", ask)
    assert asked == ["asked"]
    assert load_key(tmp_path / "locked", ask) == locked
    assert load_key(tmp_path / "locked", PHRASE) == locked
    assert asked == ["asked", "asked"]
    assert key_line(tmp_path / "locked").startswith("UNMERGEABLE-KEY-1-SCRYPT:16384:8:1:")
    assert stat.S_IMODE((tmp_path / "locked").stat().st_mode) == 0o600


def test_a_missing_or_wrong_passphrase_is_refused(tmp_path: Path) -> None:
    generate_key(tmp_path / "k", PHRASE)
    assert "needs its passphrase" in str(refused(tmp_path / "k"))
    for wrong in ("correct horse", PHRASE + " ", lambda: "no"):
        assert "passphrase is wrong" in str(refused(tmp_path / "k", wrong))


@pytest.mark.parametrize("phrase", ["", "\ud800"])
def test_an_impossible_passphrase_is_refused_and_leaves_no_file(tmp_path: Path, phrase: str) -> None:
    with pytest.raises(InputError, match="passphrase is"):
        generate_key(tmp_path / "k", phrase)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_prompt_leaves_no_file(tmp_path: Path) -> None:
    def interrupt() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_key(tmp_path / "k", interrupt)
    assert os.listdir(tmp_path) == []


def test_one_passphrase_typed_in_two_unicode_forms_is_one(tmp_path: Path) -> None:
    key = generate_key(tmp_path / "k", "caf\u00e9")
    assert load_key(tmp_path / "k", "cafe\u0301") == key


@settings(max_examples=8, deadline=None)
@given(phrase=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
def test_any_text_can_be_a_passphrase(tmp_path_factory: pytest.TempPathFactory, phrase: str) -> None:
    path = tmp_path_factory.mktemp("phrase") / "k"
    assert generate_key(path, phrase) == load_key(path, phrase)


@pytest.mark.parametrize(
    "parameters",
    [
        "1073741824:8:1",
        "262144:9:1",
        "16384:1000000:1",
        "131072:8:5",
        "131072:8:0",
        "131072:0:1",
        "0:8:1",
        "8192:8:1",
        "131071:8:1",
        "-131072:8:1",
        "131072:8:1e3",
        "0131072:8:1",
        "9999999999999:8:1",
    ],
)
def test_a_file_cannot_ask_for_scrypt_out_of_bounds(tmp_path: Path, parameters: str) -> None:
    fields = key_line(FIXTURES / "key-1-scrypt.txt").split(":")
    path = private(tmp_path / "k", signed(":".join([fields[0], parameters, *fields[4:6]])))
    error = refused(path, lambda: pytest.fail("asked for a passphrase"))
    assert "out of bounds" in str(error) or "damaged" in str(error)


def test_the_bounds_of_scrypt_hold_the_default() -> None:
    used = 128 * 2**17 * keys.SCRYPT_R
    assert used * 2 == keys._SCRYPT_MAX_BYTES == 256 * 2**20


@pytest.mark.parametrize("field", [1, 4, 5])
def test_the_box_is_bound_to_its_parameters(tmp_path: Path, field: int) -> None:
    fields = key_line(FIXTURES / "key-1-scrypt.txt").split(":")
    other = fields[field][:-2] + ("AA" if fields[field][-2:] != "AA" else "QQ")
    fields[field] = "32768" if field == 1 else other
    error = refused(private(tmp_path / "k", signed(":".join(fields[:6]))), PHRASE)
    assert "wrong" in str(error) or "damaged" in str(error)


def test_scrypt_without_memory_is_a_run_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = private(tmp_path / "k", (FIXTURES / "key-1-scrypt.txt").read_bytes())
    real = hashlib.scrypt
    monkeypatch.setattr(hashlib, "scrypt", lambda *a, **k: real(*a, **{**k, "maxmem": 2**20}))
    with pytest.raises(RunError, match="needs memory"):
        load_key(path, PHRASE)
