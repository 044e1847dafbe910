"""What is derived from a key: MACs, sealed boxes, salts of domains; bad input to them."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmergeable.errors import InputError, UsageError
from unmergeable.keys import Key, domain_salt

MASTER, SALT = bytes(range(32)), bytes(range(100, 132))
KEY = Key(MASTER)


def test_mac() -> None:
    mac = KEY.mac(SALT, b"payload")
    assert len(mac) == 32
    assert KEY.check_mac(SALT, b"payload", mac)
    assert not KEY.check_mac(SALT, b"payloae", mac)
    assert not KEY.check_mac(bytes(32), b"payload", mac)
    assert not KEY.check_mac(SALT, b"payload", mac[:-1])
    assert not KEY.check_mac(SALT, b"payload", b"")
    assert not Key(SALT).check_mac(SALT, b"payload", mac)


@settings(max_examples=50, deadline=None)
@given(
    st.binary(max_size=300),
    st.text(st.characters(codec="utf-8"), max_size=10),
    st.binary(min_size=32, max_size=32),
)
def test_a_sealed_box_opens_with_its_key_salt_and_context_alone(
    plaintext: bytes, context: str, salt: bytes
) -> None:
    box = KEY.seal(salt, plaintext, context)
    assert len(box) == len(plaintext) + 28
    assert KEY.seal(salt, plaintext, context) == box
    assert KEY.open(salt, box, context) == plaintext
    last = bytes([salt[-1] ^ 1])
    for key, other_salt, other in (
        (Key(salt), salt, context),
        (KEY, salt[:-1] + last, context),
        (KEY, salt, context + "x"),
    ):
        with pytest.raises(InputError, match="cannot be opened"):
            key.open(other_salt, box, other)


def test_every_altered_bit_and_every_cut_of_a_box_is_noticed() -> None:
    box = KEY.seal(SALT, b"choices")
    altered = [
        box[:i] + bytes([box[i] ^ 1 << bit]) + box[i + 1 :] for i in range(len(box)) for bit in range(8)
    ]
    for bad in [*altered, *(box[:i] for i in range(len(box))), box + b"\0"]:
        with pytest.raises(InputError, match="cannot be opened"):
            KEY.open(SALT, bad)


def test_boxes_of_different_plaintexts_have_different_nonces() -> None:
    assert len({KEY.seal(SALT, bytes([i]))[:12] for i in range(256)}) == 256


@pytest.mark.parametrize("salt", [b"", b"short", bytes(31), bytes(33), bytes(64)])
def test_a_salt_of_another_length_is_refused(salt: bytes) -> None:
    for use in (lambda: KEY.stream(salt, "x"), lambda: KEY.mac(salt, b""), lambda: KEY.seal(salt, b"")):
        with pytest.raises(UsageError, match="salt"):
            use()


def test_bad_labels_names_and_masters_are_refused() -> None:
    for label in ("", "\ud800"):
        with pytest.raises(UsageError, match="label"):
            KEY.stream(SALT, label)
        with pytest.raises(UsageError, match="domain"):
            domain_salt(label, KEY)
    with pytest.raises(UsageError, match="wrong length"):
        Key(b"short")


def test_a_domains_salt_depends_on_name_and_key_alone() -> None:
    assert domain_salt("house", KEY) == domain_salt("house", Key(MASTER))
    assert domain_salt("caf\u00e9", KEY) == domain_salt("cafe\u0301", KEY)
    salts = {domain_salt("house", KEY), domain_salt("House", KEY), domain_salt("house", Key(SALT))}
    assert len(salts) == 3
    assert {len(salt) for salt in salts} == {32}


def test_a_forked_child_draws_the_same() -> None:
    expected = KEY.stream(SALT, "fork").words(4).tobytes()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, KEY.stream(SALT, "fork").words(4).tobytes())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == expected
    os.close(reader)
    os.close(writer)
