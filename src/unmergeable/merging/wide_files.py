"""The weights of a wide merge on disk: in which dtypes, cut into files, and read back by the stock class."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..checkpoint import (
    BITS,
    Checkpoint,
    ShardWriter,
    build_shard,
    is_float,
    open_checkpoint,
    to_bits,
    to_float32,
    write_file,
)
from ..errors import InputError
from ..stock import load_module, module_state
from .tensors import read_tensor
from .wide_tensors import HINT, State

SHARD = 5 * 10**9  # bytes of one file, at most about
INDEX = "model.safetensors.index.json"
_WHOLE = {
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def stored_dtypes(like: Checkpoint, tensors: State) -> tuple[dict[str, str], str]:
    """The dtype that each tensor is stored in, the host's, and the one that most of the host is stored in."""
    counts: dict[str, int] = {}
    for info in like.tensors.values():
        if is_float(info.dtype):
            counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes
    common = max(counts, key=lambda dtype: counts[dtype])
    found = {}
    for name, tensor in tensors.items():
        known = like.tensors[name].dtype if name in like.tensors else common
        if not tensor.is_floating_point():
            found[name] = _WHOLE[tensor.dtype]
        else:
            found[name] = known if is_float(known) else common
    return found, common


def write_weights(folder: Path, tensors: State, stored: Mapping[str, str]) -> None:
    """Write weights as one file, or as several and their index.

    Args:
        folder: where to.
        tensors: by name; floating-point ones in float64, which are rounded once.
        stored: the dtype of each.

    Raises:
        InputError: numbers that the dtype cannot hold. RunError: the disk is full or fails.
    """
    files = list(_cut(tensors, stored))
    places: dict[str, str] = {}
    total = 0
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if files[1:] else "model.safetensors"
        entries = [(name, stored[name], tuple(tensors[name].shape)) for name in names]
        shard = build_shard(file, entries, {"format": "pt"})
        with ShardWriter(folder / file, shard.header, shard.size) as writer:
            for info in shard.tensors:
                writer.write_at(info.start, _bits(info.name, tensors[info.name], info.dtype))
        places |= dict.fromkeys(names, file)
        total += sum(info.nbytes for info in shard.tensors)
    if files[1:]:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _cut(tensors: State, stored: Mapping[str, str]) -> Iterator[list[str]]:
    """Names of the tensors of each file."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        own = tensor.numel() * BITS[stored[name]] // 8
        if names and size + own > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def _bits(name: str, tensor: torch.Tensor, dtype: str) -> memoryview:
    plain = tensor.contiguous()
    if not is_float(dtype):
        return plain.flatten().view(torch.uint8).numpy().data
    bits = to_bits(plain.numpy(), dtype)
    if not np.isfinite(to_float32(bits, dtype)).all():
        got = f"{float(plain.abs().max()):.3g}"
        hint = "take a host in a wider dtype"
        raise InputError("numbers beyond the dtype", where=name, expected=dtype, got=got, hint=hint)
    return bits.reshape(-1).view(np.uint8).data


def open_written(folder: Path, dst: Path, tensors: State) -> nn.Module:
    """What was written as its stock class opens it, in float64: every tensor where it belongs.

    Args:
        folder: where it is now.
        dst: where it will be, for messages.
        tensors: what was written.

    Raises:
        InputError: it is not opened, or not every tensor is what was written.
    """
    try:
        module = load_module(folder).double()
    except InputError as error:
        what = "the stock class does not open the wider checkpoint"
        raise InputError(what, where=dst, got=f"{error.what}: {error.got}", hint=HINT) from error
    state = module_state(module)
    with open_checkpoint(folder) as stored:
        for name in sorted({*state, *tensors}):
            same = name in state and name in tensors
            if same:
                written = read_tensor(stored, name)
                read = state[name]
                same = torch.equal(written.float().double() if read.is_floating_point() else written, read)
            if not same:
                what = "the stock class does not read a tensor of the wider checkpoint as it was written"
                raise InputError(what, where=f"{dst}: {name}", hint=HINT)
    return module
