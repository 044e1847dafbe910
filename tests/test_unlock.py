"""`unlock`: bit for bit where bits were moved, refused where anything was altered, useful after training."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import toy
from unmergeable.checkpoint import open_checkpoint, to_bits, to_float64
from unmergeable.engine import HALF_ULP
from unmergeable.errors import InputError, UsageError
from unmergeable.lock import lock
from unmergeable.manifest import Manifest
from unmergeable.sealed import Detail, concrete_spec, pack, unpack
from unmergeable.unlock import unlock

MANIFEST = "unmergeable.json"


def locked(src, dst, **more):
    return lock(src, dst, **{"key": toy.key(), "spec": toy.spec(), **more})


def undo(src, dst, **more):
    return unlock(src, dst, **{"key": toy.key(), **more})


@pytest.fixture
def pair(tmp_path):
    src = toy.write(tmp_path / "src", toy.tensors(), shards=2)
    locked(src, tmp_path / "dst")
    return src, tmp_path / "dst"


def alter(path: Path, name: str, change) -> None:
    """Change one tensor's raw bits in the file that holds it."""
    with open_checkpoint(path) as found:
        info, bits = found.tensors[name], found.read(name)
    change(bits)
    file = path / info.file if path.is_dir() else path
    with open(file, "r+b") as stream:
        stream.seek(info.start)
        stream.write(bits.tobytes())


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("scales", [False, True])
def test_exact_comes_back_bit_for_bit(tmp_path, dtype, shards, scales):
    src = toy.write(tmp_path / "src", {**toy.tensors(), "steps": np.arange(6)}, dtype=dtype, shards=shards)
    (src / "empty").mkdir()
    locked(src, tmp_path / "dst", scales=scales)
    report = undo(tmp_path / "dst", tmp_path / "again", jobs=3)
    assert toy.tree(tmp_path / "again") == toy.tree(src)  # modes and empty folders too
    assert report.bit_for_bit
    assert report.altered == ()
    document = json.loads(json.dumps(report.as_dict()))
    assert (document["document"], document["version"]) == ("unmergeable.unlock", 1)


@pytest.mark.parametrize("method", ["gauge", "mergelock"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_dense_methods_come_back_to_rounding(tmp_path, method, dtype):
    src = toy.write(tmp_path / "src", toy.tensors(), dtype=dtype)
    locked(src, tmp_path / "dst", method=method)
    report = undo(tmp_path / "dst", tmp_path / "again")
    assert not report.bit_for_bit
    before, after = toy.load(src), toy.load(tmp_path / "again")
    for name, value in before.items():
        error = np.linalg.norm(after[name] - value) / np.linalg.norm(value)
        assert error <= 6 * HALF_ULP[dtype]
    assert {k: v for k, v in toy.tree(tmp_path / "again").items() if not k.endswith("tensors")} == {
        k: v for k, v in toy.tree(src).items() if not k.endswith("tensors")
    }


@pytest.mark.parametrize("method", ["exact", "gauge"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_float32_goes_back_to_the_dtype_that_it_came_from(tmp_path, method, dtype):
    src = toy.write(tmp_path / "src", toy.tensors(), dtype=dtype, shards=2)
    locked(src, tmp_path / "dst", method=method, dtype="float32")
    undo(tmp_path / "dst", tmp_path / "again")
    if method == "exact":
        assert toy.tree(tmp_path / "again") == toy.tree(src)
    before, after = toy.load(src), toy.load(tmp_path / "again")
    same = [(before[name] == after[name]).mean() for name in before]
    assert min(same) > 0.97  # rounding takes away nearly all of the small error that gauge leaves
    with open_checkpoint(src) as one, open_checkpoint(tmp_path / "again") as two:
        assert [s.header for s in one.shards] == [s.header for s in two.shards]
        assert one.config == two.config


def test_a_single_file_under_another_name(tmp_path):
    src = toy.write_file(tmp_path / "one.safetensors", toy.tensors())
    locked(src, tmp_path / "two.safetensors", config=toy.CONFIG, dtype="float32")
    (tmp_path / "two.safetensors").rename(tmp_path / "three.safetensors")
    with pytest.raises(InputError, match="not locked"):
        undo(tmp_path / "three.safetensors", tmp_path / "four.safetensors")
    (tmp_path / f"two.safetensors.{MANIFEST}").rename(tmp_path / f"three.safetensors.{MANIFEST}")
    undo(tmp_path / "three.safetensors", tmp_path / "four.safetensors")
    assert (tmp_path / "four.safetensors").read_bytes() == src.read_bytes()
    assert not (tmp_path / f"four.safetensors.{MANIFEST}").exists()


def test_it_needs_no_spec_and_no_config(pair, tmp_path):
    _, dst = pair
    details = unpack(Manifest.read(dst / MANIFEST).unseal(toy.key()))
    spec = details["."].spec
    assert all(size.isdigit() for site in spec.sites for size in site.sizes.values())
    assert "evidence" not in json.dumps([dict(site.evidence) for site in spec.sites])


def test_the_manifest_tells_nothing_without_the_key(pair):
    _, dst = pair
    text = (dst / MANIFEST).read_text()
    assert "l.{l}" not in text
    with pytest.raises(InputError):
        Manifest.read(dst / MANIFEST).unseal(toy.key(2))


# --- refusals ------------------------------------------------------------------------------------------


def refused(dst: Path, match: str, **more) -> None:
    out = dst.parent / "out"
    before = toy.tree(dst)
    with pytest.raises(InputError, match=match):
        undo(dst, out, **more)
    assert not out.exists()
    assert toy.tree(dst) == before
    assert not [p for p in dst.parent.iterdir() if p.name.startswith(".")]


def test_wrong_key(pair):
    refused(pair[1], "another key", key=toy.key(2))


def test_not_locked(pair, tmp_path):
    refused(pair[0], "not locked")


@pytest.mark.parametrize("field", ["method", "options", "salt", "domain", "components", "sealed", "mac"])
def test_tampered_manifest(pair, field):
    path = pair[1] / MANIFEST
    data = json.loads(path.read_text())
    changed = {
        "method": "gauge", "options": {"scales": True}, "salt": "00" * 32, "domain": True, "sealed": "",
        "mac": "00" * 32,
    }  # fmt: skip
    if field == "components":
        data["components"]["."]["tensors"]["embed"] = "00" * 32
    else:
        data[field] = changed[field]
    path.write_text(json.dumps(data))
    refused(pair[1], "altered", accept_changed=True)


def test_newer_format(pair):
    path = pair[1] / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    refused(pair[1], "newer format")


@pytest.mark.parametrize("name", ["embed", "l.1.down", "l.0.x.2.up", "l.0.q.bias"])
def test_an_altered_tensor_is_named(pair, name):
    def flip(bits):
        bits.reshape(-1)[-1] ^= 1

    alter(pair[1], name, flip)
    refused(pair[1], name.replace(".", r"\."))


def test_altered_files_and_headers(pair, tmp_path):
    (pair[1] / "tokenizer.json").write_bytes(b"{}")
    refused(pair[1], r"tokenizer\.json")
    undo(pair[1], tmp_path / "out", accept_changed=True)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"


def test_destination_exists(pair):
    with pytest.raises(InputError, match="exists"):
        undo(pair[1], pair[0])


def test_a_missing_tensor(tmp_path):
    src = toy.write(tmp_path / "src", toy.tensors())
    locked(src, tmp_path / "dst")
    values = toy.load(tmp_path / "dst")
    values.pop("l.1.router")
    lost = toy.write(tmp_path / "lost", values)
    shutil.copy(tmp_path / "dst" / MANIFEST, lost)
    refused(lost, r"l\.1\.router", accept_changed=True)


# --- changed after locking -----------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "dtype"), [("exact", "F32"), ("gauge", "F64"), ("exact", "BF16")])
def test_a_model_trained_after_locking(tmp_path, method, dtype):
    """Its unlocked form is the same function as the trained one, under other names and shards too."""
    src = toy.write(tmp_path / "src", toy.tensors(), dtype=dtype)
    locked(src, tmp_path / "dst", method=method)
    rng = np.random.default_rng(5)
    trained = {n: v + 0.05 * rng.normal(size=v.shape) for n, v in toy.load(tmp_path / "dst").items()}
    trained = {n: to_float64(to_bits(v, dtype), dtype) for n, v in trained.items()}
    tuned = toy.write(tmp_path / "tuned", trained, dtype=dtype, shards=3)
    with pytest.raises(InputError, match="not locked"):
        undo(tuned, tmp_path / "out")
    report = undo(tuned, tmp_path / "out", manifest=tmp_path / "dst" / MANIFEST)
    assert not report.bit_for_bit
    assert len(report.altered) >= len(trained)
    after, want = toy.load(tmp_path / "out"), toy.forward(trained)
    assert (
        np.abs(toy.forward(after) - want).max()
        <= (1e-12 if method == "exact" else 1e-11) * np.abs(want).max()
    )
    before = toy.load(src)
    near = [
        np.linalg.norm(after[n] - before[n]) / np.linalg.norm(before[n]) for n in before if n != "l.0.norm"
    ]
    assert max(near) < 0.3  # what was learnt, in the frame of the original


def test_accept_changed_keeps_the_dtype_of_what_was_trained(tmp_path):
    src = toy.write(tmp_path / "src", toy.tensors())
    locked(src, tmp_path / "dst", dtype="float32")
    undo(tmp_path / "dst", tmp_path / "same", accept_changed=True)
    assert toy.tree(tmp_path / "same") == toy.tree(src)

    def nudge(bits):
        bits += np.uint32(3)

    alter(tmp_path / "dst", "embed", nudge)
    undo(tmp_path / "dst", tmp_path / "out", accept_changed=True)
    with open_checkpoint(tmp_path / "out") as found:
        assert {info.dtype for info in found.tensors.values()} == {"F32"}


def test_a_merge_of_models_of_one_domain(tmp_path):
    """Averaged by anybody without the key; opened with one manifest, it is the average of the originals."""
    values = [toy.tensors(seed) for seed in (1, 2)]
    for n, value in enumerate(values):
        locked(toy.write(tmp_path / f"src{n}", value, dtype="F64"), tmp_path / f"dst{n}", domain="house")
    pair = [toy.load(tmp_path / f"dst{n}") for n in range(2)]
    mean = {name: (pair[0][name] + pair[1][name]) / 2 for name in pair[0]}
    merge = toy.write(tmp_path / "merge", mean, dtype="F64")
    undo(merge, tmp_path / "out", manifest=tmp_path / "dst1" / MANIFEST)
    after = toy.load(tmp_path / "out")
    for name in mean:
        assert np.array_equal(after[name], (values[0][name] + values[1][name]) / 2)


# --- pruning -------------------------------------------------------------------------------------------


def test_what_was_pruned_comes_back_from_the_owners_file(tmp_path):
    src, kept = toy.write(tmp_path / "src", toy.tensors()), tmp_path / "kept.safetensors"
    report = locked(src, tmp_path / "dst", method="params", prune_rate=0.2, keep_pruned=kept)
    assert any("changes the function" in note for note in report.notes)
    undo(tmp_path / "dst", tmp_path / "pruned")
    undo(tmp_path / "dst", tmp_path / "again", pruned=kept)
    before, pruned, again = (toy.load(tmp_path / name) for name in ("src", "pruned", "again"))
    assert 0.1 < (pruned["l.0.down"] == 0).mean() < 0.3
    for name, value in before.items():
        assert np.allclose(again[name], value, rtol=0.02, atol=0.02)
    assert np.array_equal(again["l.0.down"], before["l.0.down"])
    with pytest.raises(UsageError, match="kept"):
        locked(src, tmp_path / "x", method="params", keep_pruned=tmp_path / "y")
    with pytest.raises(InputError, match="published"):
        locked(
            src,
            tmp_path / "x",
            method="params",
            prune_rate=0.2,
            keep_pruned=tmp_path / "x" / "y.safetensors",
        )


def test_the_owners_file_goes_where_the_lock_fails(tmp_path, monkeypatch):
    from unmergeable.checkpoint import Staging

    def fail(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "_publish", fail)
    src = toy.write(tmp_path / "src", toy.tensors())
    with pytest.raises(KeyboardInterrupt):
        locked(
            src,
            tmp_path / "dst",
            method="params",
            prune_rate=0.2,
            keep_pruned=tmp_path / "kept.safetensors",
        )
    assert sorted(os.listdir(tmp_path)) == ["src"]


def test_sealed_details_survive(tmp_path):
    from unmergeable.match import match_spec

    shapes = {name: value.shape for name, value in toy.tensors().items()}
    spec = concrete_spec(match_spec(toy.spec(), shapes, toy.CONFIG))
    detail = Detail(spec, {"unscaled": {"a": [1, 2]}}, {"m.safetensors": b"\x00\xff"}, {"config.json": b"{}"})
    assert unpack(pack({".": detail})) == {".": detail}
    match_spec(spec, shapes, {})
    for broken in (b"", b"x", pack({})[:-3]):
        with pytest.raises(InputError, match="malformed"):
            unpack(broken)
