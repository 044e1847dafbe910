"""Formats that are recognised in order to be refused, each with what to do instead.

Quantized weights cannot be rearranged as numbers; weights in a second format would pass through unlocked; an
adapter has no function of its own to preserve.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import Tree, load_json_list, read_head
from .header import TensorInfo
from .problems import Problems, quoted

MANIFEST = "unmergeable.json"
SIDECAR = ".unmergeable.json"
_LOAD = (
    "convert it to bf16 first: load it in transformers with quantization_config={}(dequantize=True) and "
    "dtype=bfloat16, save it with save_pretrained, and lock that"
)
_BEFORE = "lock the unquantized checkpoint, then quantize the locked one"
_METHODS = {
    "gptq": _BEFORE,
    "awq": _BEFORE,
    "bitsandbytes": _BEFORE + "; a model loaded in 4 or 8 bits gives dense weights by model.dequantize()",
    "bitsandbytes_4bit": _BEFORE,
    "bitsandbytes_8bit": _BEFORE,
    "fp8": _LOAD.format("FineGrainedFP8Config"),
    "mxfp4": _LOAD.format("Mxfp4Config"),
    "compressed-tensors": _LOAD.format("CompressedTensorsConfig"),
}
# Tensor name endings that only quantized layers have.
_ENDINGS = {
    "gptq": (".g_idx",),
    "gptq or awq": (".qweight", ".qzeros"),
    "fp8": (".weight_scale_inv", "_scale_inv", ".scaled_fp8", "scaled_fp8"),
    "bitsandbytes": (
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        ".SCB",
        ".weight_format",
    ),
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_zero_point", ".input_scale"),
}
_HINTS = {"gptq or awq": _BEFORE, **_METHODS}
_WEIGHTS = re.compile(
    r"""(?ix)  .*\.data-\d+-of-\d+  |  weights?\.np[yz]  |
        .*\.(safetensors|gguf|ggml|h5|keras|msgpack|onnx|onnx_data|onnx\.data|pt|pth|pt2|ptl|ckpt|bin|ot|pb
        |tflite|mlpackage|mlmodel|nemo|distcp|incomplete|engine|trt|dduf)"""
)
# Files of a training run that hold no weights, whatever their ending says.
_HARMLESS = re.compile(r"(training_args\.bin|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth)")
_MAGIC = {
    b"GGUF": "GGUF",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19": "legacy torch pickle",
}


def sniff(path: Path) -> str | None:
    """The weight format of a file by its first bytes, or None: GGUF, HDF5, safetensors, torch pickle.

    Raises:
        InputError: the file is not regular or cannot be read.
    """
    head = read_head(path, 128)
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if head.startswith(b"PK\x03\x04") and b"/data.pkl" in head:
        return "torch pickle"
    # The length of a header that anybody writes fits in four bytes, and the JSON begins with a tensor or
    # metadata.
    if head[4:8] == b"\0\0\0\0" and re.match(rb'\{\s*"', head[8:]):
        return "safetensors"
    return None


def refuse_quantized_config(config: dict[str, Any] | None, where: object) -> None:
    """Refuses a configuration, or one nested in it, that declares quantized weights.

    Raises:
        InputError: with the conversion to run first.
    """
    for path, part in _nested(config or {}):
        for field in ("quantization_config", "compression_config"):
            found = part.get(field)
            if not found:
                continue
            method = str(found.get("quant_method", "")) if isinstance(found, dict) else ""
            hint = _METHODS.get(method.lower().split(".")[-1], _BEFORE)
            raise InputError(
                "the weights are quantized",
                where=where,
                got=f"{path}{field} with quant_method {quoted(method, 40)}",
                hint=f"{hint}; if the weights are already dense, remove {field} from config.json",
            )


def _nested(config: dict[str, Any], path: str = "", depth: int = 4) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, config
    for name, value in config.items() if depth else ():
        if (
            isinstance(value, dict)
            and name.endswith("config")
            and not name.startswith(("quantization", "compression"))
        ):
            yield from _nested(value, f"{path}{name}.", depth - 1)


def refuse_quantized_tensors(tensors: dict[str, TensorInfo], where: object) -> None:
    """Refuses tensors whose names or dtypes only quantized layers have, whatever the configuration says.

    Raises:
        InputError: with an example and the conversion to run first.
    """
    for name, info in tensors.items():
        method = next((m for m, ends in _ENDINGS.items() if name.endswith(ends)), None)
        if ".quant_state." in name:
            method = "bitsandbytes"
        if name.endswith("_blocks") and f"{name[:-7]}_scales" in tensors and info.dtype == "U8":
            method = "mxfp4"
        if method is None and info.dtype.startswith(("F8", "F6_", "F4")):
            method = "fp8" if info.dtype.startswith("F8") else "4 or 6 bits"
        if method is None and name.endswith(".weight") and info.dtype[0] in "IU" and len(info.shape) > 1:
            method = "integers"
        if method is not None:
            raise InputError(
                f"the weights are quantized ({method})",
                where=where,
                got=f"tensor {quoted(name)}: {info.dtype} {list(info.shape)}",
                hint=_HINTS.get(method, _BEFORE),
            )


def refuse_adapter(tree: Tree, where: object) -> None:
    """Refuses the folder of an adapter.

    Raises:
        InputError: with the reason and the way to protect an adapter.
    """
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    found = [name for name in names if name in tree.files]
    if found:
        raise _adapter(where, found[0])


def refuse_adapter_tensors(tensors: Iterable[str], where: object) -> None:
    """Refuses a single file that holds an adapter, by the names of its tensors. Raises InputError."""
    for name in tensors:
        if re.search(r"\.lora_(A|B|down|up|embedding_[AB])\b|(^|\.)lora_(unet|te\d?)_", name):
            raise _adapter(where, f"tensor {quoted(name)}")


def _adapter(where: object, got: str) -> InputError:
    return InputError(
        "this is an adapter, not a model",
        where=where,
        got=got,
        hint="what merges is the product of an adapter's two matrices, which no lock can change without "
        "changing the model: protect an adapter with `unmergeable harden`, or merge it into its base and "
        "lock that",
    )


def refuse_strays(root: Path, tree: Tree, used: set[str]) -> None:
    """Refuses weights in the folder that are not part of the checkpoint: copied, they would be unlocked.

    Folders that `modules.json` lists (layers behind the model, saved on their own) pass.

    Raises:
        InputError: all such files at once.
    """
    problems = Problems(root)
    exempt = _module_folders(root) if "modules.json" in tree.files else ()
    hint = "delete it or move it out of the folder: it would be published unlocked"
    for folder in tree.folders:
        if folder.rpartition("/")[2] == ".git":
            problems.add("a git repository keeps the unlocked weights", where=root / folder,
                         hint="move it out, or copy the checkpoint without it")  # fmt: skip
    for name in tree.files:
        base = name.rpartition("/")[2]
        if name in used or name.startswith(exempt) or _HARMLESS.fullmatch(base) or "/.git/" in f"/{name}":
            continue
        if _WEIGHTS.fullmatch(base):
            problems.add("weights that are not part of this checkpoint", where=root / name, hint=hint)
            continue
        with problems.collect():
            kind = sniff(root / name)
            if kind:
                problems.add(f"looks like weights ({kind})", where=root / name, hint=hint)
    problems.raise_any()


def _module_folders(root: Path) -> tuple[str, ...]:
    paths = [item.get("path") for item in load_json_list(root / "modules.json") if isinstance(item, dict)]
    return tuple(f"{path.strip('/')}/" for path in paths if isinstance(path, str) and path.strip("/"))


def refuse_file(path: Path) -> None:
    """Refuses a single file that is not safetensors.

    Raises:
        InputError: with what to pass instead.
    """
    kind = sniff(path)
    if kind == "GGUF" or path.suffix == ".gguf":
        hint = "lock the safetensors checkpoint that it was made from, then convert the locked one to GGUF"
        raise InputError("GGUF files cannot be locked", where=path, hint=hint)
    if path.suffix != ".safetensors":
        hint = "pass a .safetensors file, or the folder that save_pretrained wrote (there, .bin is converted)"
        raise InputError(
            "not a .safetensors file", where=path, got=kind or path.suffix or "no ending", hint=hint
        )
    if re.search(r"-\d{5}-of-\d{5}\.safetensors$", path.name):
        raise InputError("this is one shard of a checkpoint", where=path, hint="pass its folder")
