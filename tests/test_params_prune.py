"""`params`: dropout-based pruning, its sidecar, and what it is worth against matching rows to the base."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.optimize import linear_sum_assignment

from params_toy import (
    CONFIG,
    KEY,
    MLP_SPEC,
    SALT,
    Dictionary,
    draw,
    toy_match,
    toy_spec,
    toy_tensors,
    trained_pair,
)
from unmergeable.checkpoint import open_checkpoint, to_bits, to_float64
from unmergeable.derive import Key
from unmergeable.errors import InputError, UsageError
from unmergeable.lock import lock
from unmergeable.match import match_spec
from unmergeable.methods.prune import CHUNK, Prune, PrunedSource, plan_pruning
from unmergeable.methods.sidecar import Sidecar, write_sidecar
from unmergeable.unlock import unlock


def prunes(match, rate, target="weights", rescale=None):
    return plan_pruning(match, KEY, SALT, rate, target, rescale)


def one(rate=0.3, target="weights", rescale=False, **more):
    return Prune(KEY, SALT, "w", rate, target, rescale, **more)


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.99])
def test_the_rate_is_binomial(rate):
    shape = (400, 300)
    count = np.count_nonzero(one(rate).dropped(shape, 0, 400))
    n = 400 * 300
    assert abs(count - n * rate) < 5 * np.sqrt(n * rate * (1 - rate)) + n * 2**-17


@pytest.mark.parametrize("shape", [(400, 300), (5, 2 * CHUNK), (3, 7, 11), (1000, 1)])
def test_any_rows_by_themselves_are_the_same_rows(shape):
    prune = one()
    whole = prune.dropped(shape, 0, shape[0])
    assert whole.shape == shape
    for start, stop in [(0, 1), (1, shape[0]), (shape[0] // 2, shape[0] // 2 + 1), (2, 2)]:
        assert np.array_equal(prune.dropped(shape, start, stop), whole[start:stop])


def test_lots_depend_on_key_salt_and_name():
    shape, mine = (64, 64), one()
    masks = [
        mine.dropped(shape, 0, 64),
        Prune(Key(bytes(32)), SALT, "w", 0.3, "weights", False).dropped(shape, 0, 64),
        Prune(KEY, bytes(32), "w", 0.3, "weights", False).dropped(shape, 0, 64),
        Prune(KEY, SALT, "v", 0.3, "weights", False).dropped(shape, 0, 64),
    ]
    for other in masks[1:]:
        assert 0.35 < (masks[0] != other).mean() < 0.49  # 2 p (1 - p) = .42


def test_the_first_lots_never_change():
    first = [0, 1, 6, 7, 13, 14, 15, 17, 20, 21, 23, 28, 33, 34, 44, 48, 59]
    assert np.flatnonzero(one().dropped((4, 16), 0, 4)).tolist() == first


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_the_rules(dtype):
    rng = np.random.default_rng(0)
    base, tuned = (to_bits(rng.normal(size=(50, 40)), dtype) for _ in range(2))
    w0, w = to_float64(base, dtype), to_float64(tuned, dtype)
    drop = one().dropped((50, 40), 0, 50)

    def result(prune, reference=None):
        return prune.apply(tuned, dtype, (50, 40), 0, reference)

    assert np.array_equal(result(one()), np.where(drop, 0, tuned))
    assert np.array_equal(result(one(target="update"), w0), np.where(drop, base, tuned))
    grown = np.where(drop, 0, w / 0.7)
    assert np.array_equal(result(one(rescale=True)), to_bits(grown, dtype))
    dare = np.where(drop, w0, w0 + (w - w0) / 0.7)
    got = to_float64(result(one(target="update", rescale=True), w0), dtype)
    np.testing.assert_array_equal(got, to_float64(to_bits(dare, dtype), dtype))


def test_rescaling_beyond_the_dtype_is_refused():
    huge = np.full((4, 4), 65504.0, dtype=np.float16).view(np.uint16)
    with pytest.raises(InputError, match="beyond what its dtype holds"):
        one(rescale=True).apply(huge, "F16", (4, 4), 0)
    with pytest.raises(InputError, match="cannot be pruned"):
        one().apply(np.zeros((4, 4), np.uint8), "U8", (4, 4), 0)


def test_what_is_pruned():
    tensors = toy_tensors()
    match = toy_match(toy_spec(), tensors)
    found = prunes(match, 0.5)
    assert sorted(found) == [f"l.{layer}.{name}" for layer in range(2) for name in ("bias", "down", "gu")]
    source = PrunedSource(Dictionary(tensors), found)
    for name, value in tensors.items():
        pruned = source.read(name).view(np.float64)
        if name.endswith(("gu", "down")):
            assert 0.4 < (pruned == 0).mean() < 0.6
            assert np.array_equal(pruned[pruned != 0], value[pruned != 0])
        else:  # attention, and the experts' biases, which are a table but no matrix
            assert np.array_equal(pruned, value)
    assert not prunes(match, 0.0)
    assert draw(match, tensors).prune == {}
    assert draw(match, tensors, prune_rate=0.5).prune.keys() == found.keys()


def test_only_the_mlps_part_of_a_fused_tensor():
    tensors = toy_tensors()
    match = toy_match(toy_spec(), tensors)
    inside = np.arange(80) % 4 < 2
    prune = Prune(KEY, SALT, "l.0.gu", 0.5, "weights", True, axis=2, inside=inside)
    before = tensors["l.0.gu"]
    after = prune.apply(before.view(np.uint64), "F64", before.shape, 0).view(np.float64)
    assert np.array_equal(after[:, :, ~inside], before[:, :, ~inside])
    assert (after[:, :, inside] != before[:, :, inside]).all()
    rows = Prune(KEY, SALT, "q", 0.5, "weights", False, axis=0, inside=np.arange(48) < 7)
    assert not rows.dropped((48, 20), 7, 48).any()
    assert rows.dropped((48, 20), 0, 7).any()
    assert match.sites  # the plan itself has whole tensors here
    assert all(found.axis is None for found in prunes(match, 0.5).values())


def test_reading_bytes_and_rows():
    tensors = toy_tensors()
    match = toy_match(toy_spec(), tensors)
    source = PrunedSource(Dictionary(tensors), prunes(match, 0.3, "update"), Dictionary(toy_tensors(1)))
    whole = source.read("l.0.down")
    assert np.array_equal(source.read_rows("l.0.down", 1, 3), whole[1:3])
    for offset, count in [(0, 8), (13, 1000), (whole.nbytes - 5, 5)]:
        out = bytearray(count)
        source.readinto("l.0.down", offset, memoryview(out))
        assert bytes(out) == whole.tobytes()[offset : offset + count]
    out = bytearray(24)
    source.readinto("l.0.q", 8, memoryview(out))
    assert bytes(out) == tensors["l.0.q"].tobytes()[8:32]


def test_the_update_needs_its_base():
    tensors = toy_tensors()
    found = prunes(toy_match(toy_spec(), tensors), 0.3, "update")
    assert all(prune.rescale for prune in found.values())
    with pytest.raises(UsageError, match="needs the base"):
        PrunedSource(Dictionary(tensors), found)
    with pytest.raises(InputError, match="has not this tensor"):
        PrunedSource(Dictionary(tensors), found, Dictionary({"l.0.q": tensors["l.0.q"]}))


# --- the sidecar --------------------------------------------------------------------------------------------


def saved(folder: Path, tensors) -> Path:
    folder.mkdir()
    save_file(
        {name: value.astype(np.float16) for name, value in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("target", "rescale"), [("weights", False), ("weights", True), ("update", None)])
def test_the_sidecar_brings_everything_back(tmp_path, target, rescale):
    tensors = toy_tensors()
    match = toy_match(toy_spec(), tensors)
    found = prunes(match, 0.2, target, rescale)
    path, kept = saved(tmp_path / "model", tensors), tmp_path / "kept.safetensors"
    base = open_checkpoint(saved(tmp_path / "base", toy_tensors(1)))
    with base, open_checkpoint(path) as source:
        write_sidecar(kept, SALT, [(".", source, found)])
        pruned = PrunedSource(source, found, base)
        unlocked = {name: pruned.read(name).view(np.float16) for name in source.tensors}
        shards = source.shards
    assert os.stat(kept).st_mode & 0o777 == 0o600
    assert load_file(kept)[".|l.0.down|values"].dtype == np.float16
    folder = tmp_path / "unlocked"
    folder.mkdir()
    file = folder / "model.safetensors"
    original = (path / "model.safetensors").read_bytes()
    data = bytearray(original)
    for info in shards[0].tensors:
        data[info.start : info.stop] = unlocked[info.name].tobytes()
    file.write_bytes(bytes(data))
    assert file.read_bytes() != original
    with Sidecar(kept, SALT) as sidecar:
        count = sidecar.put_back(folder, shards, found)
    assert file.read_bytes() == original
    everything = sum(tensors[f"l.{k}.{n}"].size for k in range(2) for n in ("gu", "down"))
    assert count == everything if found["l.0.gu"].rescale else 0.17 < count / everything < 0.23
    with pytest.raises(InputError, match="exists"), open_checkpoint(path) as source:
        write_sidecar(kept, SALT, [(".", source, found)])


def test_a_wrong_or_damaged_sidecar(tmp_path):
    tensors = toy_tensors()
    found = prunes(toy_match(toy_spec(), tensors), 0.2)
    path, kept = saved(tmp_path / "model", tensors), tmp_path / "kept.safetensors"
    with open_checkpoint(path) as source:
        write_sidecar(kept, SALT, [(".", source, found)])
        shards = source.shards
    before = (path / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="another lock"):
        Sidecar(kept, bytes(32))
    with pytest.raises(InputError, match="file"):
        Sidecar(tmp_path / "none", SALT)
    with pytest.raises(InputError, match="not a file of pruned weights"):
        Sidecar(path / "model.safetensors", SALT)
    with Sidecar(kept, SALT) as sidecar:
        for other in (prunes(toy_match(toy_spec(), tensors), 0.3), {"l.0.q": one()}):
            with pytest.raises(InputError, match="damaged, or of another model"):
                sidecar.put_back(path, shards, other)
    damaged = bytearray(kept.read_bytes())
    damaged[-3] ^= 1
    kept.write_bytes(bytes(damaged))
    with Sidecar(kept, SALT) as sidecar, pytest.raises(InputError, match="damaged"):
        sidecar.put_back(path, shards, found)
    # each tensor is checked before it is written; those before the damaged one are whole
    assert (path / "model.safetensors").read_bytes() == before


def test_a_pruned_lock_and_its_unlock(tmp_path):
    tensors, spec = toy_tensors(), toy_spec()
    path, kept = saved(tmp_path / "model", tensors), tmp_path / "kept.safetensors"
    (path / "config.json").write_text(json.dumps(CONFIG))
    lock(path, tmp_path / "locked", key=KEY, method="params", spec=spec, prune_rate=0.2, salt=SALT)
    unlock(tmp_path / "locked", tmp_path / "unlocked", key=KEY)
    before, locked, after = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "locked", "unlocked")
    )
    for name in ("l.0.gu", "l.1.down"):
        dropped = after[name] == 0
        assert 0.15 < dropped.mean() < 0.25
        assert (locked[name] == 0).sum() == dropped.sum()
        assert np.array_equal(after[name][~dropped], before[name][~dropped])
    assert np.array_equal(after["l.0.bias"], before["l.0.bias"])
    found = prunes(toy_match(spec, tensors), 0.2)
    with open_checkpoint(path) as source, open_checkpoint(tmp_path / "unlocked") as undone:
        write_sidecar(kept, SALT, [(".", source, found)])
        with Sidecar(kept, SALT) as sidecar:
            sidecar.put_back(tmp_path / "unlocked", undone.shards, found)
    after = load_file(tmp_path / "unlocked" / "model.safetensors")
    for name in ("l.0.gu", "l.1.down"):
        assert np.array_equal(after[name].view(np.uint16), before[name].view(np.uint16))


# --- what it is worth ---------------------------------------------------------------------------------------


def matched(locked, base, perm, *, mask_zeros):
    """Part of the rows that a thief with the base finds by Hungarian matching, by least squared distance.

    With `mask_zeros` he knows that zeros are what was dropped, and leaves them out of the distance.
    """

    def rows(w):
        return np.concatenate([w["up"], w["bias"][:, None], w["down"].T], axis=1)

    mine, theirs = rows(base), rows(locked)
    seen = (theirs != 0) if mask_zeros else np.ones(theirs.shape)
    _, columns = linear_sum_assignment(mine**2 @ seen.T - 2 * mine @ theirs.T)
    return float((perm[columns] == np.arange(len(perm))).mean())


@pytest.mark.parametrize(
    ("target", "rate", "plain", "masked"),
    [
        ("weights", 0.0, (1.0, 1.0), (1.0, 1.0)),
        ("weights", 0.2, (0.5, 0.99), (1.0, 1.0)),
        ("weights", 0.5, (0.2, 0.6), (1.0, 1.0)),
        ("weights", 0.97, (0.0, 0.2), (0.5, 1.0)),
        ("update", 0.5, (1.0, 1.0), (1.0, 1.0)),
        ("update", 0.97, (0.9, 1.0), (0.9, 1.0)),
    ],
)
def test_whoever_has_the_base_finds_the_rows_again(target, rate, plain, masked):
    """In rows as short as these 49 numbers zeros mislead who takes them for weights, and nobody else."""
    base, tuned = trained_pair()
    match = match_spec(MLP_SPEC, {n: v.shape for n, v in tuned.items()}, {"ff": 96})
    drawn = draw(match, tuned, base, prune_rate=rate, prune_target=target)
    source = PrunedSource(Dictionary(tuned), drawn.prune, Dictionary(base))
    pruned = {name: source.read(name).view(np.float64) for name in tuned}
    perm = drawn.elements[0, ()].perm[0]
    locked = {"up": pruned["up"][perm], "bias": pruned["bias"][perm], "down": pruned["down"][:, perm]}
    assert plain[0] <= matched(locked, base, perm, mask_zeros=False) <= plain[1]
    assert masked[0] <= matched(locked, base, perm, mask_zeros=True) <= masked[1]
