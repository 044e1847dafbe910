"""Before a lock is written: what must not be locked, or be published with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import MANIFEST
from .checkpoint.files import walk
from .errors import InputError
from .keys import holds_key
from .match import Match
from .plan import Opened

__all__ = ["check_alike", "check_exchanged", "check_keys", "check_not_locked"]


def check_keys(opened: Opened) -> None:
    """Refuse to publish a key: files beside the weights go where the locked model goes.

    Raises:
        InputError: one of them holds a key, with a passphrase or without.
    """
    for path in _copied(opened):
        if holds_key(path):
            raise InputError(
                "a key lies in the model's folder, and would be published with the locked model",
                where=path,
                hint="move it out of the folder",
            )


def _copied(opened: Opened) -> Iterator[Path]:
    """Every file that is copied as it is."""
    if opened.pipeline is not None:
        yield from (opened.root / name for name in opened.pipeline.side_files)
    for member in opened.members:
        root = member.source.root
        names = walk(root).files if member.passed else member.source.side_files
        yield from (root / name for name in names)


def check_not_locked(opened: Opened) -> None:
    """Refuse what is locked already: the whole, a part of it, or as a part of something.

    Raises:
        InputError: where its manifest is.
    """
    found = [opened.manifest_path, *(member.source.manifest_path for member in opened.members)]
    for path in [*found, _parents(opened)]:
        if path is not None:
            hint = "unlock it first, or merge locked models with `unmergeable merge -k`"
            raise InputError("the model is already locked", where=path, hint=hint)


def _parents(opened: Opened) -> Path | None:
    """The manifest of what this is a part of: of a pipeline, or of a folder with this file in it."""
    root = opened.root.absolute()
    path = root.parent / MANIFEST
    try:
        components = json.loads(path.read_text(encoding="utf-8"))["components"]
        found = components[root.name]["tensors"] if not opened.single_file else components["."]["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none, or none of ours
    return path if found and (not opened.single_file or root.name in found) else None


def check_exchanged(opened: Opened) -> None:
    """Refuse tensors of different dtypes that a lock would write into each other's places.

    Raises:
        InputError: two of them, as they are to be written.
    """
    for member in opened.members:
        if member.match is not None:
            check_alike(member.match, {one.name: one.dtype for s in member.shards for one in s.tensors})


def check_alike(match: Match, dtypes: Mapping[str, Any]) -> None:
    """As `check_exchanged`, of tensors by their names."""
    alike: dict[tuple[Any, ...], str] = {}
    for name, parts in match.parts.items():
        for part in parts:
            site = match.sites[part.site].site
            if site.acts not in part.slot.name_dims:
                continue
            others = tuple(sorted((dim, at) for dim, at in part.dims.items() if dim != site.acts))
            first = alike.setdefault((part.site, part.slot.tensor, others), name)
            if dtypes[first] != dtypes[name]:
                raise InputError(
                    f"tensors that {site.name} exchanges have different dtypes",
                    where=name,
                    expected=f"{dtypes[first]}, as {first}",
                    got=str(dtypes[name]),
                    hint="store them in one dtype: --dtype float32, or lock what was converted before",
                )
