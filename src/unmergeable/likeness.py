"""Whether two checkpoints look the same from outside: layouts, headers, and files without weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from .certificate import Check
from .checkpoint import Shard
from .checkpoint.files import open_regular, walk
from .manifest import MANIFEST_NAME, Component, Manifest
from .output import hash_file
from .plan import Member, Opened

_CHUNK = 1 << 20


def labelled(member: Member, name: str) -> str:
    """A tensor or file of a component, as messages call it."""
    return name if member.name == "." else f"{member.name}/{name}"


def check_structure(before: Opened, after: Opened) -> tuple[Check, bool]:
    """Same components, files of weights, names, shapes, dtypes, order and metadata.

    `before` has the layouts that the lock planned, which differ from the source's where it changed the dtype.

    Returns: the check, and whether the tensors can be compared at all.
    """
    names = [[member.name for member in opened.members] for opened in (before, after)]
    if names[0] != names[1]:
        return _structure(f"components {names[0]} became {names[1]}", None), False
    tensors = 0
    for a, b in zip(before.members, after.members, strict=True):
        planned = {info.name: info for shard in a.shards for info in shard.tensors}
        found = b.source.tensors
        tensors += len(planned)
        for name in sorted(planned.keys() ^ found.keys()):
            what = "is missing" if name in planned else "was not there before"
            return _structure(f"tensor {labelled(b, name)} {what}", labelled(b, name)), False
        for name, info in planned.items():
            if info.shape != found[name].shape:
                what = f"has shape {list(found[name].shape)}, not {list(info.shape)}"
                return _structure(f"tensor {labelled(b, name)} {what}", labelled(b, name)), False
            if info.dtype != found[name].dtype:
                what = f"tensor {labelled(b, name)} is {found[name].dtype}, not {info.dtype}"
                return _structure(what, labelled(b, name)), False
    for a, b in zip(before.members, after.members, strict=True):
        problem = _differing_shards(a, b, before.single_file)
        if problem:
            return _structure(problem[1], problem[0]), True
    return Check(
        "structure", True, detail=f"{tensors} tensors: names, shapes, dtypes, order and metadata"
    ), True


def _structure(detail: str, place: str | None) -> Check:
    return Check("structure", False, detail=detail, place=place)


def _differing_shards(a: Member, b: Member, single_file: bool) -> tuple[str, str] | None:
    mine, theirs = [s.file for s in a.shards], [s.file for s in b.source.shards]
    if not single_file and mine != theirs:
        return labelled(b, "weights"), f"the files of weights are {', '.join(theirs)}, not {', '.join(mine)}"
    for old, new in zip(a.shards, b.source.shards, strict=False):
        if old.header != new.header:
            return labelled(b, new.file), f"{labelled(b, new.file)}: {_differing_header(old, new)}"
    return None


def _differing_header(old: Shard, new: Shard) -> str:
    if [info.name for info in old.tensors] != [info.name for info in new.tensors]:
        return "holds other tensors, or in another order"
    if old.metadata != new.metadata:
        return f"has metadata {new.metadata}, not {old.metadata}"
    return "has another header for the same tensors"


def check_files(before: Opened, after: Opened) -> Check:
    """Every other file byte for byte, as the lock planned to write it; the manifest excepted."""
    if before.single_file:
        return Check("other files", None, detail="a single file has none")
    count = 0
    if before.pipeline is not None and after.pipeline is not None:
        a, b = before.pipeline, after.pipeline
        problem = _differing_files(before.root, a.side_files, {}, after.root, b.side_files)
        problem = problem or _differing_folders(a.side_folders, b.side_folders)
        if problem:
            return Check("other files", False, detail=problem[1], place=problem[0])
        count += len(a.side_files)
    for old, new in zip(before.members, after.members, strict=True):
        source, target = old.source, new.source
        if old.passed and source.converted:  # a component without sites keeps its pickle
            a_files = [file for file in walk(source.root).files if file != MANIFEST_NAME]
            b_files = [file for file in walk(target.root).files if file != MANIFEST_NAME]
            problem = _differing_files(source.root, a_files, {}, target.root, b_files)
        else:
            written = {**source.generated, **old.files}
            copied = [name for name in source.side_files if name not in written]
            problem = _differing_files(source.root, copied, written, target.root, target.side_files)
        problem = problem or _differing_folders(source.side_folders, target.side_folders)
        if problem:
            place = labelled(new, problem[0])
            return Check("other files", False, detail=f"{place}: {problem[1]}", place=place)
        count += len(target.side_files)
    return Check("other files", True, detail=f"{count} files, byte for byte")


def _differing_files(
    a: Path, copied: list[str], written: Mapping[str, bytes], b: Path, found: list[str]
) -> tuple[str, str] | None:
    for name in sorted({*copied, *written} ^ set(found)):
        return name, "was not there before" if name in found else "is missing"
    for name in sorted(found):
        same = (b / name).read_bytes() == written[name] if name in written else _same_file(a / name, b / name)
        if not same:
            return name, "has other bytes"
    return None


def _differing_folders(a: list[str], b: list[str]) -> tuple[str, str] | None:
    for name in sorted(set(a) ^ set(b)):
        return name, "a folder that was not there before" if name in b else "the folder is missing"
    return None


def _same_file(a: Path, b: Path) -> bool:
    with os.fdopen(open_regular(a), "rb") as first, os.fdopen(open_regular(b), "rb") as second:
        if os.fstat(first.fileno()).st_size != os.fstat(second.fileno()).st_size:
            return False
        while chunk := first.read(_CHUNK):
            if chunk != second.read(_CHUNK):
                return False
    return True


def check_manifest(manifest: Manifest, after: Opened, hashes: Mapping[str, Mapping[str, str]]) -> Check:
    """The SHA-256 of every tensor, header and file beside what the manifest says.

    Args:
        hashes: of the tensors, by component and name.
    """
    count = 0
    for member in after.members:
        part = manifest.components.get(member.name)
        if part is None:
            return _manifest(f"the manifest knows no component {member.name}", member.name)
        problem = _differing_hashes(member, part, hashes.get(member.name, {}), after.single_file)
        if problem:
            return _manifest(f"{labelled(member, problem)} is not what was locked", labelled(member, problem))
        count += len(part.tensors)
    rest = manifest.components.get(".") if after.pipeline is not None else None
    for name, digest in rest.files.items() if rest is not None else ():
        if not (after.root / name).is_file() or hash_file(after.root / name) != digest:
            return _manifest(f"{name} is not what was locked", name)
    return Check("manifest", True, detail=f"SHA-256 of {count} tensors, of headers and files")


def _manifest(detail: str, place: str) -> Check:
    return Check("manifest", False, detail=detail, place=place)


def _differing_hashes(
    member: Member, part: Component, hashes: Mapping[str, str], single_file: bool
) -> str | None:
    """The first tensor, header or file of a component that differs."""
    if part.tensors:
        for name in sorted(part.tensors.keys() | hashes.keys()):
            if part.tensors.get(name) != hashes.get(name):
                return name
    headers = {shard.file: hashlib.sha256(shard.header).hexdigest() for shard in member.source.shards}
    planned = dict(part.shards)
    if single_file and len(headers) == len(planned) == 1:  # it may have another name by now
        planned = dict(zip(headers, planned.values(), strict=True))
    if planned:
        for file in sorted(headers.keys() | planned.keys()):
            if headers.get(file) != planned.get(file):
                return file
    for name, digest in sorted(part.files.items()):
        path = member.source.root / name
        if not path.is_file() or hash_file(path) != digest:
            return name
    return None
