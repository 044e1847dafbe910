"""`lock`: same function, same bytes whatever the split and the threads, and nothing written where it refuses."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest

import toy
from toy import locked, nothing_at
from unmergeable.checkpoint import open_checkpoint
from unmergeable.engine import HALF_ULP
from unmergeable.errors import ClaimError, InputError, UsageError
from unmergeable.lock import lock
from unmergeable.manifest import Manifest
from unmergeable.spec import Spec
from unmergeable.unlock import unlock

SALT = bytes(range(32))
UNTOUCHED = ("embed", "l.0.norm", "l.1.norm")


@pytest.fixture
def src(tmp_path):
    return toy.write(tmp_path / "src", toy.tensors(), shards=3)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("method", "more", "factor"),
    [("exact", {}, 0), ("exact", {"scales": True}, 0), ("gauge", {}, 6), ("mergelock", {}, 6)],
)  # fmt: skip
def test_the_function_is_preserved_and_the_weights_move(tmp_path, dtype, method, more, factor):
    src = toy.write(tmp_path / "src", toy.tensors(), dtype=dtype)
    before, mode = toy.load(src), toy.tree(src)
    report = locked(src, tmp_path / "dst", method=method, **more)
    after = toy.load(tmp_path / "dst")
    assert toy.tree(src) == mode
    want, got = toy.forward(before), toy.forward(after)
    assert np.abs(got - want).max() <= (factor * HALF_ULP[dtype] + 1e-13) * np.abs(want).max()
    for name in UNTOUCHED:
        assert np.array_equal(before[name], after[name])
    acted = [site for site in report.sites if site.acted]
    assert acted
    assert all(site.moved is not None and site.moved >= 0.5 for site in acted)
    assert {site.kind for site in acted} == (
        {"qk", "vo"} if method == "mergelock" else {"qk", "vo", "mlp", "heads", "experts"}
    )
    largest = report.rounding["largest"]
    assert (largest == 0) if factor == 0 else (0 < largest <= HALF_ULP[dtype])


def test_everything_but_the_weights_is_the_same(src, tmp_path):
    os.mkdir(src / "empty")
    os.chmod(src / "tokenizer.json", 0o600)
    mask = os.umask(0o027)
    try:
        report = locked(src, tmp_path / "dst")
    finally:
        os.umask(mask)
    before, after = toy.tree(src), toy.tree(tmp_path / "dst")
    assert after.pop("unmergeable.json")[0] & 0o777 == 0o640
    assert after.keys() == before.keys()
    for name, (_, data) in after.items():
        if not name.endswith(".safetensors"):
            assert data == before[name][1]
    assert {mode & 0o777 for name, (mode, _) in after.items() if not (tmp_path / "dst" / name).is_dir()} == {
        0o640
    }
    with open_checkpoint(src) as one, open_checkpoint(tmp_path / "dst") as two:
        assert [(s.file, s.header) for s in one.shards] == [(s.file, s.header) for s in two.shards]
    assert (report.tensors_changed, report.tensors_untouched) == (44, 3)
    assert report.refused == ((".", "l.{l}.norm", "a norm has no symmetry of its own"),)


def test_bytes_depend_on_plan_and_tensor_alone(tmp_path):
    whole = toy.write(tmp_path / "whole", toy.tensors())
    split = toy.write(tmp_path / "split", toy.tensors(), shards=5)
    for method in ("exact", "gauge"):
        places = []
        for src, jobs in ((whole, 1), (whole, 4), (split, 1), (split, 3)):
            places.append(tmp_path / f"{method}-{src.name}-{jobs}")
            locked(src, places[-1], method=method, jobs=jobs, salt=SALT)
        first = toy.load(places[0])
        for place in places[1:]:
            other = toy.load(place)
            assert all(np.array_equal(first[name], other[name]) for name in first)
        assert toy.tree(places[0]) == toy.tree(places[1])  # the manifest too: same key, same salt
        assert toy.tree(places[2]) == toy.tree(places[3])


def test_salts_and_keys_make_locks_differ(src, tmp_path):
    for n, more in enumerate(
        ({}, {}, {"domain": "a"}, {"domain": "a"}, {"domain": "b"}, {"domain": "a", "key": toy.key(2)})
    ):
        locked(src, tmp_path / str(n), **more)
    bits = [(tmp_path / str(n) / "model-00001-of-00003.safetensors").read_bytes() for n in range(6)]
    assert bits[2] == bits[3]
    assert len(set(bits)) == 5
    manifest = Manifest.read(tmp_path / "2" / "unmergeable.json")
    assert manifest.domain
    assert '"a"' not in json.dumps(manifest.to_json())


def test_a_domain_is_warned_of(src, tmp_path):
    assert any("without the key" in note for note in locked(src, tmp_path / "dst", domain="house").notes)


def test_the_report_is_a_document(src, tmp_path):
    calls = []
    report = locked(
        src, tmp_path / "dst", progress=lambda done, total, label: calls.append((done, total, label))
    )
    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (document["document"], document["version"]) == ("unmergeable.lock", 1)
    assert document["manifest"] == str(tmp_path / "dst" / "unmergeable.json")
    assert {site["site"] for site in document["sites"]} == {site.name for site in toy.spec().sites}
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1][0] == calls[-1][1]


def test_a_dry_run_writes_nothing(src, tmp_path):
    report = locked(src, tmp_path / "dst", dry_run=True)
    assert report.dry_run
    assert [site.moved for site in report.sites] == [None] * 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_float32_keeps_precision(src, tmp_path):
    report = locked(src, tmp_path / "dst", method="gauge", dtype="float32")
    want, after = toy.forward(toy.load(src)), toy.load(tmp_path / "dst")
    assert np.abs(toy.forward(after) - want).max() <= 1e-6 * np.abs(want).max()
    with open_checkpoint(tmp_path / "dst") as found:
        assert {info.dtype for info in found.tensors.values()} == {"F32"}
        assert found.config is not None
        assert found.config["torch_dtype"] == "float32"
        total = sum(info.nbytes for info in found.tensors.values())
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert report.rounding["half_ulp"] == HALF_ULP["F32"]


def test_a_single_file(tmp_path):
    src = toy.write_file(tmp_path / "one.safetensors", toy.tensors())
    with pytest.raises(InputError, match="config"):
        locked(src, tmp_path / "two.safetensors")
    report = locked(src, tmp_path / "two.safetensors", config=toy.CONFIG)
    assert report.manifest == str(tmp_path / "two.safetensors.unmergeable.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "one.safetensors", "two.safetensors", "two.safetensors.unmergeable.json",
    ]  # fmt: skip
    want = toy.forward(toy.load(src))
    assert np.allclose(toy.forward(toy.load(tmp_path / "two.safetensors")), want, rtol=1e-12)


def test_pickles_become_safetensors(tmp_path):
    torch = pytest.importorskip("torch")
    values = toy.tensors()
    (tmp_path / "src").mkdir()
    torch.save(
        {n: torch.tensor(v, dtype=torch.bfloat16) for n, v in values.items()},
        tmp_path / "src/pytorch_model.bin",
    )
    (tmp_path / "src/config.json").write_text(json.dumps(toy.CONFIG))
    report = locked(tmp_path / "src", tmp_path / "dst")
    assert any("converted" in note for note in report.notes)
    assert sorted(p.name for p in (tmp_path / "dst").iterdir()) == [
        "config.json",
        "model.safetensors",
        "unmergeable.json",
    ]
    unlock(tmp_path / "dst", tmp_path / "again", key=toy.key())
    rounded = toy.load(toy.write(tmp_path / "rounded", values))
    assert all(np.array_equal(value, rounded[name]) for name, value in toy.load(tmp_path / "again").items())


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(tmp_path, value):
    tensors = toy.tensors()
    tensors["l.1.q.weight"][3, 4] = value
    src = toy.write(tmp_path / "src", tensors)
    with pytest.raises(InputError, match=r"l\.1\.q\.weight.*NaN"):
        locked(src, tmp_path / "dst", method="gauge")
    assert nothing_at(tmp_path / "dst")
    locked(src, tmp_path / "dst")
    unlock(tmp_path / "dst", tmp_path / "again", key=toy.key())
    assert toy.tree(src) == toy.tree(tmp_path / "again")


def test_overflow_in_half_precision_is_refused(tmp_path):
    tensors = toy.tensors()
    tensors["l.0.v.weight"] *= 15000
    src = toy.write(tmp_path / "src", tensors, dtype="F16")
    with pytest.raises(InputError, match="too large"):
        locked(src, tmp_path / "dst", method="gauge")
    assert nothing_at(tmp_path / "dst")


def test_weights_that_hardly_move_fail_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["unmergeable.lock"], "MIN_MOVE", 9.0)
    with pytest.raises(ClaimError, match="the weights hardly moved"):
        locked(toy.write(tmp_path / "src", toy.tensors()), tmp_path / "dst")
    assert nothing_at(tmp_path / "dst")


def test_weights_that_are_zero_do_not(tmp_path):
    """A part that was pruned away hides nothing, and the others do."""
    tensors = toy.tensors()
    for name in ("l.0.v.weight", "l.0.o.weight"):
        tensors[name][:] = 0
    locked(toy.write(tmp_path / "src", tensors), tmp_path / "dst")


def test_a_site_too_small_to_hide_anything(tmp_path):
    data = toy.spec_dict()
    data["sites"] = [site for site in data["sites"] if site["name"] == "l.{l}.heads"]
    data["untouched"] += [
        f"l.{{l}}.{n}" for n in ("gu", "down", "router", "x_router", "x.{e}.gate", "x.{e}.up", "x.{e}.down")
    ]
    data["sites"][0]["group"] = "sign"
    src = toy.write(tmp_path / "src", toy.tensors())
    report = locked(src, tmp_path / "dst", spec=Spec.from_dict(data))  # a sign a head is enough
    assert report.sites[0].moved is not None


def test_locked_twice(src, tmp_path):
    locked(src, tmp_path / "one")
    with pytest.raises(InputError, match="already locked"):
        locked(tmp_path / "one", tmp_path / "two")
    assert nothing_at(tmp_path / "two")


def test_the_config_contradicts_the_shapes(tmp_path):
    src = toy.write(tmp_path / "src", toy.tensors(), config={**toy.CONFIG, "kv": 2})
    with pytest.raises(InputError, match=r"k\.weight: axis 0"):
        locked(src, tmp_path / "dst")
    assert nothing_at(tmp_path / "dst")


def test_destinations(src, tmp_path):
    (tmp_path / "there").mkdir()
    for dst in (tmp_path / "there", src, src / "inside", tmp_path / "no" / "parent"):
        before = toy.tree(tmp_path)
        with pytest.raises(InputError):
            locked(src, dst)
        assert toy.tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent(src, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(InputError, match="read-only"):
        locked(src, tmp_path / "shut" / "dst")


@pytest.mark.parametrize(
    "more",
    [
        {"method": "none"}, {"method": "gauge", "scales": True}, {"base": "x"}, {"prune_rate": 0.1},
        {"keep_pruned": "x"}, {"dtype": "int8"}, {"jobs": 0}, {"domain": "a", "salt": SALT},
        {"method": "gauge", "condition": 0.5}, {"domain": ""}, {"salt": b"short"},
    ],
)  # fmt: skip
def test_usage(src, tmp_path, more):
    with pytest.raises(UsageError):
        locked(src, tmp_path / "dst", **more)
    assert nothing_at(tmp_path / "dst")


def test_float64_is_not_cut_to_float32(tmp_path):
    src = toy.write(tmp_path / "src", toy.tensors(), dtype="F64")
    with pytest.raises(InputError, match="precision"):
        locked(src, tmp_path / "dst", dtype="float32")


# --- pipelines -----------------------------------------------------------------------------------------


def test_pipelines(tmp_path):
    root = tmp_path / "pipe"
    toy.write(root / "text", toy.tensors(0), extra={})
    toy.write(
        root / "other",
        {"w": np.ones((3, 3))},
        config={"architectures": ["Unknown"], "model_type": "none"},
    )
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {
        "_class_name": "Pipe",
        "text": ["a", "ToyModel"],
        "other": ["a", "B"],
        "scheduler": ["a", "C"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    report = locked(root, tmp_path / "dst")
    assert list(report.passed_through) == ["other"]
    assert any("other" in note for note in report.notes)
    before, after = toy.tree(root), toy.tree(tmp_path / "dst")
    assert after.keys() - before.keys() == {"unmergeable.json"}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"text/model.safetensors"}
    unlock(tmp_path / "dst", tmp_path / "again", key=toy.key())
    assert toy.tree(tmp_path / "again") == before
    alone = tmp_path / "alone"
    locked(root / "text", alone, salt=Manifest.read(tmp_path / "dst" / "unmergeable.json").salt)
    assert (
        toy.tree(alone)["model.safetensors"] != after["text/model.safetensors"]
    )  # its streams carry its name


def test_a_pipeline_with_nothing_to_lock(tmp_path):
    root = tmp_path / "pipe"
    toy.write(
        root / "other",
        {"w": np.ones((3, 3))},
        config={"architectures": ["Unknown"], "model_type": "none"},
    )
    (root / "model_index.json").write_text(json.dumps({"other": ["a", "B"]}))
    with pytest.raises(InputError, match="no component"):
        lock(root, tmp_path / "dst", key=toy.key())
    assert nothing_at(tmp_path / "dst")
