"""Pickle checkpoints are read with weights_only and appear as the safetensors checkpoint they become."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from checkpoint_files import snapshot
from unmergeable.checkpoint import ShardWriter, open_checkpoint
from unmergeable.errors import InputError


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tied = torch.randn(5, 3)
    return {
        "embed.weight": tied,
        "head.weight": tied,
        "transposed": torch.randn(4, 6).t(),
        "slice": torch.randn(10, 10)[2:5, 1::3],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "half": torch.randn(3, 2).half(),
        "bf16": torch.randn(7).bfloat16(),
        "ids": torch.arange(4).expand(1, -1),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 2),
        "conj": torch.randn(2, dtype=torch.complex64).conj(),
        "param": torch.nn.Parameter(torch.randn(2)),
    }


def folder(root: Path, named: Any, *, legacy: bool = False, name: str = "pytorch_model.bin") -> Path:
    root.mkdir()
    torch.save(named, root / name, _use_new_zipfile_serialization=not legacy)
    (root / "config.json").write_text('{"model_type": "tiny"}')
    return root


def written(root: Path, target: Path) -> dict[str, bytes]:
    """The converted files as the engine would write them."""
    target.mkdir()
    with open_checkpoint(root) as checkpoint:
        assert checkpoint.converted
        for shard in checkpoint.shards:
            with ShardWriter(target / shard.file, shard.header, shard.size) as writer:
                for info in shard.tensors:
                    writer.write_at(info.start, checkpoint.read(info.name))
        files = {shard.file: (target / shard.file).read_bytes() for shard in checkpoint.shards}
        return files | checkpoint.generated


@pytest.mark.parametrize("legacy", [False, True])
def test_converts_to_what_the_library_would_write(tmp_path: Path, legacy: bool) -> None:
    named = state()
    root = folder(tmp_path / "m", named, legacy=legacy)
    before = snapshot(root)
    files = written(root, tmp_path / "out")
    assert list(files) == ["model.safetensors"]
    plain = {
        name: t.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
        for name, t in named.items()
    }
    assert files["model.safetensors"] == save(plain, {"format": "pt"})
    for name, tensor in load(files["model.safetensors"]).items():
        assert torch.equal(tensor, named[name])
    with open_checkpoint(root) as checkpoint:
        assert checkpoint.side_files == ["config.json"]
        assert checkpoint.generated == {}
        rows = checkpoint.read_rows("transposed", 2, 5).view(np.float32)
        np.testing.assert_array_equal(rows, named["transposed"].numpy()[2:5])
        assert bytes(checkpoint.read_bytes("half", 1, 9)) == named["half"].numpy().tobytes()[1:9]
        checkpoint.check_unchanged()
    assert snapshot(root) == before


def test_shards_and_their_index_are_renamed(tmp_path: Path) -> None:
    named = state()
    names = list(named)
    root = tmp_path / "m"
    root.mkdir()
    weight_map = {}
    for i in range(2):
        part = {name: named[name] for name in names[i::2]}
        torch.save(part, root / f"pytorch_model-{i + 1:05}-of-00002.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i + 1:05}-of-00002.bin")
    index = {"metadata": {"total_size": 7}, "weight_map": weight_map}
    (root / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    files = written(root, tmp_path / "out")
    expected = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)]
    assert sorted(files) == [*expected, "model.safetensors.index.json"]
    again = json.loads(files["model.safetensors.index.json"])
    assert again["metadata"] == {"total_size": 7}
    assert again["weight_map"] == {name: expected[names.index(name) % 2] for name in names}
    with open_checkpoint(root) as checkpoint:
        assert checkpoint.side_files == []
    for change, message in (
        ({"more": "pytorch_model-00001-of-00002.bin"}, "'more' of the index is missing"),
        ({"half": "pytorch_model-00001-of-00002.bin"}, "is in another shard"),
        ({"half": "../x.bin"}, "may not"),
        ({"half": "x.bin"}, "a shard is missing"),
    ):
        (root / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map | change}))
        with pytest.raises(InputError, match=message):
            open_checkpoint(root)


def test_diffusers_name(tmp_path: Path) -> None:
    root = folder(tmp_path / "m", {"a": torch.ones(2)}, name="diffusion_pytorch_model.bin")
    with open_checkpoint(root) as checkpoint:
        assert [shard.file for shard in checkpoint.shards] == ["diffusion_pytorch_model.safetensors"]


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


REFUSED: dict[str, tuple[Any, str]] = {
    "code": ({"a": Harmful()}, "does not load with weights_only"),
    "nested": ({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, "2 problems"),
    "a list": ([torch.ones(1)], "not a state dict"),
    "numbers for names": ({1: torch.ones(1)}, "not a named tensor"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "no place in a safetensors file"),
    "complex": ({"a": torch.ones(2, dtype=torch.complex128)}, "no place in a safetensors file"),
    "expanded bomb": ({"a": torch.ones(1).expand(1 << 40)}, "larger than the file"),
    "nothing": ({}, "no tensors"),
    "lora": ({"q.lora_A.weight": torch.ones(2, 2)}, "adapter"),
    "quantized": ({"l.qweight": torch.ones(2, dtype=torch.int32)}, "quantized"),
}


@pytest.mark.parametrize(("named", "message"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("legacy", [False, True])
def test_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: Any, message: str, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    root = folder(tmp_path / "m", named, legacy=legacy)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=message):
        open_checkpoint(root)
    assert snapshot(tmp_path) == before  # `harmed` was not made either


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\x80\x02.", pickle.dumps({"a": 1}), b"PK\3\4", b"version https://git-lfs"]
)
def test_refuses_what_is_no_pickle_of_torch(tmp_path: Path, content: bytes) -> None:
    root = folder(tmp_path / "m", {"a": torch.ones(2)})
    (root / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_checkpoint(root)
    assert "pytorch_model.bin" in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_refuses_any_cut_file(tmp_path: Path, legacy: bool) -> None:
    root = folder(tmp_path / "m", {"a": torch.ones(50)}, legacy=legacy)
    whole = (root / "pytorch_model.bin").read_bytes()
    for length in range(0, len(whole) - 1, 37):
        (root / "pytorch_model.bin").write_bytes(whole[:length])
        with pytest.raises(InputError):
            open_checkpoint(root)


def test_refuses_an_archive_that_inflates(tmp_path: Path) -> None:
    root = folder(tmp_path / "m", {"a": torch.zeros(100_000)})
    path = root / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match="compressed"):
        open_checkpoint(root)


def test_says_when_torch_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "m", {"a": torch.ones(2)})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="needs torch") as caught:
        open_checkpoint(root)
    assert "install torch" in str(caught.value.hint)
