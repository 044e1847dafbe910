"""Opening a checkpoint: everything is checked before the first tensor is read, and nothing is mapped.

Tensors are read by offset into fresh arrays, so memory is what the caller asks for, any number of threads may
read, and the operating system's cache does the rest.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import InputError, RunError
from . import formats
from .files import load_json, open_regular, read_into, require_regular, walk
from .header import Shard, TensorInfo, read_header
from .layout import Layout, check_index, find_weights
from .numeric import bits_dtype
from .pickled import PickleSource, converted_index, converted_layout
from .problems import Problems, quoted


class Source(Protocol):
    """Where the bytes of tensors come from."""

    def readinto(self, info: TensorInfo, offset: int, out: memoryview) -> None:
        """Fills `out` with the bytes of a tensor from `offset` on."""

    def close(self) -> None:
        """Gives up files and memory."""

    def changed(self) -> list[str]:
        """The files that are not what they were when they were opened."""


class FileSource:
    """Open safetensors files, read by offset."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, Path, tuple[int, int]]] = {}

    def open(self, path: Path, file: str) -> Shard:
        """Opens one file and reads its header. Raises InputError."""
        fd = open_regular(path)
        self._open[file] = (fd, path, _version(os.fstat(fd)))
        return read_header(fd, file, path)

    def readinto(self, info: TensorInfo, offset: int, out: memoryview) -> None:
        """Fills `out` with the bytes of a tensor from `offset` on. Raises RunError."""
        if info.file not in self._open:
            raise RunError("the checkpoint is closed", where=info.file)
        fd, path, _ = self._open[info.file]
        read_into(fd, out, info.start + offset, path)

    def close(self) -> None:
        """Closes all files; a second call does nothing."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def changed(self) -> list[str]:
        """The files whose size or time of change is not what it was."""
        return [file for file, (fd, _, version) in self._open.items() if _version(os.fstat(fd)) != version]


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


@dataclass(eq=False)
class Checkpoint:
    """A checkpoint that was checked and is open for reading. Use it as a context manager or close it.

    root: the folder, or the file if `single_file`. config: parsed config.json (or what was passed), None
    without. shards: the safetensors files in name order, as they are or (`converted`) as they become.
    tensors: all of them by name, in shard and offset order. side_files, side_folders: everything else,
    relative and sorted, but without the manifest. generated: files that the destination has in place of what
    was converted. manifest_path: the manifest of a locked checkpoint, None if it is not locked. nbytes: what
    a copy takes on disk.
    """

    root: Path
    single_file: bool
    config: dict[str, Any] | None
    shards: list[Shard]
    source: Source
    side_files: list[str] = field(default_factory=list)
    side_folders: list[str] = field(default_factory=list)
    generated: dict[str, bytes] = field(default_factory=dict)
    manifest_path: Path | None = None
    converted: bool = False
    side_bytes: int = 0
    tensors: dict[str, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {info.name: info for shard in self.shards for info in shard.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all shards and side files."""
        weights = sum(shard.size for shard in self.shards)
        return weights + self.side_bytes + sum(map(len, self.generated.values()))

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor as raw bits: unsigned integers of its item size, in its shape.

        Raises:
            InputError: no such tensor, or items smaller than a byte.
            RunError: reading failed.
        """
        info = self._info(name)
        return self._array(info, info.shape, 0)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `start` to `stop` of axis 0 as raw bits. Raises as `read`, and InputError for other rows."""
        info = self._info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise InputError(
                "no such rows", where=name, expected=f"rows of {info.shape}", got=f"{start}:{stop}"
            )
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        return self._array(info, (stop - start, *info.shape[1:]), start * row)

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes `start` to `stop` of a tensor's data, of any dtype. Raises as `read_rows`."""
        info = self._info(name)
        stop = info.nbytes if stop is None else stop
        if not 0 <= start <= stop <= info.nbytes:
            raise InputError(
                "no such bytes", where=name, expected=f"within {info.nbytes}", got=f"{start}:{stop}"
            )
        out = np.empty(stop - start, np.uint8).data
        self.source.readinto(info, start, out)
        return out

    def readinto(self, name: str, offset: int, out: memoryview) -> None:
        """Fills a buffer of bytes with a tensor's data from `offset` on. Raises as `read_rows`."""
        info = self._info(name)
        if offset < 0 or offset + len(out) > info.nbytes:
            got = f"{offset}:{offset + len(out)}"
            raise InputError("no such bytes", where=name, expected=f"within {info.nbytes}", got=got)
        self.source.readinto(info, offset, out)

    def check_unchanged(self) -> None:
        """Raises RunError if a shard was written to since it was opened: call it behind the last read."""
        changed = self.source.changed()
        if changed:
            raise RunError("the source changed while it was read", where=self.root, got=", ".join(changed))

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        self.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InputError("no such tensor", where=self.root, got=quoted(name))
        return self.tensors[name]

    def _array(self, info: TensorInfo, shape: tuple[int, ...], offset: int) -> npt.NDArray[Any]:
        array = np.empty(shape, bits_dtype(info.dtype))
        if array.nbytes:
            self.source.readinto(info, offset, array.reshape(-1).view(np.uint8).data)
        return array


def open_checkpoint(path: str | os.PathLike[str], *, config: dict[str, Any] | None = None) -> Checkpoint:
    """Opens a folder as save_pretrained writes it, or a single .safetensors file.

    Args:
        path: the folder or file; a link to one is followed.
        config: takes the place of config.json; the only configuration that a single file can have.

    Raises:
        InputError: anything that is not a whole, plain, unquantized checkpoint. Nothing has been written
        then.
    """
    root = Path(path)
    if not os.path.lexists(root):
        raise InputError("no such file or folder", where=root)
    if root.is_dir():
        return _open_folder(root, config)
    require_regular(root)
    formats.refuse_file(root)
    formats.refuse_quantized_config(config, "config")
    with ExitStack() as undo:
        source = FileSource()
        undo.callback(source.close)
        shards = [source.open(root, root.name)]
        sidecar = root.with_name(root.name + formats.SIDECAR)
        manifest = sidecar if os.path.lexists(sidecar) else None
        if manifest:
            require_regular(manifest)
        found = Checkpoint(root, True, config, shards, source, manifest_path=manifest)
        _check_tensors(found)
        undo.pop_all()
    return found


def _open_folder(root: Path, config: dict[str, Any] | None) -> Checkpoint:
    tree = walk(root)
    if "model_index.json" in tree.files:
        hint = "its components are checkpoints of their own: open them one by one"
        raise InputError("this is a pipeline of several models", where=root, hint=hint)
    formats.refuse_adapter(tree, root)
    if config is None and "config.json" in tree.files:
        config = load_json(root / "config.json")
    formats.refuse_quantized_config(config, root / "config.json")
    layout = find_weights(root, tree)
    replaced = {layout.index} if layout.pickled and layout.index else set()
    formats.refuse_strays(root, tree, {*layout.files, *replaced})
    with ExitStack() as undo:
        source, shards = _open_weights(root, layout, undo)
        check_index(root, converted_layout(layout) if layout.pickled else layout, shards)
        side = sorted(tree.files.keys() - {*layout.files, *replaced, formats.MANIFEST})
        found = Checkpoint(
            root, False, config, shards, source, side, tree.folders,
            generated=converted_index(root, layout) if layout.pickled else {},
            manifest_path=root / formats.MANIFEST if formats.MANIFEST in tree.files else None,
            converted=layout.pickled,
            side_bytes=sum(tree.files[name] for name in side),
        )  # fmt: skip
        _check_tensors(found)
        undo.pop_all()
    return found


def _open_weights(root: Path, layout: Layout, undo: ExitStack) -> tuple[Source, list[Shard]]:
    if layout.pickled:
        pickles = PickleSource(root, layout)
        return pickles, pickles.shards
    source = FileSource()
    undo.callback(source.close)
    problems = Problems(root)
    shards = []
    for file in layout.files:
        with problems.collect():
            shards.append(source.open(root / file, file))
    problems.raise_any()
    return source, shards


def _check_tensors(found: Checkpoint) -> None:
    if not found.tensors:
        raise InputError("the checkpoint holds no tensors", where=found.root)
    formats.refuse_quantized_tensors(found.tensors, found.root)
    formats.refuse_adapter_tensors(found.tensors, found.root)
