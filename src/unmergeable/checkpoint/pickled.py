"""Checkpoints in torch's pickle format, read as the safetensors checkpoint that they are converted to.

Only `torch.load(weights_only=True)` unpickles, so no code of the file runs; zip and legacy files alike. A
file is loaded whole, one at a time. Names, dtypes and values stay; a tensor that shares memory with another
(a tie) or is not contiguous becomes a tensor of its own, and the order is the one that the safetensors
library would write.
"""

from __future__ import annotations

import json
import os
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, RunError
from .files import load_json, open_regular
from .header import Shard, TensorInfo, build_shard, reference_order
from .layout import Layout
from .problems import Problems, quoted

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32",
    "uint32": "U32", "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


def converted_name(name: str) -> str:
    """What a pickle file or its index is called as safetensors: pytorch_model.bin -> model.safetensors."""
    if name.startswith("pytorch_model"):
        name = name[len("pytorch_") :]
    return (
        name.replace(".bin", ".safetensors", 1)
        if ".bin.index" in name
        else name[: -len(".bin")] + ".safetensors"
    )


def converted_index(root: Path, layout: Layout) -> dict[str, bytes]:
    """The converted checkpoint's index by file name, as save_pretrained writes it; none if not sharded."""
    if layout.index is None or layout.weight_map is None:
        return {}
    index = load_json(root / layout.index)
    index["weight_map"] = {name: converted_name(file) for name, file in layout.weight_map.items()}
    return {converted_name(layout.index): (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()}


def converted_layout(layout: Layout) -> Layout:
    """The same layout in the names of the converted checkpoint."""
    weight_map = layout.weight_map and {
        name: converted_name(file) for name, file in layout.weight_map.items()
    }
    return Layout([converted_name(file) for file in layout.files], layout.index, weight_map, True)


class PickleSource:
    """The bytes of a converted checkpoint. Safe to use from several threads.

    Args:
        root: the folder.
        layout: its pickle files.

    Raises:
        InputError: torch is missing, a file that does not load with weights_only, or something in it that is
        not
            a plain tensor.
    """

    def __init__(self, root: Path, layout: Layout) -> None:
        self._paths = {converted_name(file): root / file for file in layout.files}
        self._lock = threading.Lock()
        self._loaded: tuple[str, dict[str, torch.Tensor]] | None = None
        self.shards: list[Shard] = []
        for file in self._paths:
            tensors = [
                (name, _dtype(tensor), tuple(tensor.shape)) for name, tensor in self._state(file).items()
            ]
            tensors.sort(key=lambda entry: reference_order(entry[0], entry[1]))
            self.shards.append(build_shard(file, tensors, {"format": "pt"}))

    def readinto(self, info: TensorInfo, offset: int, out: memoryview) -> None:
        """Fills `out` with a tensor's bytes from `offset` on. Raises RunError if the file changed."""
        with self._lock:
            tensor = self._state(info.file).get(info.name)
            if tensor is None or tuple(tensor.shape) != info.shape or _dtype(tensor) != info.dtype:
                raise RunError("the file changed while it was read", where=self._paths[info.file])
            data = _bytes(tensor)
            out[:] = data[offset : offset + len(out)]

    def close(self) -> None:
        """Forgets the file loaded last."""
        self._loaded = None

    def changed(self) -> list[str]:
        """Nothing: what was checked is what is held in memory, or is compared when it is loaded again."""
        return []

    def _state(self, file: str) -> dict[str, torch.Tensor]:
        if self._loaded is None or self._loaded[0] != file:
            self._loaded = None  # before the next one is loaded: never two in memory
            self._loaded = (file, load_state(self._paths[file]))
        return self._loaded[1]


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one pickle file, on the CPU.

    Raises:
        InputError: as `PickleSource`.
    """
    try:
        import torch
    except ImportError:
        hint = "install torch, or save the checkpoint as safetensors"
        raise InputError("reading a pickle checkpoint needs torch", where=path, hint=hint) from None
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _refuse_compressed(file, size, path)
        try:
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a hostile file makes torch raise almost anything
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            hint = "the file is damaged or holds more than weights; save it as safetensors where you trust it"
            raise InputError(
                "the pickle does not load with weights_only", where=path, got=reason, hint=hint
            ) from None
    _check(state, size, path)
    return dict(state)


def _refuse_compressed(file: Any, size: int, path: Path) -> None:
    """torch does not compress: a file that inflates is not its work and may inflate to anything."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return
    try:
        members = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise InputError("the pickle's archive is damaged", where=path, got=error) from None
    if (
        any(m.compress_type != zipfile.ZIP_STORED for m in members)
        or sum(m.file_size for m in members) > size
    ):
        raise InputError(
            "the pickle's archive is compressed", where=path, hint="save the checkpoint as safetensors"
        )
    file.seek(0)


def _check(state: object, size: int, path: Path) -> None:
    import torch

    hint = "save the model's state_dict alone, or save the model as safetensors"
    if not isinstance(state, dict):
        raise InputError("the pickle is not a state dict", where=path, got=type(state).__name__, hint=hint)
    problems = Problems(path)
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            problems.add(
                f"the entry {quoted(name)} is not a named tensor", got=type(tensor).__name__, hint=hint
            )
        elif tensor.layout != torch.strided or tensor.is_quantized or _dtype(tensor) not in _DTYPES.values():
            got = f"{tensor.dtype}, {tensor.layout}"
            problems.add(f"tensor {quoted(name)} has no place in a safetensors file", got=got)
        elif tensor.numel() * tensor.element_size() > size:
            # A view with stride zero may claim any size; real weights fit in their file.
            problems.add(f"tensor {quoted(name)} is larger than the file", expected=f"<= {size} bytes")
    problems.raise_any()


def _dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().data
