"""Unlock: undo a lock with its key.

The manifest is checked before anything is written: the key, its signature, the headers and the other files.
The tensors' hashes are compared while they stream through, and nothing is published if one differs.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, Staging, check_destination
from .checkpoint.files import walk
from .engine import Meter, Outcome, Progress
from .errors import InputError, UsageError
from .keys import Key, load_key
from .likeness import labelled
from .manifest import Component, Manifest
from .match import match_spec
from .output import folder_of, hash_file, rename_single, staging, write_members
from .plan import ConfigLike, Member, Opened, draw, open_all
from .sealed import Detail, shard_of_header, unpack

__all__ = ["UnlockReport", "prepare_unlock", "unlock"]

DOCUMENT, DOCUMENT_VERSION = "unmergeable.unlock", 1
_SHOWN = 20
# A model card is written after the lock, and no loader reads it.
_DOCUMENT = re.compile(r"(\.md|(^|/)(LICENSE|NOTICE|\.gitattributes)[^/]*)$")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class UnlockReport:
    """What unlocking did. `as_dict` is the JSON document.

    Attributes:
        bit_for_bit: whether the result has the very bits that were locked: nothing was computed, pruned or
            changed since.
        altered: names of tensors and files that are not what was locked; only with `accept_changed`.
        notes: sentences that the owner should read.
    """

    source: str
    destination: str
    key: str
    method: str
    manifest: str
    domain: bool
    bit_for_bit: bool
    altered: tuple[str, ...]
    tensors: int
    nbytes: int
    seconds: float
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `unmergeable unlock --json`."""
        fields = dict(vars(self))
        fields["bytes"] = fields.pop("nbytes")
        return {
            "document": DOCUMENT,
            "version": DOCUMENT_VERSION,
            **fields,
            "altered": list(self.altered),
            "notes": list(self.notes),
        }


def unlock(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    key: Key | str | os.PathLike[str],
    manifest: str | os.PathLike[str] | None = None,
    accept_changed: bool = False,
    pruned: str | os.PathLike[str] | None = None,
    config: ConfigLike | None = None,
    jobs: int = 2,
    progress: Progress | None = None,
) -> UnlockReport:
    """Undo a lock.

    Args:
        src: the locked folder, file or pipeline; never changed.
        dst: the new folder or file; it appears whole or not at all.
        key: the key that it was locked with, or its file.
        manifest: the manifest, where it is not beside the weights: after training, or for a merge of models
            of one domain any one of theirs. Implies `accept_changed`.
        accept_changed: undo the lock of weights that are not those that were locked.
        pruned: the file of what `params` pruned, as `lock(keep_pruned=…)` wrote it.
        config: takes the place of config.json; unlocking does not read it.
        jobs: threads.
        progress: called with bytes done, bytes in all, and a tensor's name.

    Raises:
        InputError: not locked, another key, a manifest that was altered or is of a newer format, tensors or
            files that are not what was locked, a destination that cannot be used.
        RunError: reading or writing failed. Nothing is left at DST in any of these cases.
    """
    started = time.monotonic()
    key = key if isinstance(key, Key) else load_key(key)
    with ExitStack() as stack:
        opened = open_all(src, config, stack)
        accept = accept_changed or manifest is not None
        prepared = prepare_unlock(opened, key, manifest, accept=accept)
        check_destination(opened.root, dst, opened.nbytes)
        target = Path(dst)
        rename_single(opened, target)
        meter = Meter(
            sum(info.nbytes for m in opened.members for info in m.source.tensors.values()), progress
        )
        with staging(opened, target) as staged:
            outcomes = write_members(opened, staged, workers=jobs, meter=meter, hash_source=True)
            altered = list(prepared.altered)
            for member in opened.members:
                if not member.passed:
                    part = prepared.manifest.components[member.name]
                    altered += _differing(member, part, outcomes[member.name])
            if altered and not accept:
                raise _changed(opened.root, altered)
            restored = _put_back(opened, staged, prepared, pruned, altered)
            staged.commit()
    exact = all(_only_bits(member, restored) for member in opened.members)
    return UnlockReport(
        source=str(opened.root),
        destination=str(dst),
        key=key.id,
        method=prepared.manifest.method,
        manifest=str(prepared.path),
        domain=prepared.manifest.domain,
        bit_for_bit=exact and not altered,
        altered=tuple(altered),
        tensors=sum(map(len, outcomes.values())),
        nbytes=sum(s.size for m in opened.members for s in m.shards),
        seconds=time.monotonic() - started,
        notes=tuple(_notes(altered, opened, restored, prepared.manifest)),
    )


def _notes(altered: list[str], opened: Opened, restored: bool, manifest: Manifest) -> list[str]:
    notes = []
    if altered:
        notes.append(f"{len(altered)} tensors or files are not what was locked: their changes are kept")
    if any(_computes(member) for member in opened.members):
        notes.append(
            f"the method '{manifest.method}' computes: weights come back equal to the rounding of their dtype"
        )
    if not restored and any(member.drawn is not None and member.drawn.prune for member in opened.members):
        notes.append("what was pruned stays pruned: give the file that keep_pruned wrote to bring it back")
    return notes


def _put_back(
    opened: Opened,
    staged: Staging,
    prepared: Prepared,
    path: str | os.PathLike[str] | None,
    altered: Sequence[str],
) -> bool:
    """Whether what was pruned was put back from the owner's file.

    Raises:
        UsageError: nothing was pruned, or what was has been trained since. InputError: a file of another lock, or
            damaged.
    """
    if path is None:
        return False
    from .methods.sidecar import Sidecar

    if not any(member.drawn is not None and member.drawn.prune for member in opened.members):
        raise UsageError("nothing was pruned by this lock", where=path)
    trained = [
        label
        for member in opened.members
        if member.drawn is not None
        for name in member.drawn.prune
        if (label := labelled(member, name)) in altered
    ]
    if trained:
        raise UsageError(
            "what was pruned cannot be put back into weights that have changed since",
            where=trained[0],
            got=f"{len(trained)} tensors that have",
            hint="unlock without --pruned: their changes are kept, and what was pruned stays so",
        )
    with Sidecar(path, prepared.manifest.salt) as sidecar:
        for member in opened.members:
            if member.drawn is not None:
                sidecar.put_back(
                    folder_of(member, opened, staged), member.shards, member.drawn.prune, member.name
                )
    return True


def _computes(member: Member) -> bool:
    elements = () if member.drawn is None else member.drawn.elements.values()
    return not all(element.exact for element in elements)


def _only_bits(member: Member, restored: bool) -> bool:
    pruned = member.drawn is not None and bool(member.drawn.prune)
    return (restored or not pruned) and not _computes(member)


@dataclass(frozen=True)
class Prepared:
    """A manifest that was checked, where it stands, and what already differs from it."""

    manifest: Manifest
    path: Path
    altered: tuple[str, ...]


def prepare_unlock(
    opened: Opened, key: Key, manifest: str | os.PathLike[str] | None = None, *, accept: bool = False
) -> Prepared:
    """Check the manifest of a locked checkpoint and draw its elements again; `opened` is then ready to undo.

    Args:
        accept: go on where headers, files or names of tensors are not what was locked.

    Raises:
        InputError: as `unlock`.
    """
    path = opened.manifest_path if manifest is None else Path(manifest)
    if path is None:
        hint = "its manifest may have been left behind: give it by --manifest"
        raise InputError("the model is not locked, there is no manifest", where=opened.root, hint=hint)
    found = Manifest.read(path)
    found.check(key, where=path)
    if manifest is not None and opened.manifest_path is not None:
        _check_same_lock(found, opened.manifest_path, path)
    details = unpack(found.unseal(key), path)
    names = {member.name for member in opened.members}
    missing = sorted(details.keys() - names)
    if missing:
        raise InputError("a locked component is missing", where=opened.root, got=", ".join(missing))
    altered: list[str] = []
    for member in opened.members:
        detail, part = details.get(member.name), found.components.get(member.name)
        if detail is None or part is None:
            member.reason = "it was not locked"
            if part is not None:
                altered += _differing_files(member.source.root, part, member.name)
            continue
        changed = _differing_layout(member, part, opened.single_file)
        altered += changed
        shapes = {name: info.shape for name, info in member.source.tensors.items()}
        # Another head than it was locked with is a change like others: what no site acts on is left as it is.
        member.match = match_spec(detail.spec, shapes, {}, str(member.source.root), whole=False)
        draw(member, found.method, key, found.salt, found.options, recorded=detail.recorded)
        if not changed and not (accept and detail.headers and _differing_tensors(member.source, part)):
            _restore(member, detail, opened.single_file)
    if opened.pipeline is not None and "." in found.components:
        altered += _differing_files(opened.root, found.components["."], ".")
    if altered and not accept:
        raise _changed(opened.root, altered)
    return Prepared(found, path, tuple(altered))


def _check_same_lock(given: Manifest, own: Path, path: Path) -> None:
    """Refuse the manifest of another lock where the model has one of its own: undoing that one would scramble it."""
    try:
        salt = Manifest.read(own).salt
    except InputError:
        return  # it is damaged: that may be why another one was given
    if salt != given.salt:
        raise InputError(
            "the model has a manifest of its own, of another lock", where=own, got=f"{path} by --manifest",
            hint="leave --manifest out; if the weights are of that lock after all, remove their own manifest",
        )  # fmt: skip


def _restore(member: Member, detail: Detail, single_file: bool) -> None:
    """Bring back the dtypes, headers and files that the lock changed."""
    headers = dict(detail.headers)
    if single_file and headers:
        headers = {member.shards[0].file: next(iter(headers.values()))}
    member.shards = [
        shard_of_header(shard.file, headers[shard.file]) if shard.file in headers else shard
        for shard in member.shards
    ]
    member.files = dict(detail.files)


def _differing_layout(member: Member, part: Component, single_file: bool) -> list[str]:
    """Shards, names of tensors and other files that are not what was locked."""
    prefix = "" if member.name == "." else f"{member.name}/"
    now = {shard.file: hashlib.sha256(shard.header).hexdigest() for shard in member.source.shards}
    then = dict(part.shards)
    if single_file and len(now) == len(then) == 1:  # it may have another name by now
        now = dict(zip(then, now.values(), strict=True))
    found = [
        f"{prefix}{file} (header)"
        for file in sorted(now.keys() | then.keys())
        if now.get(file) != then.get(file)
    ]
    found += [f"{prefix}{name}" for name in sorted(member.source.tensors.keys() ^ part.tensors.keys())]
    return found + ([] if single_file else _differing_files(member.source.root, part, member.name))


def _differing_files(root: Path, part: Component, name: str) -> list[str]:
    """Other files that are not what was locked; documents may change."""
    prefix = "" if name == "." else f"{name}/"
    there = walk(root).files
    return [
        f"{prefix}{file}"
        for file, digest in part.files.items()
        if not _DOCUMENT.search(file) and (file not in there or hash_file(root / file) != digest)
    ]


def _differing_tensors(source: Checkpoint, part: Component) -> list[str]:
    """Tensors whose bytes are not what was locked."""
    found = []
    for name, info in source.tensors.items():
        digest = hashlib.sha256()
        for start in range(0, info.nbytes, _CHUNK):
            digest.update(source.read_bytes(name, start, min(start + _CHUNK, info.nbytes)))
        if part.tensors.get(name) != digest.hexdigest():
            found.append(name)
    return found


def _differing(member: Member, part: Component, outcomes: Mapping[str, Outcome]) -> list[str]:
    """Tensors whose bytes, hashed as they were read, are not what was locked."""
    prefix = "" if member.name == "." else f"{member.name}/"
    read = {outcome.source: outcome.sha256 for outcome in outcomes.values()}
    return [
        f"{prefix}{name}"
        for name in sorted(read)
        if name in part.tensors and read[name] != part.tensors[name]
    ]


def _changed(root: Path, altered: list[str]) -> InputError:
    shown = ", ".join(altered[:_SHOWN]) + (
        f" and {len(altered) - _SHOWN} more" if len(altered) > _SHOWN else ""
    )
    return InputError(
        "the model is not what was locked: it was altered, damaged or trained since",
        where=root,
        got=shown,
        hint="if you trained it after locking, unlock with --accept-changed; else restore the locked files",
    )
