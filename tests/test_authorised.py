"""Merging with the key: the merge of the originals, locked afresh."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import toy
from unmergeable.authorised import merge, merge_tensor
from unmergeable.checkpoint import to_bits, to_float64
from unmergeable.errors import InputError, UsageError
from unmergeable.lock import lock
from unmergeable.unlock import unlock

SALT = bytes(range(32))
DTYPE = "BF16"


def rounded(values):
    return {name: to_float64(to_bits(value, DTYPE), DTYPE) for name, value in values.items()}


@pytest.fixture
def models(tmp_path):
    """A base and three fine-tunes of it, locked with one key; the third by a dense method."""
    rng = np.random.default_rng(3)
    base = rounded(toy.tensors())
    tuned = [rounded({n: v + 0.1 * rng.normal(size=v.shape) for n, v in base.items()}) for _ in range(3)]
    toy.write(tmp_path / "base", base)
    for n, values in enumerate(tuned):
        toy.write(tmp_path / f"src{n}", values, shards=1 + n)
        method = "gauge" if n == 2 else "exact"
        lock(tmp_path / f"src{n}", tmp_path / f"dst{n}", key=toy.key(), spec=toy.spec(), method=method)
    return base, tuned, tmp_path


def expected(method, tuned, base, weights, density):
    out = {}
    for name in base:
        values = [value[name].astype(np.float32) for value in tuned]
        start = None if method == "linear" else base[name].astype(np.float32)
        out[name] = merge_tensor(method, values, weights, start, density).astype(np.float64)
    return rounded(out)


@pytest.mark.parametrize(
    ("method", "weights"), [("linear", (1, 3)), ("task_arithmetic", (0.6, 0.3)), ("ties", (1, 1))]
)
@pytest.mark.parametrize("lock_method", ["exact", "gauge"])
def test_it_is_the_merge_of_the_originals_locked_afresh(models, method, weights, lock_method):
    base, tuned, folder = models
    want = expected(method, tuned[:2], base, weights, 0.4)
    report = merge(
        [folder / "dst0", folder / "dst1"], folder / "merged", key=toy.key(), method=method, weights=weights,
        base=None if method == "linear" else folder / "base", density=0.4, lock_method=lock_method, salt=SALT,
    )  # fmt: skip
    toy.write(folder / "plain", want)
    lock(folder / "plain", folder / "fresh", key=toy.key(), spec=toy.spec(), method=lock_method, salt=SALT)
    one, two = toy.tree(folder / "merged"), toy.tree(folder / "fresh")
    assert one["model.safetensors"] == two["model.safetensors"]
    if lock_method == "exact":
        unlock(folder / "merged", folder / "open", key=toy.key())
        assert toy.tree(folder / "open") == toy.tree(folder / "plain")
    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (document["document"], document["lock"]["document"]) == (
        "unmergeable.merge",
        "unmergeable.lock",
    )


def test_nothing_unlocked_is_written(models):
    _, tuned, folder = models
    merge([folder / "dst0", folder / "dst1"], folder / "merged", key=toy.key(), jobs=3)
    after, mean = toy.load(folder / "merged"), (tuned[0]["l.0.o.weight"] + tuned[1]["l.0.o.weight"]) / 2
    assert np.linalg.norm(after["l.0.o.weight"] - mean) > 0.5 * np.linalg.norm(mean)


def test_a_dense_lock_and_a_locked_base(models):
    base, tuned, folder = models
    lock(folder / "base", folder / "base-locked", key=toy.key(), spec=toy.spec())
    merge(
        [folder / "dst0", folder / "dst2"], folder / "merged", key=toy.key(), method="task_arithmetic",
        weights=(0.5, 0.5), base=folder / "base-locked",
    )  # fmt: skip
    unlock(folder / "merged", folder / "open", key=toy.key())
    want, got = (
        expected("task_arithmetic", [tuned[0], tuned[2]], base, (0.5, 0.5), 1),
        toy.load(folder / "open"),
    )
    for name in want:
        assert np.linalg.norm(got[name] - want[name]) < 0.01 * np.linalg.norm(want[name])


def test_a_model_locked_in_float32_comes_back_to_its_dtype(models):
    _, tuned, folder = models
    lock(folder / "src0", folder / "wide", key=toy.key(), spec=toy.spec(), dtype="float32")
    merge([folder / "wide", folder / "dst1"], folder / "merged", key=toy.key(), salt=SALT)
    merge([folder / "dst0", folder / "dst1"], folder / "other", key=toy.key(), salt=SALT)
    one, two = toy.tree(folder / "merged"), toy.tree(folder / "other")
    assert one == two
    unlock(folder / "merged", folder / "open", key=toy.key())
    assert np.array_equal(
        toy.load(folder / "open")["embed"],
        rounded({"e": (tuned[0]["embed"] + tuned[1]["embed"]) / 2})["e"],
    )


def test_refusals(models):
    _, _, folder = models
    dst = folder / "merged"

    def fails(kind, match, paths, **more):
        with pytest.raises(kind, match=match):
            merge([folder / path for path in paths], dst, **{"key": toy.key(), **more})
        assert not dst.exists()

    fails(UsageError, "two models", ["dst0"])
    fails(UsageError, "no such merge", ["dst0", "dst1"], method="dare")
    fails(UsageError, "needs the base", ["dst0", "dst1"], method="ties")
    fails(UsageError, "no base", ["dst0", "dst1"], base=folder / "base")
    fails(UsageError, "weight", ["dst0", "dst1"], weights=[1])
    fails(UsageError, "sum to zero", ["dst0", "dst1"], weights=[1, -1])
    fails(UsageError, "density", ["dst0", "dst1"], method="ties", base=folder / "base", density=0)
    fails(InputError, "not locked", ["dst0", "src1"])
    fails(InputError, "another key", ["dst0", "dst1"], key=toy.key(2))
    fails(InputError, "same tensors", ["dst0", "small"]) if _small(folder) else None
    path = folder / "dst1" / "model-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    fails(InputError, "not what was locked", ["dst0", "dst1"])


def _small(folder):
    values = toy.tensors()
    values["embed"] = values["embed"][:30]
    toy.write(folder / "small-src", values)
    lock(folder / "small-src", folder / "small", key=toy.key(), spec=toy.spec())
    shutil.rmtree(folder / "small-src")
    return True


def test_ties_keeps_the_elected_signs():
    base = np.zeros(6, np.float32)
    one, two = np.float32([3, -2, 1, 0.1, 5, 0]), np.float32([1, 4, -0.2, 0.1, -5, 0])
    got = merge_tensor("ties", [one, two], (1, 1), base, 1.0)
    assert np.allclose(got, [2, 4, 1, 0.1, 5, 0])
    got = merge_tensor(
        "ties", [one, two], (1, 1), base, 2 / 6
    )  # 3 and 5 of the first, 4 and -5 of the second
    assert np.allclose(got, [3, 4, 0, 0, 5, 0])
