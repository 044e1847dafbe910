"""What a manifest carries for its owner alone: all that undoing a lock needs besides the key.

The spec with its sizes filled in, so that unlocking depends neither on the specs that a later release ships
nor on any model library; choices of the method that depended on the weights; and, where a lock changed the
dtype, the headers and files that it rewrote. Deflated JSON, sealed by `Manifest.seal`.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .checkpoint import Shard, TensorInfo
from .errors import InputError
from .match import Match
from .spec import AS_FOUND, Spec

VERSION = 1
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Detail:
    """One component's part.

    spec: proven sites, sizes as numbers, evidence left out. recorded: `Drawn.recorded`. headers: the source's
    shard headers by file, where they were changed. files: the source's other files that were rewritten.
    """

    spec: Spec
    recorded: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, bytes] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def concrete_spec(match: Match) -> Spec:
    """The spec of a match with every size as a number, but those that its tensors have: it needs no config any more."""
    data = match.spec.as_dict()
    data["evidence"] = {}
    for site, own in zip(data["sites"], match.spec.sites, strict=True):
        matched = next(one for one in match.sites if one.site is own)
        site["sizes"] = {
            dim: AS_FOUND if own.sizes[dim] == AS_FOUND else str(size) for dim, size in matched.sizes.items()
        }
        if own.only:
            every = [
                part.dims
                for parts in match.parts.values()
                for part in parts
                if match.sites[part.site].site is own
            ]
            site["only"] = {
                dim: " ".join(map(str, sorted({dims[dim] for dims in every}))) for dim in own.only
            }
        site["evidence"] = {}
    data["configs"], data["defaults"] = [], {}
    data["untouched"] = list(match.spec.untouched)  # what is known of the rest only checks a source
    return Spec.from_dict(data)


def pack(details: Mapping[str, Detail]) -> bytes:
    """The sealed part of a manifest in plain text."""
    components = {
        name: {
            "spec": detail.spec.as_dict(),
            "recorded": dict(detail.recorded),
            "headers": {file: _text(data) for file, data in detail.headers.items()},
            "files": {file: _text(data) for file, data in detail.files.items()},
        }
        for name, detail in details.items()
    }
    document = {"version": VERSION, "components": components}
    return zlib.compress(json.dumps(document, sort_keys=True, separators=(",", ":")).encode(), 9)


def unpack(data: bytes, where: object = None) -> dict[str, Detail]:
    """What `pack` was given.

    Raises:
        InputError: not that, or of a newer version.
    """
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(data, _MAX_BYTES)
        if not inflate.eof:
            raise ValueError("it does not end")
        document = json.loads(text)
        version, components = document["version"], document["components"]
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise InputError("the sealed part of the manifest is malformed", where=where, got=error) from None
    if version != VERSION:
        raise InputError(
            "locked with a newer format",
            where=where,
            expected=VERSION,
            got=version,
            hint="upgrade unmergeable",
        )
    try:
        return {
            name: Detail(
                Spec.from_dict(part["spec"], "the manifest's spec"),
                part["recorded"],
                {file: base64.b64decode(data) for file, data in part["headers"].items()},
                {file: base64.b64decode(data) for file, data in part["files"].items()},
            )
            for name, part in components.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            "the sealed part of the manifest is malformed", where=where, got=repr(error)
        ) from None


def shard_of_header(file: str, header: bytes) -> Shard:
    """The layout that a header says; for headers that were checked when they were sealed."""
    entries = json.loads(header[8:])
    metadata = entries.pop("__metadata__", {})
    infos = [
        TensorInfo(
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            file,
            *(len(header) + at for at in entry["data_offsets"]),
        )
        for name, entry in entries.items()
    ]
    return Shard(file, header, metadata, sorted(infos, key=lambda info: (info.start, info.stop)))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
