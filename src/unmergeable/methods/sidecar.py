"""The owner's sidecar of a pruned lock: what was pruned, so that unlocking can bring it back bit for bit.

A safetensors file, mode 0600, kept by the owner and never beside the locked model: it holds original weights
at their original places, so it gives the order of the rows away. For every pruned tensor of a component (a
plain checkpoint is the component "."):

    component|name|changed   U8, a bit a weight in row-major order, most significant first: what was changed
    component|name|values    the original weights at these places, in the checkpoint's dtype

The metadata has the salt of the lock and the SHA-256 of each tensor's values. Without the sidecar unlocking
leaves what pruning left: zeros, or the base's weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np

from ..checkpoint import Shard, ShardWriter, StagedFile, TensorInfo, bits_dtype, build_shard, read_header
from ..checkpoint.files import open_regular, read_into
from ..checkpoint.write import run_error
from ..errors import InputError
from .prune import Array, Mask, Prune, Source

FORMAT = "unmergeable-pruned-1"
BLOCK = 1 << 22  # weights that are handled at a time

Part = tuple[str, Source, Mapping[str, Prune]]  # component, its checkpoint before pruning, what is pruned


def write_sidecar(path: str | os.PathLike[str], salt: bytes, parts: Iterable[Part]) -> None:
    """Keep what pruning changes. Every pruned tensor is read twice, for the header comes first and counts.

    Args:
        path: the new file; that it lies outside of the destination is for the caller to check.
        salt: of the lock.

    Raises:
        InputError: the file exists, or its folder does not. RunError: no room, or the disk fails.
    """
    target = Path(path)
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    metadata = {"format": FORMAT, "salt": salt.hex()}
    acting = [
        (f"{component}|{name}", source, source.tensors[name], prune)
        for component, source, prunes in parts
        for name, prune in prunes.items()
        if prune.acts_on(source.tensors[name].shape)
    ]
    for label, source, info, prune in acting:
        count, digest = 0, hashlib.sha256()
        for _, values in _originals(source, info, prune):
            count += values.size
            digest.update(values.data)
        tensors.append((f"{label}|changed", "U8", (-(-prod(info.shape) // 8),)))
        tensors.append((f"{label}|values", info.dtype, (count,)))
        metadata[f"sha256|{label}"] = digest.hexdigest()
    shard = build_shard(target.name, tensors, metadata)
    places = {info.name: info.start for info in shard.tensors}
    with StagedFile(target) as staged:
        with ShardWriter(staged.path, shard.header, shard.size) as writer:
            os.chmod(staged.path, 0o600)  # until it gets its name, its folder is private
            for label, source, info, prune in acting:
                at, masks = places[f"{label}|values"], []
                for changed, values in _originals(source, info, prune):
                    masks.append(changed.reshape(-1))
                    writer.write_at(at, values.data)
                    at += values.nbytes
                writer.write_at(places[f"{label}|changed"], np.packbits(np.concatenate(masks)).data)
        staged.commit()


def _originals(source: Source, info: TensorInfo, prune: Prune) -> Iterator[tuple[Mask, Array]]:
    for start, stop in _blocks(info):
        changed = prune.changed(info.shape, start, stop)
        yield changed, np.ascontiguousarray(source.read_rows(info.name, start, stop)[changed])


def _blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    rows = max(1, BLOCK // max(prod(info.shape[1:]), 1))
    for start in range(0, info.shape[0], rows):
        yield start, min(start + rows, info.shape[0])


class Sidecar:
    """A sidecar that is open for reading. Use it as a context manager or close it.

    Args:
        path: the file.
        salt: of the lock that is undone.

    Raises:
        InputError: no such file, not a sidecar, or one of another lock.
    """

    def __init__(self, path: str | os.PathLike[str], salt: bytes) -> None:
        self.path = Path(path)
        self._fd = open_regular(self.path)
        try:
            shard = read_header(self._fd, self.path.name, self.path)
            self._metadata = shard.metadata
            self._tensors = {info.name: info for info in shard.tensors}
            if self._metadata.get("format") != FORMAT:
                raise InputError("not a file of pruned weights", where=self.path)
            if self._metadata.get("salt") != salt.hex():
                hint = "give the file that was written with this lock"
                raise InputError("the pruned weights are of another lock", where=self.path, hint=hint)
        except BaseException:
            self.close()
            raise

    def put_back(
        self, folder: Path, shards: Iterable[Shard], prunes: Mapping[str, Prune], component: str = "."
    ) -> int:
        """Write the original weights into the files of an unlocked component, in the layout of its source.

        Args:
            folder: where the files are, staged and not yet the destination.
            shards: the layouts of these files.
            prunes: as `Drawn.prune`, from the key.

        Returns: how many weights were put back.

        Raises:
            InputError: this file lacks a tensor, is damaged, or belongs to another model.
            RunError: the disk fails.
        """
        count = 0
        for shard in shards:
            infos = [info for info in shard.tensors if info.name in prunes]
            infos = [info for info in infos if prunes[info.name].acts_on(info.shape)]
            if not infos:
                continue
            path = folder / shard.file
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    for info in infos:
                        count += self._put_back_one(
                            fd, path, f"{component}|{info.name}", info, prunes[info.name]
                        )
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                raise run_error(error, path) from error
        return count

    def _put_back_one(self, fd: int, path: Path, label: str, info: TensorInfo, prune: Prune) -> int:
        values = self._values(label, info, prune)
        row = info.nbytes // max(info.shape[0], 1)
        used = 0
        for start, stop in _blocks(info):
            changed = prune.changed(info.shape, start, stop)
            bits: Array = np.empty((stop - start, *info.shape[1:]), dtype=bits_dtype(info.dtype))
            read_into(fd, bits.reshape(-1).view(np.uint8).data, info.start + start * row, path)
            here = int(np.count_nonzero(changed))
            bits[changed] = values[used : used + here]
            used += here
            _write(fd, bits, info.start + start * row)
        return used

    def _values(self, label: str, info: TensorInfo, prune: Prune) -> Array:
        """The original weights of one tensor, after every check."""
        packed, values = self._read(f"{label}|changed", "U8"), self._read(f"{label}|values", info.dtype)
        total = prod(info.shape)
        if len(packed) != -(-total // 8):
            raise self._damaged(label)
        changed = np.unpackbits(packed, count=total).astype(bool)
        width = prod(info.shape[1:])
        mine = all(
            np.array_equal(
                prune.changed(info.shape, start, stop).reshape(-1), changed[start * width : stop * width]
            )
            for start, stop in _blocks(info)
        )
        digest = hashlib.sha256(values.data).hexdigest()
        right = len(values) == np.count_nonzero(changed) and digest == self._metadata.get(f"sha256|{label}")
        if not (mine and right):
            raise self._damaged(label)
        return values

    def _read(self, name: str, dtype: str) -> Array:
        info = self._tensors.get(name)
        if info is None or info.dtype != dtype or len(info.shape) != 1:
            raise self._damaged(name)
        out: Array = np.empty(info.shape, dtype=bits_dtype(dtype))
        if out.nbytes:
            read_into(self._fd, out.view(np.uint8).data, info.start, self.path)
        return out

    def _damaged(self, label: str) -> InputError:
        return InputError(
            "the pruned weights are damaged, or of another model",
            where=f"{self.path}: {label}",
            hint="restore the file from a backup, or unlock without it",
        )

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Sidecar:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def _write(fd: int, bits: Array, at: int) -> None:
    view = bits.reshape(-1).view(np.uint8).data
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
