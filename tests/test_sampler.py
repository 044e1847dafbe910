"""The sampler: vectors that never change, RFC vectors, consumption of words, statistical sanity."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import runpy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from unmergeable.errors import UsageError
from unmergeable.keys import Key, domain_salt, hkdf
from unmergeable.sampler import MAX_WORDS, Stream

HERE = Path(__file__).parent
VECTORS = HERE / "vectors" / "sampler-1.json"
REFERENCE: dict[str, Any] = runpy.run_path(str(HERE / "vectors" / "sampler_1.py"))
MASTER, SALT = bytes(range(32)), bytes(range(100, 132))
KEY = Key(MASTER)


def stream(label: str) -> Stream:
    return KEY.stream(SALT, label)


def texts(values: Any) -> list[str]:
    return [str(value) for value in values]


def hexes(values: Any) -> list[str]:
    return [float(value).hex() for value in values]


# --- vectors ---------------------------------------------------------------------------------------------


def test_the_vectors_never_change() -> None:
    assert hashlib.sha256(VECTORS.read_bytes()).hexdigest() == (
        "fbda0fa23f826551f86b81dc435b4842d176d5d127ad22013025e917aafd8371"
    )


def test_an_independent_implementation_agrees_with_the_vectors() -> None:
    assert REFERENCE["document"]() == VECTORS.read_text()


def test_the_package_agrees_with_the_vectors() -> None:
    vectors = json.loads(VECTORS.read_text())
    order, bounds = stream("order"), {"1": 5, "6": 12, "1000": 8, str(2**63): 3, str(2**62 + 1): 8}
    large = json.dumps(stream("large").permutation(5000).tolist(), separators=(",", ":"))
    assert vectors == {
        "master": MASTER.hex(),
        "id": KEY.id,
        "salt": SALT.hex(),
        "domain salt of 'house'": domain_salt("house", KEY).hex(),
        "mac of 'payload'": KEY.mac(SALT, b"payload").hex(),
        "box of 'payload', context 'manifest'": KEY.seal(SALT, b"payload", "manifest").hex(),
        "stream key, label 'words'": hkdf(MASTER, SALT, b"unmergeable/1|words").hex(),
        "words(10), label 'words'": texts(stream("words").words(10)),
        "permutation(16), label 'permutation'": stream("permutation").permutation(16).tolist(),
        "permutation(5, batch=3), label 'batch'": stream("batch").permutation(5, batch=3).tolist(),
        "signs(16), label 'signs'": stream("signs").signs(16).tolist(),
        "uniform(6), label 'uniform'": hexes(stream("uniform").uniform(6)),
        "integers(bound, n), label 'integers <bound>'": {
            bound: texts(stream(f"integers {bound}").integers(int(bound), n)) for bound, n in bounds.items()
        },
        "SHA-256 of permutation(5000) as JSON without spaces, label 'large'": hashlib.sha256(
            large.encode()
        ).hexdigest(),
        "one stream, label 'order'": {
            "words": texts(order.words(3)),
            "permutation": order.permutation(7).tolist(),
            "signs": order.signs(5).tolist(),
            "integers of 3 * 2**61": texts(order.integers(3 * 2**61, 6)),
            "uniform": hexes(order.uniform(2)),
        },
    }


def test_the_docs_show_the_vectors() -> None:
    assert VECTORS.read_text() in (HERE.parent / "docs" / "formats.md").read_text()


def test_hkdf_is_rfc_5869() -> None:
    okm = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    assert hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42).hex() == okm
    okm = (
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87"
    )
    long = [bytes(range(start, start + 80)) for start in (0x00, 0x60, 0xB0)]
    assert hkdf(long[0], long[1], long[2], 82).hex() == okm
    okm = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    assert hkdf(b"\x0b" * 22, b"", b"", 42).hex() == okm


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=80), st.integers(1, 200))
def test_hkdf_agrees_with_cryptography(secret: bytes, salt: bytes, info: bytes, length: int) -> None:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    assert hkdf(secret, salt, info, length) == HKDF(SHA256(), length, salt, info).derive(secret)


def test_chacha20_is_rfc_8439() -> None:
    # Appendix A.1, test vectors 1 and 2: key, nonce zero; counters 0 and 1.
    words = Stream(bytes(32)).words(16).astype("<u8").tobytes().hex()
    assert words == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    # Appendix A.1, test vector 4, and the AEAD without data: the reference stands on the same RFC.
    block = REFERENCE["chacha20_block"](b"\0\xff" + bytes(30), 2, bytes(12))
    assert block.hex().startswith("72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca")


# --- consumption -----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300_000), max_size=4))
def test_words_do_not_depend_on_how_they_are_asked_for(parts: list[int]) -> None:
    whole, pieces = stream("pieces").words(sum(parts)), stream("pieces")
    assert np.array_equal(whole, np.concatenate([pieces.words(n) for n in parts] or [whole]))
    assert pieces.used == sum(parts)


@pytest.mark.parametrize(
    ("draw", "words", "dtype", "shape"),
    [
        (lambda s: s.words(7), 7, np.uint64, (7,)),
        (lambda s: s.permutation(7), 7, np.int64, (7,)),
        (lambda s: s.permutation(7, batch=3), 21, np.int64, (3, 7)),
        (lambda s: s.permutation(0), 0, np.int64, (0,)),
        (lambda s: s.permutation(4, batch=0), 0, np.int64, (0, 4)),
        (lambda s: s.permutation(np.int64(4)), 4, np.int64, (4,)),
        (lambda s: s.signs((2, 3, 4)), 24, np.int8, (2, 3, 4)),
        (lambda s: s.signs(()), 1, np.int8, ()),
        (lambda s: s.uniform((5, 2)), 10, np.float64, (5, 2)),
        (lambda s: s.uniform(np.int64(3)), 3, np.float64, (3,)),
        (lambda s: s.integers(8, (5, 2)), 10, np.int64, (5, 2)),
        (lambda s: s.integers(1, 4), 4, np.int64, (4,)),
    ],
)
def test_draws_have_a_shape_a_dtype_and_a_price(
    draw: Any, words: int, dtype: type, shape: tuple[int, ...]
) -> None:
    source = stream("price")
    value = draw(source)
    assert (source.used, value.dtype, value.shape) == (words, np.dtype(dtype), shape)


def test_a_batch_is_one_permutation_after_the_other() -> None:
    batch, single = stream("batch"), stream("batch")
    assert np.array_equal(batch.permutation(9, batch=4), [single.permutation(9) for _ in range(4)])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**63), st.integers(0, 60), st.integers(0, 1000))
def test_integers_follow_the_written_rule(bound: int, n: int, case: int) -> None:
    source, reference = stream(f"i{case}"), REFERENCE["Reference"](f"i{case}")
    assert source.integers(bound, n).tolist() == reference.integers(bound, n)
    assert source.words(1)[0] == reference.words(1)[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(0, 1000))
def test_permutations_follow_the_written_rule(n: int, case: int) -> None:
    assert stream(f"p{case}").permutation(n).tolist() == REFERENCE["Reference"](f"p{case}").permutation(n)


def test_labels_salts_and_keys_give_unrelated_streams() -> None:
    firsts = {int(stream(label).words(1)[0]) for label in ("a", "b", "ab", "a|", "|a")}
    firsts |= {int(KEY.stream(bytes(32), "a").words(1)[0]), int(Key(SALT).stream(SALT, "a").words(1)[0])}
    assert len(firsts) == 7


@pytest.mark.parametrize(
    "draw",
    [
        lambda s: s.words(-1),
        lambda s: s.words(MAX_WORDS + 1),
        lambda s: s.permutation(-1),
        lambda s: s.permutation(-2, batch=-2),
        lambda s: s.signs((3, -1)),
        lambda s: s.uniform((-1, -1)),
        lambda s: s.integers(0, 3),
        lambda s: s.integers(2**63 + 1, 3),
    ],
)
def test_impossible_draws_are_refused(draw: Any) -> None:
    source = stream("bad")
    with pytest.raises(UsageError):
        draw(source)
    assert source.used == 0


def test_a_stream_is_not_copied_and_shows_nothing() -> None:
    source = stream("secret")
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never copied"):
            copier(source)
    source.words(3)
    assert repr(source) == "Stream(3 words used)"


def test_threads_with_streams_of_their_own_draw_the_same() -> None:
    expected = [stream(f"t{i}").words(50_000) for i in range(4)]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: stream(f"t{i}").words(50_000)}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], expected[i]) for i in range(4))


# --- statistics: the streams are fixed, so these cannot flake ---------------------------------------------


def test_permutations_are_uniform() -> None:
    draws = stream("stat permutation").permutation(4, batch=24_000)
    assert np.array_equal(np.sort(draws, axis=1), np.broadcast_to(np.arange(4), draws.shape))
    _, counts = np.unique(draws @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_large_permutations_have_the_fixed_points_and_the_spread_of_chance() -> None:
    draws = stream("stat large").permutation(100, batch=5000)
    fixed = (draws == np.arange(100)).sum(axis=1)
    assert abs(fixed.mean() - 1) < 0.06  # four standard errors
    assert abs(fixed.var() - 1) < 0.1
    places = np.apply_along_axis(np.bincount, 0, draws, minlength=100)
    assert stats.chisquare(places.ravel()).pvalue > 1e-3


def test_signs_are_fair_and_independent() -> None:
    signs = stream("stat signs").signs((1000, 200)).astype(int)
    assert set(np.unique(signs)) == {-1, 1}
    assert abs(signs.mean()) < 4 / np.sqrt(signs.size)
    flat = signs.ravel()
    assert all(abs((flat[lag:] * flat[:-lag]).mean()) < 4 / np.sqrt(flat.size) for lag in (1, 2, 200))


def test_uniforms_are_uniform_multiples_below_one() -> None:
    draws = stream("stat uniform").uniform(200_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.array_equal(draws * 2.0**53, np.floor(draws * 2.0**53))
    assert stats.kstest(draws, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("bound", [2, 3, 7, 3 * 2**61])
def test_integers_are_uniform(bound: int) -> None:
    draws = stream("stat integers").integers(bound, 60_000)
    assert draws.min() >= 0
    assert draws.max() < bound
    counts = np.bincount((draws.astype(float) / bound * min(bound, 12)).astype(int))
    assert stats.chisquare(counts).pvalue > 1e-3
