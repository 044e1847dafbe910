"""Certificates: they hold for a lock, and fail for any single thing that is not as it was."""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy
from unmergeable.certificate import Check
from unmergeable.errors import InputError, UsageError
from unmergeable.lock import lock
from unmergeable.sketch import probes
from unmergeable.unlock import unlock
from unmergeable.verify import verify
from verify_toys import Edit, check, copy, edit, failed, make_models, named


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("verify"))


# --- hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "gauge", "mergelock"])
def test_a_lock_holds(models: Path, method: str) -> None:
    found = check(models / "src", models / method, key=toy.key())
    assert found.holds, failed(found)
    assert found.first_failure is None
    assert found.method == method
    assert {"structure", "other files", "manifest", "untouched tensors", "signature", "unlock"} <= {
        entry.name for entry in found.checks
    }
    sites = [entry for entry in found.checks if entry.name.startswith("site ")]
    assert [entry.name for entry in sites] == [f"site {site.name}" for site in toy.spec().sites]
    for entry in sites:
        assert entry.measured is not None
        assert entry.bound is not None
        assert entry.measured <= entry.bound
        assert (entry.bound == 1e-10) is (method == "exact")
    assert named(found, "unlock").detail.endswith("bit for bit") is (method == "exact")


def test_without_the_key_the_owner_s_checks_are_left_out(models: Path) -> None:
    found = check(models / "src", models / "exact")
    assert found.holds
    assert not {"signature", "unlock"} & {entry.name for entry in found.checks}


def test_an_unlocked_model_holds_and_has_no_manifest(models: Path, tmp_path: Path) -> None:
    unlock(models / "gauge", tmp_path / "back", key=toy.key())
    found = check(models / "src", tmp_path / "back")
    assert found.holds, failed(found)
    assert named(found, "manifest").held is None
    assert found.method is None
    other = check(models / "src", models / "src")
    assert other.holds
    assert all(entry.bound == 1e-10 for entry in other.checks if entry.name.startswith("site "))


@pytest.mark.parametrize(
    "options", [{"scales": True}, {"dtype": "float32"}, {"dtype": "float32", "method": "gauge"}]
)
def test_options_of_the_lock_hold(tmp_path: Path, options: dict[str, Any]) -> None:
    values = toy.tensors(layers=1) | {"steps": np.arange(3)}
    toy.write(tmp_path / "src", values, shards=2)
    lock(tmp_path / "src", tmp_path / "dst", key=toy.key(), spec=toy.spec(), **options)
    found = check(tmp_path / "src", tmp_path / "dst", key=toy.key())
    assert found.holds, failed(found)
    edit(tmp_path / "dst", "embed", lambda v: v * np.where(np.arange(v.size).reshape(v.shape) == 7, 1.5, 1))
    assert "untouched tensors" in failed(check(tmp_path / "src", tmp_path / "dst"))


def test_a_single_file_holds(tmp_path: Path) -> None:
    toy.write_file(tmp_path / "a.safetensors", toy.tensors(layers=1), dtype="F32")
    lock(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        key=toy.key(),
        spec=toy.spec(),
        config=toy.CONFIG,
    )
    found = check(tmp_path / "a.safetensors", tmp_path / "b.safetensors", key=toy.key(), config=toy.CONFIG)
    assert found.holds, failed(found)
    assert named(found, "other files").held is None
    edit(tmp_path / "b.safetensors", "l.0.router", lambda v: v[::-1])
    assert "site l.{l}.fused" in failed(
        check(tmp_path / "a.safetensors", tmp_path / "b.safetensors", config=toy.CONFIG)
    )


def test_a_pipeline_holds_by_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(
        config: dict[str, Any], names: object, *, spec_file: object = None, where: str = ""
    ) -> tuple[Any, dict[str, Any]]:
        if config["model_type"] != "toy":
            raise InputError("no such architecture")
        return toy.spec(), config

    monkeypatch.setattr("unmergeable.specs.find_spec", find_spec)
    root = tmp_path / "src"
    toy.write(root / "one", toy.tensors(1, layers=1))
    toy.write(root / "two", {"x": np.ones((4, 4))}, config={"model_type": "other"})
    (root / "model_index.json").write_text('{"_class_name": "P", "one": ["a", "B"], "two": ["a", "C"]}')
    lock(root, tmp_path / "dst", key=toy.key())
    found = verify(root, tmp_path / "dst", key=toy.key())
    assert found.holds, failed(found)
    assert "site one/l.{l}.qk" in {entry.name for entry in found.checks}
    assert found.checks[-1].held is None  # pipelines are not run
    edit(tmp_path / "dst" / "two", "x", lambda v: v * 2)
    found = verify(root, tmp_path / "dst", run="never")
    assert failed(found) == ["manifest", "untouched tensors"]
    assert named(found, "untouched tensors").place == "two/x"
    (tmp_path / "dst" / "model_index.json").write_text("{}" + (root / "model_index.json").read_text()[1:])
    with pytest.raises(InputError):
        verify(root, tmp_path / "dst")
    text = (root / "model_index.json").read_text()
    (tmp_path / "dst" / "model_index.json").write_text(text + " ")
    assert "other files" in failed(verify(root, tmp_path / "dst", run="never"))
    (tmp_path / "dst" / "model_index.json").write_text(text.replace('"two"', '"notes"'))
    (tmp_path / "dst" / "notes").mkdir()
    (tmp_path / "dst" / "two").rename(tmp_path / "gone")
    found = verify(root, tmp_path / "dst", run="never")
    assert failed(found) == ["structure"]
    assert "components" in found.checks[0].detail


def test_the_document_is_json_and_the_seed_is_stated(models: Path) -> None:
    found = check(models / "src", models / "exact", seed=7)
    document = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert document["document"] == "unmergeable.verify"
    assert (document["version"], document["seed"], document["holds"]) == (1, 7, True)
    assert document["first_failure"] is None
    assert str(found.checks[0]).startswith("structure: holds")
    endless = Check("x", False, float("inf"), 1.0, "because")
    assert endless.as_dict()["measured"] is None
    assert str(endless) == "x: FAILS inf of 1.0e+00 (because)"
    assert str(Check("x", None)) == "x: not checked"


def test_threads_and_progress_change_nothing(models: Path) -> None:
    told: list[tuple[int, int, str]] = []
    given: dict[str, Any] = {"key": toy.key(), "seed": 0}
    one = check(models / "src", models / "gauge", jobs=1, progress=lambda *a: told.append(a), **given)
    four = check(models / "src", models / "gauge", jobs=4, **given)
    assert one.checks == four.checks
    assert told[-1][0] == told[-1][1]
    assert all(a[0] <= b[0] for a, b in pairwise(told))


def test_pruning_changes_the_function_and_is_measured(tmp_path: Path) -> None:
    spec = toy.spec()
    src = toy.write(tmp_path / "src", toy.tensors(layers=1), dtype="F32")
    lock(src, tmp_path / "plain", key=toy.key(), spec=spec, method="params")
    assert check(src, tmp_path / "plain", key=toy.key(), spec=spec).holds
    for options in ({}, {"prune_rescale": True}):
        dst = tmp_path / f"pruned{len(options)}"
        lock(src, dst, key=toy.key(), spec=spec, method="params", prune_rate=0.1, options=options)
        found = check(src, dst, key=toy.key(), spec=spec)
        assert not found.holds
        assert failed(found) == ["site l.{l}.mlp", "site l.{l}.x.{e}.named"]
        assert found.first_failure is not None
        assert "function changed by pruning: measured" in found.first_failure.detail
        assert any("pruned" in note for note in found.notes)
        edit(
            dst,
            "l.0.down",
            lambda v: np.where(np.arange(v.size).reshape(v.shape) == 5, v + 1, v),
            refresh=True,
        )
        assert "unlock" in failed(check(src, dst, key=toy.key(), spec=spec))


# --- every altered tensor -----------------------------------------------------------------------------------


def names() -> list[str]:
    return sorted(toy.tensors(layers=1))


@pytest.mark.parametrize("refresh", [False, True])
def test_one_altered_element_of_any_tensor_fails(models: Path, tmp_path: Path, refresh: bool) -> None:
    rng = np.random.default_rng(0)
    for name in names():
        folder = copy(models, tmp_path)

        def change(value: np.ndarray) -> np.ndarray:
            at = tuple(int(rng.integers(size)) for size in value.shape)
            value = value.copy()
            value[at] *= 1 + 2.0**-7  # the next number in bf16
            return value

        edit(folder, name, change, refresh=refresh)
        found = check(models / "src", folder)
        assert not found.holds, name
        sites = toy.spec().sites
        touched = {site.name for site in sites for slot in site.slots if slot.tensor == pattern(name)}
        if touched:
            assert set(failed(found)) & {f"site {site}" for site in touched}, (name, failed(found))
            assert found.first_failure is not None
            assert found.first_failure.name.startswith("site ")
            assert found.first_failure.place is not None
            assert found.first_failure.place.startswith("l.0.")
        else:
            assert "untouched tensors" in failed(found)
            assert named(found, "untouched tensors").place == name
        assert ("manifest" in failed(found)) is not refresh
        if not refresh:
            assert named(found, "manifest").place == name
        owner = check(models / "src", folder, key=toy.key())
        assert "unlock" in failed(owner) or not refresh
        shutil.rmtree(folder)


def pattern(name: str) -> str:
    """A tensor's name as it stands in the toy's spec."""
    stem = name.removeprefix("l.0.")
    parts = stem.split(".")
    return f"l.{{l}}.x.{{e}}.{parts[2]}" if parts[0] == "x" else f"l.{{l}}.{stem}"


@pytest.mark.parametrize("refresh", [False, True])
def test_two_heads_swapped_in_one_tensor_alone_fail(models: Path, tmp_path: Path, refresh: bool) -> None:
    hd, group = 8, 16

    def blocks(width: int, axis: int = 0) -> Edit:
        def change(value: np.ndarray) -> np.ndarray:
            order = np.arange(value.shape[axis])
            order[:width], order[width : 2 * width] = order[width : 2 * width].copy(), order[:width].copy()
            return np.take(value, order, axis=axis)

        return change

    cases = [
        ("l.0.q.weight", blocks(group)), ("l.0.q.weight", blocks(hd)), ("l.0.q.bias", blocks(group)),
        ("l.0.q.bias", blocks(hd)), ("l.0.k.weight", blocks(hd)), ("l.0.v.weight", blocks(hd)),
        ("l.0.v.bias", blocks(hd)), ("l.0.o.weight", blocks(group, 1)), ("l.0.o.weight", blocks(hd, 1)),
        ("l.0.gu", blocks(1)), ("l.0.gu", blocks(2, 2)), ("l.0.down", blocks(1)), ("l.0.down", blocks(1, 1)),
        ("l.0.router", blocks(1)), ("l.0.x_router", blocks(1)), ("l.0.x.1.up", blocks(1)),
        ("l.0.x.2.down", blocks(1, 1)), ("l.0.x.3.gate", blocks(1)), ("embed", blocks(1)),
    ]  # fmt: skip
    for name, change in cases:
        folder = copy(models, tmp_path)
        edit(folder, name, change, refresh=refresh)
        found = check(models / "src", folder)
        assert not found.holds, name
        assert any(entry.startswith(("site ", "untouched")) for entry in failed(found)), name
        shutil.rmtree(folder)


def test_dense_locks_fail_for_swaps_and_for_large_changes(models: Path, tmp_path: Path) -> None:
    folder = copy(models, tmp_path, "gauge")
    edit(folder, "l.0.v.weight", lambda v: np.roll(v, 8, axis=0), refresh=True)
    for seed in range(30):  # groups of `v` in another order must not pass for the order of all
        found = check(models / "src", folder, seed=seed)
        assert failed(found)[0] == "site l.{l}.vo"
        assert "site l.{l}.qk" not in failed(found)
        assert "l.0.vo [g = 0" in found.checks[4].detail
    shutil.rmtree(folder)
    folder = copy(models, tmp_path, "gauge")
    edit(folder, "l.0.x.1.up", lambda v: v * 1.1, refresh=True)
    assert "site l.{l}.x.{e}.named" in failed(check(models / "src", folder))


def test_not_a_number_in_one_alone_fails_and_in_both_holds(models: Path, tmp_path: Path) -> None:
    def spoil(value: np.ndarray) -> np.ndarray:
        value = value.copy()
        value[2, 3] = np.nan
        return value

    folder = copy(models, tmp_path)
    edit(folder, "l.0.k.weight", spoil, refresh=True)
    found = check(models / "src", folder)
    assert "site l.{l}.qk" in failed(found)
    values = toy.tensors(layers=1)
    for name in ("l.0.k.weight", "embed"):
        values[name] = spoil(values[name])
    toy.write(tmp_path / "src", values)
    lock(tmp_path / "src", tmp_path / "dst", key=toy.key(), spec=toy.spec())
    found = check(tmp_path / "src", tmp_path / "dst", key=toy.key())
    assert found.holds, failed(found)


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_input_is_refused(models: Path, tmp_path: Path) -> None:
    src, dst = models / "src", models / "exact"
    with pytest.raises(InputError, match="another key"):
        check(src, dst, key=toy.key(2))
    with pytest.raises(InputError, match="no manifest"):
        check(src, src, key=toy.key())
    with pytest.raises(InputError, match="no such file"):
        check(src, tmp_path / "none")
    with pytest.raises(InputError, match="cannot be compared"):
        check(src, toy.write_file(tmp_path / "a.safetensors", toy.tensors(layers=1)))
    with pytest.raises(UsageError):
        check(src, dst, run="perhaps")
    with pytest.raises(UsageError):
        check(src, dst, jobs=0)
    folder = copy(models, tmp_path)
    (folder / "unmergeable.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        check(src, folder)
    os.truncate(next(folder.glob("*.safetensors")), 100)
    with pytest.raises(InputError):
        check(src, folder)


def test_models_that_cannot_be_run_are_not(models: Path) -> None:
    found = check(models / "src", models / "exact", run="auto")
    assert found.holds
    assert found.checks[-1].name == "runtime"
    assert found.checks[-1].held is None
    with pytest.raises(UsageError, match="cannot be run"):
        check(models / "src", models / "exact", run="always")


# --- no excuse -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("size", [0.0, 1e-7], ids=["zeros", "hardly more"])
def test_a_row_of_zeros_excuses_nothing(dtype: str, size: float, tmp_path: Path) -> None:
    """What half of a dtype's smallest step does to it is no measure for the rows beside it."""
    values = toy.tensors()
    for layer in range(toy.LAYERS):
        values[f"l.{layer}.q.bias"][:] *= size
        values[f"l.{layer}.v.bias"][:] *= size
        values[f"l.{layer}.x.1.up"][0] *= size
    src = toy.write(tmp_path / "src", values, dtype=dtype)
    lock(src, tmp_path / "gauge", key=toy.key(), spec=toy.spec(), method="gauge")
    honest = check(src, tmp_path / "gauge", key=toy.key())
    assert honest.holds, failed(honest)
    random = np.random.default_rng(0)
    for name in ("l.0.v.weight", "l.1.q.weight", "l.0.x.1.down"):
        other = toy.load(tmp_path / "gauge")
        other[name] = random.normal(size=other[name].shape)
        toy.write(tmp_path / name, other, dtype=dtype)  # there is no manifest that would know it
        found = check(src, tmp_path / name)
        assert not found.holds, name


def test_what_one_set_of_probes_does_not_see_another_does(tmp_path: Path) -> None:
    """A change that is orthogonal to known probes: nobody knows them beforehand."""
    src = toy.write(tmp_path / "src", toy.tensors(), dtype="F64")
    changed = toy.load(src)
    for name in ("l.0.v.weight", "l.0.q.weight"):
        change = np.random.default_rng(1).normal(size=changed[name].shape)
        for axis in (0, 1):
            seen = probes(change.shape[axis], 0)
            over = seen @ np.linalg.pinv(seen)
            change = change - (over @ change if axis == 0 else change @ over)
        changed[name] = changed[name] + change
    toy.write(tmp_path / "changed", changed, dtype="F64")
    for _ in range(3):
        assert not check(src, tmp_path / "changed").holds
    one, two = (check(src, src) for _ in range(2))
    assert one.holds
    assert one.seed != two.seed
