"""What a lock could do to a model: the sites, the group and the evidence at each, what is refused and why.

Only headers, the config and the manifest are read, and nothing is computed, unless the architecture has no
spec yet: then one is proven first.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .manifest import Manifest
from .match import Match
from .plan import ConfigLike, Opened, SpecLike, UnknownArchitecture, find_match, open_all

__all__ = ["ComponentReport", "Inspection", "LockedReport", "SiteReport", "inspect"]

DOCUMENT, DOCUMENT_VERSION = "unmergeable.inspect", 1


@dataclass(frozen=True)
class SiteReport:
    """One site of a spec on one model.

    Attributes:
        name: with its dims, as in "layers.{l}.qk".
        kind: qk, vo, mlp, heads or experts.
        group: the largest group that was proven for it.
        size: of the acted dim, for instance the width of a head.
        instances: how many of it the model has: its layers, usually.
        elements: elements drawn for each instance: one for every head, say.
        tensors: how many tensors of the model it moves.
        evidence: what the proof measured.
    """

    name: str
    kind: str
    group: str
    size: int
    instances: int
    elements: int
    tensors: int
    evidence: Mapping[str, Any]


@dataclass(frozen=True)
class ComponentReport:
    """One component of a checkpoint; a plain model has the one called ".".

    Attributes:
        passed_through: why a lock would copy it as it is; None for one that it can act on.
        architecture, layout: class that the spec was proven on, and its names: as it saves itself, or older.
        spec: SHA-256 of what the spec says.
        dtypes: number of tensors by dtype.
        parameters, acted_on: numbers in all tensors, and in those that some site moves.
        evidence: how the spec was proven: versions, forward passes, the errors that were measured.
        sites: in the order in which they are applied.
        refused: (site, reason) of what was looked at and is left alone.
        untouched: names of the tensors that no site moves.
    """

    name: str
    passed_through: str | None = None
    architecture: str = ""
    layout: str = ""
    spec: str = ""
    dtypes: Mapping[str, int] | None = None
    parameters: int = 0
    acted_on: int = 0
    evidence: Mapping[str, Any] = field(default_factory=dict)
    sites: tuple[SiteReport, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    untouched: tuple[str, ...] = ()


@dataclass(frozen=True)
class LockedReport:
    """The public facts of a locked model's manifest, as it claims them: only `verify -k` checks its MAC."""

    manifest: str
    method: str
    key: str
    domain: bool
    tool: str
    options: Mapping[str, Any]
    components: Mapping[str, bool]  # by name, whether it was locked rather than passed through


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found."""

    model: str
    files: int
    nbytes: int
    components: tuple[ComponentReport, ...]
    locked: LockedReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `unmergeable inspect --json`."""
        return {
            "document": DOCUMENT,
            "version": DOCUMENT_VERSION,
            "model": self.model,
            "files": self.files,
            "bytes": self.nbytes,
            "locked": None if self.locked is None else dict(vars(self.locked)),
            "components": [
                {
                    **vars(part),
                    "dtypes": dict(part.dtypes or {}),
                    "evidence": dict(part.evidence),
                    "sites": [{**vars(site), "evidence": dict(site.evidence)} for site in part.sites],
                    "refused": [{"site": site, "reason": reason} for site, reason in part.refused],
                    "untouched": list(part.untouched),
                }
                for part in self.components
            ],
        }


def inspect(
    model: str | os.PathLike[str],
    *,
    config: ConfigLike | None = None,
    spec: SpecLike | None = None,
) -> Inspection:
    """List where a lock can act on a model.

    Args:
        model: a folder as save_pretrained writes it, a .safetensors file, or a pipeline folder.
        config: takes the place of its config.json: fields, or a file of them.
        spec: takes the place of a shipped or proven one.

    Raises:
        InputError: the checkpoint or its manifest is damaged, or there is no spec for it and none was proven.
    """
    with ExitStack() as stack:
        opened = open_all(model, config, stack)
        shards = [shard for member in opened.members for shard in member.source.shards]
        return Inspection(
            model=str(opened.root),
            files=len(shards),
            nbytes=sum(shard.size for shard in shards),
            components=tuple(_components(opened, spec)),
            locked=_locked(opened.manifest_path),
        )


def _components(opened: Opened, spec: SpecLike | None) -> Iterator[ComponentReport]:
    for member in opened.members:
        try:
            yield _component(member.name, member.source, find_match(member.source, spec))
        except UnknownArchitecture as error:
            if opened.pipeline is None:
                raise
            yield ComponentReport(member.name, passed_through=error.what)
    with_weights = {member.name for member in opened.members}
    for part in opened.pipeline.components if opened.pipeline else ():
        if part.name not in with_weights:
            yield ComponentReport(part.name, passed_through="it has no weights")


def _component(name: str, source: Checkpoint, match: Match) -> ComponentReport:
    spec = match.spec
    sizes = {tensor: prod(info.shape) for tensor, info in source.tensors.items()}
    return ComponentReport(
        name=name,
        architecture=spec.architecture,
        layout=spec.layout,
        spec=spec.digest,
        dtypes=Counter(info.dtype for info in source.tensors.values()),
        parameters=sum(sizes.values()),
        acted_on=sum(size for tensor, size in sizes.items() if tensor in match.parts),
        evidence=dict(spec.evidence),
        sites=_sites(match),
        refused=tuple((refusal.site, refusal.reason) for refusal in spec.refused),
        untouched=tuple(tensor for tensor in sizes if tensor not in match.parts),
    )


def _sites(match: Match) -> tuple[SiteReport, ...]:
    moved = Counter(number for parts in match.parts.values() for number in {part.site for part in parts})
    return tuple(
        SiteReport(
            name=matched.site.name,
            kind=matched.site.kind,
            group=matched.site.group,
            size=matched.acted,
            instances=len(matched.instances),
            elements=prod(matched.batch),
            tensors=moved[number],
            evidence=matched.site.evidence,
        )
        for number, matched in enumerate(match.sites)
    )


def _locked(manifest_path: Path | None) -> LockedReport | None:
    if manifest_path is None:
        return None
    manifest = Manifest.read(manifest_path)
    return LockedReport(
        manifest=str(manifest_path),
        method=manifest.method,
        key=manifest.key,
        domain=manifest.domain,
        tool=manifest.tool,
        options=dict(manifest.options),
        components={name: part.spec is not None for name, part in manifest.components.items()},
    )
