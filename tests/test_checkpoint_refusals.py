"""Bad input of the checkpoint layer: the message, exit code 3, the source untouched, nothing written."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_files import arrays, by_hand, edit_index, entry, folder, snapshot, write_index
from unmergeable.checkpoint import open_checkpoint
from unmergeable.errors import InputError

Damage = Callable[[Path], Any]
SECOND = "model-00002-of-00003.safetensors"


def refused(root: Path, message: str, **arguments: Any) -> InputError:
    """Opens `root`, which must be refused with a message, and must not change."""
    before = snapshot(root.parent)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(root, **arguments)
    assert caught.value.exit_code == 3
    assert snapshot(root.parent) == before
    return caught.value


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


SHARDED: dict[str, tuple[Damage, str]] = {
    "missing shard": (lambda r: (r / SECOND).unlink(), f"{SECOND}: a shard is missing"),
    "truncated shard": (lambda r: os.truncate(r / SECOND, 90), f"{SECOND}: the header claims more bytes"),
    "truncated data": (
        lambda r: rewrite(r / SECOND, lambda b: b[:-1]),
        "claims more bytes than the file has",
    ),
    "longer shard": (lambda r: rewrite(r / SECOND, lambda b: b + b"x"), "goes on behind its last tensor"),
    "lying header": (lambda r: rewrite(r / SECOND, lambda b: b"\xff" * 8 + b[8:]), "the header is too long"),
    "not in index": (lambda r: edit_index(r, scale=None), "tensor 'scale' is not in the index"),
    "not in shards": (lambda r: edit_index(r, extra=SECOND), "tensor 'extra' of the index is missing"),
    "other shard": (
        lambda r: edit_index(r, **{"layers.0.weight": SECOND}),
        f"in another shard, expected {SECOND}, got model-00001",
    ),
    "in two shards": (
        lambda r: save_file(arrays(), r / SECOND),
        r"in two shards, got model-00001-of-00003.safetensors, model-00002",
    ),
    "separator": (lambda r: edit_index(r, scale="../m/x.safetensors"), "names a file that it may not"),
    "folder": (lambda r: edit_index(r, scale="sub/x.safetensors"), "names a file that it may not"),
    "absolute": (lambda r: edit_index(r, scale="/etc/x.safetensors"), "names a file that it may not"),
    "backslash": (lambda r: edit_index(r, scale="a\\x.safetensors"), "names a file that it may not"),
    "nul": (lambda r: edit_index(r, scale="a\0.safetensors"), "names a file that it may not"),
    "dots": (lambda r: edit_index(r, scale=".."), "names a file that it may not"),
    "surrogate": (lambda r: edit_index(r, scale="\ud800.safetensors"), "names a file that it may not"),
    "other ending": (lambda r: edit_index(r, scale="config.json"), "names a file that it may not"),
    "a number": (lambda r: edit_index(r, scale=3), "not a file|may not"),
    "no weight map": (lambda r: (r / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "a list": (lambda r: (r / "model.safetensors.index.json").write_text("[]"), "not a JSON object"),
    "deep": (lambda r: (r / "model.safetensors.index.json").write_text("[" * 100_000), "nested too deeply"),
    "not json": (lambda r: (r / "model.safetensors.index.json").write_bytes(b"\xff"), "not valid JSON"),
    "twice": (
        lambda r: (r / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        "the name 'a' occurs twice",
    ),
    "no index": (lambda r: (r / "model.safetensors.index.json").unlink(), "shards without their index"),
    "two indexes": (
        lambda r: write_index(r, {"a": "b"}, "model.safetensors.index.fp16.json"),
        "more than one",
    ),
    "single file beside": (
        lambda r: save_file(arrays(), r / "model.safetensors"),
        "not part of this checkpoint",
    ),
}


@pytest.mark.parametrize(("damage", "message"), SHARDED.values(), ids=SHARDED.keys())
def test_sharded(tmp_path: Path, damage: Damage, message: str) -> None:
    root = folder(tmp_path / "m", shards=3)
    damage(root)
    refused(root, message)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def harmful_link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


WEIGHTS_ASIDE = [
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5", "flax_model.msgpack",
    "m.Q4_K_M.gguf", "consolidated.safetensors", "model.fp32.safetensors", "old.pt", "x.pth", "x.ckpt",
    "original/consolidated.00.pth", "onnx/model.onnx", "onnx/model.onnx_data", "rust_model.ot",
    "optimizer.pt", "openvino/openvino_model.bin", ".cache/huggingface/download/x.incomplete",
    "weights.npz", "MODEL.SAFETENSORS",
]  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS_ASIDE)
def test_weights_aside(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path / "m")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b"x")
    error = refused(root, "more than one set of weights|not part of this checkpoint")
    assert "move" in str(error.hint)


def test_weights_under_a_name_that_hides_them(tmp_path: Path) -> None:
    root = folder(tmp_path / "m")
    (root / "a.bak").write_bytes((root / "model.safetensors").read_bytes())
    (root / "b").write_bytes(b"GGUF\3\0\0\0")
    (root / "c.dat").write_bytes(b"\x89HDF\r\n\x1a\n")
    error = refused(root, "3 problems")
    for part in ("a.bak: looks like weights (safetensors)", "b: looks like weights (GGUF)", "(HDF5)"):
        assert part in str(error)


def test_a_git_repository(tmp_path: Path) -> None:
    root = folder(tmp_path / "m")
    (root / ".git" / "lfs").mkdir(parents=True)
    (root / ".git" / "lfs" / "0123").write_bytes((root / "model.safetensors").read_bytes())
    refused(root, "git repository keeps the unlocked weights")


TRAPS: dict[str, tuple[Damage, str]] = {
    "dangling link": (lambda p: harmful_link(p, "nowhere"), "link leads nowhere"),
    "link to itself": (lambda p: harmful_link(p, p.name), "link leads nowhere"),
    "link to a folder": (lambda p: harmful_link(p, ".."), "link to a folder"),
    "link to a device": (lambda p: harmful_link(p, "/dev/zero"), "a character device"),
    "pipe": (lambda p: (p.unlink(missing_ok=True), os.mkfifo(p)), "a named pipe"),
    "socket": (lambda p: (p.unlink(missing_ok=True), make_socket(p)), "a socket"),
}


@pytest.mark.parametrize(("trap", "message"), TRAPS.values(), ids=TRAPS.keys())
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "notes.txt", "unmergeable.json", "s/x.txt"]
)
def test_traps_neither_block_nor_pass(tmp_path: Path, trap: Damage, message: str, name: str) -> None:
    root = folder(tmp_path / "m")
    (root / "s").mkdir()
    trap(root / name)
    refused(root, message)


@pytest.mark.parametrize(("trap", "message"), TRAPS.values(), ids=TRAPS.keys())
def test_traps_as_a_single_file(tmp_path: Path, trap: Damage, message: str) -> None:
    (tmp_path / "in").mkdir()
    trap(tmp_path / "in" / "m.safetensors")
    refused(tmp_path / "in" / "m.safetensors", message)


def test_all_traps_at_once(tmp_path: Path) -> None:
    root = folder(tmp_path / "m")
    for i, (trap, _) in enumerate(TRAPS.values()):
        trap(root / f"trap{i}")
    assert "trap0" in str(refused(root, f"{len(TRAPS)} problems"))


QUANTIZED: dict[str, tuple[dict[str, Any], str, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "'gptq'", "then quantize the locked one"),
    "awq": ({"quant_method": "awq"}, "'awq'", "then quantize"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'", "dequantize"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'", "FineGrainedFP8Config"),
    "mxfp4": ({"quant_method": "mxfp4"}, "'mxfp4'", "Mxfp4Config(dequantize=True)"),
    "new": ({"quant_method": "brand_new"}, "'brand_new'", "then quantize"),
}


@pytest.mark.parametrize(("quantization", "message", "hint"), QUANTIZED.values(), ids=QUANTIZED.keys())
@pytest.mark.parametrize("nested", [False, True])
def test_quantized_by_config(
    tmp_path: Path, quantization: dict[str, Any], message: str, hint: str, nested: bool
) -> None:
    config: dict[str, Any] = {"quantization_config": quantization}
    config = {"text_config": config} if nested else config
    error = refused(folder(tmp_path / "m", config=config), f"the weights are quantized.*{message}")
    assert hint in str(error.hint)
    file = folder(tmp_path / "n") / "model.safetensors"
    refused(file, "the weights are quantized", config=config)


TENSORS: dict[str, tuple[dict[str, tuple[str, list[int]]], str, str]] = {
    "gptq": ({"l.qweight": ("I32", [2]), "l.g_idx": ("I32", [2])}, "gptq", "then quantize"),
    "awq": (
        {"l.qweight": ("I32", [2]), "l.qzeros": ("I32", [2]), "l.scales": ("F16", [2])},
        "awq",
        "then quantize",
    ),
    "bnb 4 bits": (
        {"l.weight": ("U8", [4, 1]), "l.weight.absmax": ("F32", [1])},
        "bitsandbytes|integers",
        "",
    ),
    "bnb state": ({"a.weight.quant_state.bitsandbytes__nf4": ("U8", [4])}, "bitsandbytes", "dequantize"),
    "bnb 8 bits": ({"l.SCB": ("F32", [1]), "l.weight": ("I8", [2, 2])}, "bitsandbytes", ""),
    "fp8 scales": ({"l.weight": ("F8_E4M3", [4]), "l.weight_scale_inv": ("F32", [1])}, "fp8", "FineGrained"),
    "fp8 alone": ({"l.weight": ("F8_E5M2", [4])}, "fp8", "FineGrained"),
    "fp8 scales alone": (
        {"l.weight": ("BF16", [4]), "l.weight_scale_inv": ("F32", [1])},
        "fp8",
        "FineGrained",
    ),
    "mxfp4": ({"e.up_blocks": ("U8", [2, 16]), "e.up_scales": ("U8", [2])}, "mxfp4", "Mxfp4Config"),
    "fp4": ({"w": ("F4", [2])}, "4 or 6 bits", "then quantize"),
    "compressed": ({"l.weight_packed": ("I32", [2])}, "compressed-tensors", "CompressedTensorsConfig"),
    "integers": ({"l.weight": ("I8", [2, 2])}, "integers", "then quantize"),
}


@pytest.mark.parametrize(("tensors", "message", "hint"), TENSORS.values(), ids=TENSORS.keys())
def test_quantized_by_tensors(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]], message: str, hint: str
) -> None:
    sizes = {"F4": 0.5, "F8": 1, "U8": 1, "I8": 1, "BF": 2, "F1": 2, "F3": 4, "I3": 4}
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape) * sizes[dtype[:2]])
        header[name] = entry(dtype, shape, at, at + size)
        at += size
    root = folder(tmp_path / "m")
    (root / "model.safetensors").write_bytes(by_hand(header, bytes(at)))
    error = refused(root, rf"the weights are quantized \(.*({message})")
    assert hint in str(error.hint)
    refused(root / "model.safetensors", "the weights are quantized")


def test_names_that_only_look_quantized_pass(tmp_path: Path) -> None:
    root = tmp_path / "m"
    root.mkdir()
    header = {
        "logit_scales": entry("F32", [1], 0, 4),
        "norm.scales": entry("F32", [1], 4, 8),
        "down_blocks": entry("U8", [1], 8, 9),
        "position_ids": entry("I64", [1, 1], 9, 17),
    }
    (root / "model.safetensors").write_bytes(by_hand(header, bytes(17)))
    with open_checkpoint(root, config={"quantization_config": None}) as checkpoint:
        assert len(checkpoint.tensors) == 4


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "m.gguf").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "in" / "renamed.safetensors").write_bytes(b"GGUF\3\0\0\0")
    for name in ("m.gguf", "renamed.safetensors"):
        assert "then convert" in str(refused(tmp_path / "in" / name, "GGUF files cannot be locked").hint)
    (tmp_path / "in" / "renamed.safetensors").unlink()
    refused(tmp_path / "in", "GGUF files cannot be locked")


def test_adapters(tmp_path: Path) -> None:
    for number, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        root = folder(tmp_path / str(number))
        (root / name).write_text("{}")
        error = refused(root, "an adapter, not a model")
        assert "product" in str(error.hint)
        assert "harden" in str(error.hint)
    for number, name in enumerate(
        ("m.q_proj.lora_A.weight", "lora_unet_x.lora_down.weight", "x.lora_B.default.weight")
    ):
        file = tmp_path / f"f{number}" / "m.safetensors"
        file.parent.mkdir()
        save_file({name: np.ones((2, 2), np.float32)}, file)
        refused(file, "an adapter, not a model")


def test_other_paths(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    refused(inside / "nothing", "no such file or folder")
    refused(inside, "no weights here")
    for name, message in {
        "x.bin": "not a .safetensors file",
        "x.ckpt": "not a .safetensors file",
        "model-00001-of-00002.safetensors": "one shard",
    }.items():
        (inside / name).write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
        refused(inside / name, message)
        (inside / name).unlink()
    save_file(arrays(), inside / "other.safetensors")
    refused(inside, "no weights under a name that a loader looks for")
    (inside / "other.safetensors").rename(inside / "model.safetensors")
    (inside / "model.safetensors").write_bytes(by_hand("{}"))
    refused(inside, "holds no tensors")
    (inside / "config.json").write_text("[1]")
    refused(inside, "not a JSON object")


def test_all_shard_problems_at_once(tmp_path: Path) -> None:
    root = folder(tmp_path / "m", shards=3)
    for path in root.glob("*.safetensors"):
        os.truncate(path, 90)
    assert str(refused(root, "3 problems")).count("claims more bytes") == 3
    root = folder(tmp_path / "n", shards=3)
    path = root / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    del weight_map["scale"]
    write_index(root, weight_map | {"more": SECOND, "even.more": SECOND})
    refused(root, "3 problems")
