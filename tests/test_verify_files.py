"""Certificates fail for anything around the tensors that is not as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import toy
from unmergeable.checkpoint import build_shard, open_checkpoint
from unmergeable.errors import InputError
from unmergeable.lock import lock
from unmergeable.manifest import Manifest
from verify_toys import check, copy, failed, make_models, named, resign


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("verify"))


def test_other_files(models: Path, tmp_path: Path) -> None:
    changes: list[Callable[[Path], object]] = [
        lambda f: (f / "tokenizer.json").write_bytes(b'{"a": 2}'),
        lambda f: (f / "tokenizer.json").write_bytes(b'{"a": 12}'),
        lambda f: (f / "notes/readme.txt").unlink(),
        lambda f: (f / "more.txt").write_bytes(b"x"),
        lambda f: (f / "empty").mkdir(),
        lambda f: shutil.rmtree(f / "notes"),
        lambda f: (f / "config.json").write_text("{}"),
    ]
    for change in changes:
        folder = copy(models, tmp_path)
        change(folder)
        found = check(models / "src", folder)
        assert "other files" in failed(found), found.checks[1]
        assert named(found, "other files").place
        assert not [entry for entry in failed(found) if entry.startswith("site ")]
        shutil.rmtree(folder)


def rewrite(folder: Path, change: Callable[[list[Any], dict[str, str]], None]) -> None:
    """Write the first shard anew with other tensors or metadata, and the index to match."""
    path = sorted(folder.glob("*.safetensors"))[0]
    with open_checkpoint(folder) as found:
        shard = next(shard for shard in found.shards if shard.file == path.name)
        entries = [[i.name, i.dtype, i.shape, bytes(found.read_bytes(i.name))] for i in shard.tensors]
        metadata = dict(shard.metadata)
    before = {entry[0] for entry in entries}
    change(entries, metadata)
    built = build_shard(path.name, [(n, d, s) for n, d, s, _ in entries], metadata)
    path.write_bytes(built.header + b"".join(entry[3] for entry in entries))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in before:
        del index["weight_map"][name]
    index["weight_map"] |= {entry[0]: path.name for entry in entries}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_structure(models: Path, tmp_path: Path) -> None:
    def rename(entries: list[Any], metadata: dict[str, str]) -> None:
        entries[0][0] = "other"

    def drop(entries: list[Any], metadata: dict[str, str]) -> None:
        del entries[0]

    def add(entries: list[Any], metadata: dict[str, str]) -> None:
        entries.append(["more", "BF16", (1,), b"\0\0"])

    def reshape(entries: list[Any], metadata: dict[str, str]) -> None:
        entries[0][2] = entries[0][2][::-1]

    def retype(entries: list[Any], metadata: dict[str, str]) -> None:
        entries[0][1] = "F16"

    def reorder(entries: list[Any], metadata: dict[str, str]) -> None:
        entries.reverse()

    def relabel(entries: list[Any], metadata: dict[str, str]) -> None:
        metadata["format"] = "np"

    for change, words in (
        (rename, "was not there before|is missing"), (drop, "is missing"), (add, "was not there"),
        (reshape, "has shape"), (retype, "is F16, not BF16"), (reorder, "another order"),
        (relabel, "metadata"),
    ):  # fmt: skip
        folder = copy(models, tmp_path)
        rewrite(folder, change)
        found = check(models / "src", folder, key=toy.key())
        assert not found.holds
        assert failed(found)[0] == "structure"
        detail = named(found, "structure").detail
        assert any(word in detail for word in words.split("|")), detail
        assert len(found.checks) == 1 or change in (reorder, relabel)
        shutil.rmtree(folder)


def test_other_files_of_weights(models: Path, tmp_path: Path) -> None:
    toy.write(tmp_path / "whole", toy.load(models / "exact"))
    found = check(models / "src", tmp_path / "whole")
    assert failed(found) == ["structure", "other files"]
    assert "files of weights" in named(found, "structure").detail


def test_the_manifest(models: Path, tmp_path: Path) -> None:
    folder = copy(models, tmp_path)
    path = folder / "unmergeable.json"
    good = path.read_text()
    document = json.loads(good)
    part = document["components"]["."]
    for kind in ("tensors", "shards", "files"):
        name = sorted(part[kind])[0]
        changed = json.loads(good)
        changed["components"]["."][kind][name] = "0" * 64
        path.write_text(json.dumps(changed))
        found = check(models / "src", folder)
        assert failed(found) == ["manifest"]
        assert named(found, "manifest").place == name
        owner = check(models / "src", folder, key=toy.key())
        assert failed(owner) == ["manifest", "signature"]
        assert named(owner, "unlock").held is None
    changed = json.loads(good)
    changed["components"] = {"other": part}
    path.write_text(json.dumps(changed))
    assert "manifest" in failed(check(models / "src", folder))
    changed = json.loads(good)
    changed["mac"] = "0" * 64
    path.write_text(json.dumps(changed))
    assert check(models / "src", folder).holds
    assert failed(check(models / "src", folder, key=toy.key())) == ["signature"]


def test_another_spec_is_noted(models: Path, tmp_path: Path) -> None:
    folder = copy(models, tmp_path)
    resign(folder, {})
    manifest = Manifest.read(folder / "unmergeable.json")
    part = replace(manifest.components["."], spec="0" * 64)
    (folder / "unmergeable.json").unlink()
    replace(manifest, components={".": part}).sign(toy.key()).write(folder / "unmergeable.json")
    found = check(models / "src", folder)
    assert found.holds
    assert any("another spec" in note for note in found.notes)


def test_without_a_spec_the_owner_has_the_sealed_one(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(*arguments: object, **options: object) -> None:
        raise InputError("no such architecture")

    monkeypatch.setattr("unmergeable.specs.find_spec", find_spec)
    with pytest.raises(InputError):
        check(models / "src", models / "exact", spec=None)
    found = check(models / "src", models / "exact", spec=None, key=toy.key())
    assert found.holds, failed(found)
    assert any("manifest keeps" in note for note in found.notes)


def test_a_lock_that_cannot_be_undone_fails(models: Path, tmp_path: Path) -> None:
    # relocked by the same key, so that the signature is right, but of other weights
    toy.write(tmp_path / "other", toy.tensors(5, layers=1), shards=2)
    lock(tmp_path / "other", tmp_path / "dst", key=toy.key(), spec=toy.spec())
    found = check(models / "src", tmp_path / "dst", key=toy.key())
    assert {"unlock", "untouched tensors", "site l.{l}.qk"} <= set(failed(found))
    assert found.first_failure is not None
    assert found.first_failure.name.startswith("site ")
