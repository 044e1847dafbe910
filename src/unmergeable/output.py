"""Writing all components of a destination into its staging folder, and looking at the result once more."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from .checkpoint import StagedFile, Staging, copy_side_files, read_header
from .checkpoint.files import open_regular, walk
from .engine import Meter, Outcome, stream
from .errors import InputError, RunError
from .manifest import Component
from .movement import Movement
from .plan import Member, Opened

_CHUNK = 1 << 20


def staging(opened: Opened, dst: Path) -> AbstractContextManager[Staging]:
    """The staging that fits: a folder, or a single file with its manifest beside it."""
    return StagedFile(dst) if opened.single_file else Staging(dst)


def rename_single(opened: Opened, dst: Path) -> None:
    """A single file is called what the destination is called, not what the source is.

    Raises:
        InputError: a name that no reader would take for one of weights.
    """
    if opened.single_file:
        if dst.suffix != ".safetensors":
            what = "a single file of weights is called so by its ending"
            raise InputError(what, where=dst, expected=".safetensors", got=dst.suffix or "no ending")
        member = opened.members[0]
        member.shards = [
            replace(shard, file=dst.name, tensors=[replace(info, file=dst.name) for info in shard.tensors])
            for shard in member.shards
        ]


def write_members(
    opened: Opened,
    staged: Staging,
    *,
    workers: int,
    meter: Meter,
    movement: Mapping[str, Movement] | None = None,
    hash_source: bool = False,
) -> dict[str, dict[str, Outcome]]:
    """Write every shard and every other file, the manifest excepted.

    Args:
        movement: gets samples of what changed, by component.

    Returns: the outcome of every tensor, by component and name; none for a component that is passed through.

    Raises:
        InputError, RunError: as `engine.stream` and `copy_side_files`.
    """
    outcomes: dict[str, dict[str, Outcome]] = {}
    if opened.pipeline is not None:
        pipeline = opened.pipeline
        copy_side_files(opened.root, pipeline.side_files, pipeline.side_folders, {}, staged.path)
    for member in opened.members:
        folder = folder_of(member, opened, staged)
        if opened.pipeline is not None:
            os.mkdir(folder)
        if member.passed:
            tree = walk(member.source.root)
            copy_side_files(member.source.root, tree.files, tree.folders, {}, folder)
            meter.add(sum(info.nbytes for info in member.source.tensors.values()), member.name)
            continue
        if not opened.single_file:
            source, written = member.source, member.files
            generated = {name: data for name, data in source.generated.items() if name not in written}
            copied = [name for name in source.side_files if name not in written]
            copy_side_files(source.root, copied, source.side_folders, {**generated, **written}, folder)
        outcomes[member.name] = stream(
            member.reading,
            member.jobs(undo=hash_source),
            member.shards,
            folder,
            workers=workers,
            meter=meter,
            sample=None if movement is None else movement[member.name].add,
            hash_source=hash_source,
        )
        member.source.check_unchanged()
    _check_written(opened, staged)
    return outcomes


def folder_of(member: Member, opened: Opened, staged: Staging) -> Path:
    """Where a member's files are staged."""
    if opened.single_file:
        return staged.path.parent
    return staged.path if opened.pipeline is None else staged.path / member.name


def _check_written(opened: Opened, staged: Staging) -> None:
    """Read the staged headers back: same bytes, same sizes, no file missing."""
    for member in opened.members:
        if member.passed:
            continue
        folder = folder_of(member, opened, staged)
        for shard in member.shards:
            fd = open_regular(folder / shard.file)
            try:
                found = read_header(fd, shard.file)
            finally:
                os.close(fd)
            if (found.header, found.size) != (shard.header, shard.size):
                raise RunError("what was written is not what was planned", where=folder / shard.file)
        if opened.single_file:
            continue
        for name in [*member.source.side_files, *member.source.generated]:
            if not (folder / name).is_file():
                raise RunError("a file is missing in what was written", where=folder / name)


def manifest_components(
    opened: Opened, staged: Staging, outcomes: Mapping[str, Mapping[str, Outcome]]
) -> dict[str, Component]:
    """What a manifest says about every component: hashes of what is staged."""
    parts: dict[str, Component] = {}
    if opened.pipeline is not None:
        parts["."] = Component(files=_hash_files(staged.path, opened.pipeline.side_files))
    for member in opened.members:
        folder = folder_of(member, opened, staged)
        if member.match is None:
            parts[member.name] = Component(files=_hash_files(folder, sorted(walk(folder).files)))
            continue
        side = [] if opened.single_file else sorted({*member.source.side_files, *member.source.generated})
        parts[member.name] = Component(
            spec=member.digest or member.match.spec.digest,
            tensors={name: outcomes[member.name][name].sha256 for name in member.source.tensors},
            shards={shard.file: hashlib.sha256(shard.header).hexdigest() for shard in member.shards},
            files=_hash_files(folder, side),
        )
    return parts


def _hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: hash_file(folder / name) for name in names}


def hash_file(path: Path) -> str:
    """SHA-256 of a regular file, hexadecimal. Raises InputError."""
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
