"""Opening what is in order: folders, shards, single files, hub caches; and reading tensors by offset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_files import arrays, by_hand, entry, folder, snapshot, write_index
from unmergeable.checkpoint import MANIFEST, open_checkpoint
from unmergeable.errors import InputError, RunError


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_tensor_as_raw_bits(tmp_path: Path, shards: int) -> None:
    root = folder(tmp_path / "m", shards=shards)
    before = snapshot(root)
    with open_checkpoint(root) as checkpoint:
        named = arrays()
        assert set(checkpoint.tensors) == set(named)
        assert (checkpoint.root, checkpoint.single_file, checkpoint.converted) == (root, False, False)
        assert checkpoint.config == {"model_type": "tiny"}
        assert checkpoint.manifest_path is None
        assert [shard.file for shard in checkpoint.shards] == sorted(
            p.name for p in root.glob("*.safetensors")
        )
        for name, array in named.items():
            bits = checkpoint.read(name)
            assert bits.dtype == np.dtype(f"u{array.itemsize}")
            assert bits.shape == array.shape
            np.testing.assert_array_equal(bits.view(array.dtype), array)
            bits[...] = 0  # the caller's own
        index = ["model.safetensors.index.json"] if shards > 1 else []
        assert checkpoint.side_files == sorted(["config.json", "tokenizer.json", *index])
        assert checkpoint.nbytes == sum(p.stat().st_size for p in root.iterdir())
        checkpoint.check_unchanged()
    assert snapshot(root) == before


def test_reads_rows_and_bytes(tmp_path: Path) -> None:
    with open_checkpoint(folder(tmp_path / "m")) as checkpoint:
        name = "layers.1.weight"
        array = arrays()[name]
        np.testing.assert_array_equal(checkpoint.read_rows(name, 2, 5).view(np.float32), array[2:5])
        assert checkpoint.read_rows(name, 6, 6).shape == (0, 4)
        assert bytes(checkpoint.read_bytes(name, 3, 50)) == array.tobytes()[3:50]
        assert bytes(checkpoint.read_bytes(name)) == array.tobytes()
        out = bytearray(8)
        checkpoint.readinto(name, 16, memoryview(out))
        assert bytes(out) == array.tobytes()[16:24]
        for start, stop in ((-1, 2), (3, 2), (0, 7)):
            with pytest.raises(InputError, match="no such rows"):
                checkpoint.read_rows(name, start, stop)
        with pytest.raises(InputError, match="no such rows"):
            checkpoint.read_rows("scale", 0, 1)
        with pytest.raises(InputError, match="no such bytes"):
            checkpoint.read_bytes(name, 0, array.nbytes + 1)
        with pytest.raises(InputError, match="no such bytes"):
            checkpoint.readinto(name, array.nbytes - 1, memoryview(out))
        with pytest.raises(InputError, match="no such tensor"):
            checkpoint.read("nothing")


def test_reads_from_many_threads(tmp_path: Path) -> None:
    named = arrays(count=20)
    save_file(named, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint, ThreadPoolExecutor(8) as pool:
        names = list(named) * 20
        for name, bits in zip(names, pool.map(checkpoint.read, names), strict=True):
            assert bits.tobytes() == named[name].tobytes()


def test_reads_odd_dtypes_and_empty_tensors(tmp_path: Path) -> None:
    header = {
        "c": entry("C64", [2], 0, 16),
        "b": entry("BOOL", [3], 16, 19),
        "e": entry("F32", [0, 5], 19, 19),
        "s": entry("I64", [], 19, 27),
    }
    (tmp_path / "m.safetensors").write_bytes(by_hand(header, bytes(range(27))))
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert checkpoint.read("c").tobytes() == bytes(range(16))
        assert checkpoint.read("b").tolist() == [16, 17, 18]
        assert checkpoint.read("e").shape == (0, 5)
        assert checkpoint.read_rows("e", 0, 0).shape == (0, 5)
        assert checkpoint.read("s").shape == ()


def test_single_file_takes_its_config_from_the_argument(tmp_path: Path) -> None:
    root = folder(tmp_path / "m")
    file = root / "model.safetensors"
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.single_file
        assert checkpoint.config is None  # not the one beside it
        assert checkpoint.side_files == []
        assert checkpoint.nbytes == file.stat().st_size
    with open_checkpoint(str(file), config={"a": 1}) as checkpoint:
        assert checkpoint.config == {"a": 1}
    with open_checkpoint(root, config={"a": 1}) as checkpoint:
        assert checkpoint.config == {"a": 1}


def test_a_locked_checkpoint_shows_its_manifest(tmp_path: Path) -> None:
    root = folder(tmp_path / "m")
    (root / MANIFEST).write_text("{}")
    (root / "model.safetensors.unmergeable.json").write_text("{}")
    with open_checkpoint(root) as checkpoint:
        assert checkpoint.manifest_path == root / MANIFEST
        assert MANIFEST not in checkpoint.side_files
    with open_checkpoint(root / "model.safetensors") as checkpoint:
        assert checkpoint.manifest_path == root / "model.safetensors.unmergeable.json"


def test_a_folder_of_the_hub_cache(tmp_path: Path) -> None:
    plain = folder(tmp_path / "plain", shards=2)
    (plain / "1_Pooling").mkdir()
    (plain / "1_Pooling" / "config.json").write_text("{}")
    blobs, snap = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    for i, path in enumerate(p for p in sorted(plain.rglob("*")) if p.is_file()):
        link = snap / path.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(i))
        link.symlink_to(os.path.relpath(blobs / str(i), link.parent))
    (tmp_path / "alias").symlink_to(snap)
    for root in (snap, tmp_path / "alias"):
        with open_checkpoint(root) as checkpoint:
            assert len(checkpoint.tensors) == len(arrays())
            assert "1_Pooling/config.json" in checkpoint.side_files
            assert checkpoint.side_folders == ["1_Pooling"]


def test_names_that_loaders_know(tmp_path: Path) -> None:
    for name in ("diffusion_pytorch_model.safetensors", "model.fp16.safetensors"):
        root = folder(tmp_path / name)
        (root / "model.safetensors").rename(root / name)
        with open_checkpoint(root) as checkpoint:
            assert [shard.file for shard in checkpoint.shards] == [name]
    root = folder(tmp_path / "index", shards=2)
    index = root / "model.safetensors.index.json"
    index.rename(root / "diffusion_pytorch_model.safetensors.index.fp16.json")
    with open_checkpoint(root) as checkpoint:
        assert len(checkpoint.shards) == 2
    root = folder(tmp_path / "one")  # an index over a single shard
    write_index(root, dict.fromkeys(arrays(), "model.safetensors"))
    with open_checkpoint(root) as checkpoint:
        assert "model.safetensors.index.json" in checkpoint.side_files


def test_side_files_that_are_no_weights_pass(tmp_path: Path) -> None:
    root = folder(tmp_path / "m")
    (root / "2_Dense").mkdir()
    save_file(arrays(1), root / "2_Dense" / "model.safetensors")
    modules = [{"idx": 0, "path": ""}, {"idx": 2, "path": "2_Dense"}]
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "empty").mkdir()
    for name in ("training_args.bin", "rng_state_0.pth", ".gitattributes", "README.md", "spiece.model"):
        (root / name).write_bytes(b"PK\x03\x04 archive/data.pkl" if name.endswith(("bin", "pth")) else b"x")
    (root / "pytorch_model.bin.index.json").write_text("{}")  # left behind by a conversion
    with open_checkpoint(root) as checkpoint:
        assert "2_Dense/model.safetensors" in checkpoint.side_files
        assert "training_args.bin" in checkpoint.side_files
        assert checkpoint.side_folders == ["2_Dense", "empty"]


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    root = folder(tmp_path / "m")
    with open_checkpoint(root) as checkpoint:
        os.truncate(root / "model.safetensors", checkpoint.shards[0].size - 1)
        last = checkpoint.shards[0].tensors[-1].name
        with pytest.raises(RunError, match="became shorter"):
            checkpoint.read(last)
        with pytest.raises(RunError, match="changed while it was read"):
            checkpoint.check_unchanged()


def test_closing_closes(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = open_checkpoint(folder(tmp_path / "m", shards=3))
    assert len(os.listdir("/proc/self/fd")) == before + 3
    checkpoint.close()
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(RunError, match="closed"):
        checkpoint.read("scale")
    (tmp_path / "m" / "model-00002-of-00003.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError):
        open_checkpoint(tmp_path / "m")
    assert len(os.listdir("/proc/self/fd")) == before


def test_needs_neither_torch_nor_safetensors(tmp_path: Path) -> None:
    root = folder(tmp_path / "m", shards=2)
    script = (
        "import sys; from unmergeable.checkpoint import open_checkpoint; c = open_checkpoint(sys.argv[1]); "
        "c.read('scale'); assert not {'torch', 'safetensors', 'transformers', 'ml_dtypes'} & set(sys.modules)"
    )
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", script, root], check=True, env=os.environ | {"PYTHONPATH": path})
