"""What is refused before a lock is written: keys that would be published, locks of locks, dtypes that do not fit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import toy
from toy import locked, nothing_at
from unmergeable.authorised import merge
from unmergeable.checkpoint import build_shard, staging, to_bits
from unmergeable.depth import gaps
from unmergeable.errors import InputError, RunError, UsageError
from unmergeable.keys import generate_key
from unmergeable.lock import lock
from unmergeable.module import lock_module
from unmergeable.spec import Spec
from unmergeable.specs import find_spec
from unmergeable.unlock import unlock


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return toy.write(tmp_path / "src", toy.tensors())


def pipeline(root: Path) -> Path:
    toy.write(root / "text", toy.tensors(3), extra={})
    (root / "model_index.json").write_text(json.dumps({"_class_name": "P", "text": ["a", "ToyModel"]}))
    return root


# --- keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passphrase", [None, "correct horse battery"])
def test_a_key_is_not_published(src: Path, tmp_path: Path, passphrase: str | None) -> None:
    asked = None if passphrase is None else lambda: passphrase
    other = generate_key(src / "deep.txt", asked)
    for dry_run in (False, True):
        with pytest.raises(InputError, match=r"would be published with the locked model.*") as caught:
            lock(src, tmp_path / "out", key=toy.key(), spec=toy.spec(), dry_run=dry_run)
        assert "deep.txt" in str(caught.value)
        assert other.id not in str(caught.value)
    assert nothing_at(tmp_path / "out")
    os.unlink(src / "deep.txt")
    (src / "notes.txt").write_text("keys begin with UNMERGEABLE-KEY-1\n" * 9)  # as a document may say
    locked(src, tmp_path / "out")


def test_a_key_in_a_pipeline_is_not_published(tmp_path: Path) -> None:
    for place in (".", "text", "other"):
        root = pipeline(tmp_path / f"pipe-{place.strip('.')}")
        (root / "other").mkdir()
        (root / "other" / "config.json").write_text("{}")
        generate_key(root / place / "k")
        with pytest.raises(InputError, match="would be published"):
            locked(root, tmp_path / "out")
        assert nothing_at(tmp_path / "out")


def test_a_merge_by_the_key_does_not_publish_it_either(tmp_path: Path) -> None:
    models = [toy.write(tmp_path / name, toy.tensors(seed)) for seed, name in enumerate("ab")]
    both = [tmp_path / f"{model.name}-locked" for model in models]
    for model, target in zip(models, both, strict=True):
        locked(model, target)
    (both[0] / "k").write_text("UNMERGEABLE-KEY-2:of a time to come\n")
    with pytest.raises(InputError, match=r"not what was locked|would be published"):
        merge(both, tmp_path / "out", key=toy.key())
    assert nothing_at(tmp_path / "out")


# --- locks of locks ------------------------------------------------------------------------------------------


def test_parts_that_are_locked_already(src: Path, tmp_path: Path) -> None:
    root = pipeline(tmp_path / "pipe")
    locked(root / "text", tmp_path / "text-locked", key=toy.key(2))
    locked(root, tmp_path / "whole-locked")
    locked(src, tmp_path / "src-locked")
    shutil.rmtree(root / "text")
    shutil.copytree(tmp_path / "text-locked", root / "text")
    for path, more in (
        (root, {}),  # a component that was locked by itself
        (tmp_path / "whole-locked" / "text", {}),
        (tmp_path / "src-locked" / "model.safetensors", {"config": toy.CONFIG}),
    ):
        with pytest.raises(InputError, match="already locked"):
            locked(path, tmp_path / "twice.safetensors", **more)
        assert nothing_at(tmp_path / "twice.safetensors")
    # Beside a manifest that says nothing of it, a model is none of its parts.
    shutil.copyfile(tmp_path / "whole-locked" / "unmergeable.json", tmp_path / "unmergeable.json")
    locked(src, tmp_path / "out")
    (tmp_path / "unmergeable.json").write_text("[]")
    locked(src, tmp_path / "again")


def test_a_locked_pipeline_is_no_base(tmp_path: Path) -> None:
    root = pipeline(tmp_path / "pipe")
    locked(root, tmp_path / "locked")
    with pytest.raises(InputError, match="the base is locked"):
        locked(root, tmp_path / "out", method="params", base=tmp_path / "locked")


# --- dtypes --------------------------------------------------------------------------------------------------


def mixed(folder: Path, first: str, others: str) -> Path:
    """The toy with the first of its experts in a dtype of its own."""
    values = toy.tensors()
    kinds = {name: first if ".x.0." in name else others for name in sorted(values)}
    shard = build_shard(
        "model.safetensors", [(n, kinds[n], values[n].shape) for n in kinds], {"format": "pt"}
    )
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(shard.header)
        for name, kind in kinds.items():
            file.write(to_bits(values[name], kind).tobytes())
    (folder / "config.json").write_text(json.dumps(toy.CONFIG))
    return folder


@pytest.mark.parametrize(("first", "others"), [("F32", "BF16"), ("F16", "BF16"), ("BF16", "F32")])
def test_experts_of_different_dtypes_are_not_exchanged(first: str, others: str, tmp_path: Path) -> None:
    """One written in another's place would lose what the place cannot hold."""
    src = mixed(tmp_path / "src", first, others)
    for method in ("exact", "gauge"):
        with pytest.raises(InputError, match="exchanges have different dtypes"):
            locked(src, tmp_path / "out", method=method)
    assert nothing_at(tmp_path / "out")
    locked(src, tmp_path / "out", dtype="float32")
    one, two = toy.forward(toy.load(src)), toy.forward(toy.load(tmp_path / "out"))
    assert np.abs(one - two).max() <= 1e-12 * np.abs(one).max()
    report = unlock(tmp_path / "out", tmp_path / "back", key=toy.key())
    assert report.bit_for_bit
    assert toy.tree(tmp_path / "back") == toy.tree(src)


class Experts(torch.nn.Module):
    """The toy in memory."""

    def __init__(self, first: torch.dtype, others: torch.dtype) -> None:
        super().__init__()
        self.names = {name.replace(".", "__"): name for name in toy.tensors()}
        for own, name in self.names.items():
            value = torch.tensor(toy.tensors()[name])
            self.register_buffer(own, value.to(first if ".x.0." in name else others))
        self.config = SimpleNamespace(to_dict=lambda: dict(toy.CONFIG))

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return {self.names[own]: tensor for own, tensor in self.named_buffers()}


@pytest.mark.parametrize("first", [torch.float16, torch.float32])
def test_a_module_with_experts_of_different_dtypes_stays_as_it_was(first: torch.dtype) -> None:
    module = Experts(first, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(InputError, match="exchanges have different dtypes"):
        lock_module(module, key=toy.key(), spec=toy.spec())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    lock_module(Experts(first, first), key=toy.key(), spec=toy.spec())


# --- names ---------------------------------------------------------------------------------------------------


def test_a_single_file_is_called_as_one(tmp_path: Path) -> None:
    one = toy.write_file(tmp_path / "one.safetensors", toy.tensors())
    with pytest.raises(InputError, match="called so by its ending"):
        locked(one, tmp_path / "out", config=toy.CONFIG)
    locked(one, tmp_path / "out.safetensors", config=toy.CONFIG)
    with pytest.raises(InputError, match="called so by its ending"):
        unlock(tmp_path / "out.safetensors", tmp_path / "back", key=toy.key())
    assert nothing_at(tmp_path / "out")
    assert nothing_at(tmp_path / "back")


def test_a_layer_whose_number_another_model_of_the_class_does_not_read() -> None:
    """Layer 1 is a layer, though the class ignores one of that number; layer 3 is none of three."""
    for ignored in (r"l\.1\..*", r"l\.3\..*"):
        spec = Spec.from_dict({**toy.spec_dict(), "ignored": ["steps", r"l\.1\..*", r"l\.3\..*"]})
        shapes = {name: value.shape for name, value in toy.tensors(layers=3).items()}
        more = {name.replace("l.2.", "l.3."): shape for name, shape in shapes.items() if "l.2." in name}
        assert gaps(spec, shapes, {"num_hidden_layers": 3}) == [], ignored
        assert gaps(spec, shapes | more, {"num_hidden_layers": 3}) == []
        assert gaps(spec, shapes, {"num_hidden_layers": 4}) != []
        gone = {name: shape for name, shape in shapes.items() if "l.1." not in name}
        assert gaps(spec, gone, {"num_hidden_layers": 3}) == ["no tensor of l.1"]


@pytest.mark.parametrize("name", ["../evil/X", "", "a/b", "X*"])
def test_a_class_is_a_name(name: str) -> None:
    with pytest.raises(InputError, match="which class the weights are of"):
        find_spec({"architectures": [name], "model_type": "x"}, {}, where="x")


# --- the owner's file ----------------------------------------------------------------------------------------


def test_what_was_pruned_stays_where_the_lock_is_published(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = staging.sync

    def sync(path: Path) -> None:
        if Path(path) == tmp_path and (tmp_path / "out").exists():
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(staging, "sync", sync)
    kept = tmp_path / "kept.safetensors"
    with pytest.raises(RunError):
        locked(src, tmp_path / "out", method="params", prune_rate=0.2, keep_pruned=kept)
    monkeypatch.undo()
    report = unlock(tmp_path / "out", tmp_path / "back", key=toy.key(), pruned=kept)
    assert not report.altered


def test_what_was_trained_since_is_not_overwritten(src: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    more = {"method": "params", "prune_rate": 0.2, "options": {"prune_rescale": True}}
    locked(src, tmp_path / "out", keep_pruned=kept, **more)
    trained = {
        name: 1.5 * value if ".x." in name else value for name, value in toy.load(tmp_path / "out").items()
    }
    toy.write(tmp_path / "trained", trained)
    given = {"key": toy.key(), "manifest": tmp_path / "out" / "unmergeable.json"}
    with pytest.raises(UsageError, match="weights that have changed since"):
        unlock(tmp_path / "trained", tmp_path / "back", pruned=kept, **given)
    assert nothing_at(tmp_path / "back")
    assert unlock(tmp_path / "trained", tmp_path / "back", **given).altered


def test_the_manifest_of_another_lock(src: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        locked(src, tmp_path / name)
    with pytest.raises(InputError, match="a manifest of its own, of another lock"):
        unlock(
            tmp_path / "one", tmp_path / "back", key=toy.key(), manifest=tmp_path / "two" / "unmergeable.json"
        )
    assert nothing_at(tmp_path / "back")
    (tmp_path / "copy.json").write_bytes((tmp_path / "one" / "unmergeable.json").read_bytes())
    (tmp_path / "one" / "unmergeable.json").write_text("damaged")
    unlock(tmp_path / "one", tmp_path / "back", key=toy.key(), manifest=tmp_path / "copy.json")
    assert toy.tree(tmp_path / "back") == toy.tree(src)
