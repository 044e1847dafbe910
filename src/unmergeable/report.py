"""What a lock did, for the command line, for programs and for the record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .engine import HALF_ULP, Outcome
from .plan import Member, Opened

DOCUMENT, DOCUMENT_VERSION = "unmergeable.lock", 1


@dataclass(frozen=True)
class Plan:
    """What a manifest says about how the elements were drawn, and the owner's file of what is pruned."""

    method: str
    options: Mapping[str, Any]
    salt: bytes
    domain: bool
    kept: Path | None = None


@dataclass(frozen=True)
class SiteLock:
    """What was done at one site, over all of its instances.

    Attributes:
        component: "." or the folder of a pipeline's component.
        site, kind, group: as the spec has them.
        instances: how many of it the model has; acted: on how many of them the method acts.
        moved: the smallest measured ‖θ' − θ‖ / ‖θ‖ of an instance's weights, None if not measured (dry run).
    """

    component: str
    site: str
    kind: str
    group: str
    instances: int
    acted: int
    moved: float | None


@dataclass(frozen=True)
class LockReport:
    """What a lock did. `as_dict` is the JSON document.

    Attributes:
        rounding: largest relative rounding error of a transformed tensor, measured on a sample of its entries
            ("largest", in "tensor"), beside the largest that rounding to nearest can make in that dtype
            ("half_ulp"); "largest" is 0.0 where only bits were moved, None in a dry run.
        method_report: what the method has to say about its draw, by component.
        notes: sentences that the owner should read.
    """

    source: str
    destination: str
    key: str
    method: str
    options: Mapping[str, Any]
    domain: bool
    dry_run: bool
    manifest: str | None
    sites: tuple[SiteLock, ...]
    refused: tuple[tuple[str, str, str], ...]
    passed_through: Mapping[str, str]
    tensors_changed: int
    tensors_untouched: int
    rounding: Mapping[str, Any]
    nbytes: int
    seconds: float
    method_report: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `unmergeable lock --json`."""
        return {
            "document": DOCUMENT,
            "version": DOCUMENT_VERSION,
            "source": self.source,
            "destination": self.destination,
            "key": self.key,
            "method": self.method,
            "options": dict(self.options),
            "domain": self.domain,
            "dry_run": self.dry_run,
            "manifest": self.manifest,
            "sites": [dict(vars(site)) for site in self.sites],
            "refused": [{"component": c, "site": site, "reason": reason} for c, site, reason in self.refused],
            "passed_through": dict(self.passed_through),
            "tensors": {"changed": self.tensors_changed, "untouched": self.tensors_untouched},
            "rounding": dict(self.rounding),
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "method_report": dict(self.method_report),
            "notes": list(self.notes),
        }


def lock_report(
    opened: Opened,
    dst: Path,
    key: str,
    plan: Plan,
    manifest: Path | None,
    outcomes: Mapping[str, Mapping[str, Outcome]],
    moved: Mapping[str, Mapping[int, float | None]],
    started: float,
    *,
    dry_run: bool = False,
) -> LockReport:
    sites, refused, notes = [], [], []
    changed = untouched = 0
    rounding: dict[str, Any] = {"largest": None if dry_run else 0.0, "half_ulp": None, "tensor": None}
    for member in opened.members:
        if member.match is None or member.drawn is None:
            notes.append(f"the component {member.name} is not locked, only copied: {member.reason}")
            continue
        touched = [name for name in member.source.tensors if _acts(member, name)]
        changed += len(touched)
        untouched += len(member.source.tensors) - len(touched)
        for number, matched in enumerate(member.match.sites):
            site = matched.site
            acted = sum((number, instance) in member.drawn.elements for instance in matched.instances)
            smallest = moved.get(member.name, {}).get(number)
            sites.append(
                SiteLock(
                    member.name, site.name, site.kind, site.group, len(matched.instances), acted, smallest
                )
            )
        refused += [(member.name, refusal.site, refusal.reason) for refusal in member.match.spec.refused]
        for shard in member.shards:
            for info in shard.tensors:
                outcome = outcomes.get(member.name, {}).get(info.name)
                if outcome is not None and outcome.rounding > rounding["largest"]:
                    rounding = {
                        "largest": outcome.rounding,
                        "half_ulp": HALF_ULP[info.dtype],
                        "tensor": info.name if member.name == "." else f"{member.name}/{info.name}",
                    }
        if member.source.converted:
            files = ", ".join(shard.file for shard in member.shards)
            notes.append(f"the pickle weights were converted: they are written as {files}")
    if any(member.drawn is not None and member.drawn.prune for member in opened.members):
        lost = "what was pruned is lost: unlocking leaves it pruned, keep the source"
        kept = f"what was pruned is kept in {plan.kept}: it helps a thief, keep it with the key"
        notes += [
            "pruning changes the function: verify reports by how much",
            lost if plan.kept is None else kept,
        ]
    for member in opened.members:
        share = member.drawn.report.get("coordinates that can take powers of two") if member.drawn else None
        if share is not None and share < 0.5:
            notes.append(
                f"only {share:.0%} of the coordinates can take a power of two without loss in this dtype: "
                "the others have none"
            )
    if plan.domain:
        notes.append(
            "models of one domain can be merged with each other without the key by whoever has two: "
            "publish none of them, and no base of theirs that was locked in it"
        )
    return LockReport(
        source=str(opened.root),
        destination=str(dst),
        key=key,
        method=plan.method,
        options=plan.options,
        domain=plan.domain,
        dry_run=dry_run,
        manifest=None if manifest is None else str(manifest),
        sites=tuple(sites),
        refused=tuple(refused),
        passed_through={m.name: m.reason or "" for m in opened.members if m.passed},
        tensors_changed=changed,
        tensors_untouched=untouched,
        rounding=rounding,
        nbytes=sum(s.size for m in opened.members for s in m.shards),
        seconds=time.monotonic() - started,
        method_report={
            m.name: dict(m.drawn.report) for m in opened.members if m.drawn is not None and m.drawn.report
        },
        notes=tuple(notes),
    )


def _acts(member: Member, name: str) -> bool:
    """Whether some element acts on a tensor."""
    assert member.match is not None
    assert member.drawn is not None
    return name in member.drawn.prune or any(
        (part.site, tuple(part.dims[dim] for dim in member.match.sites[part.site].site.name_dims))
        in member.drawn.elements
        for part in member.match.parts.get(name, ())
    )
