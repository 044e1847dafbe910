"""Verify: is a locked checkpoint the same function as its source?

Structure, other files and hashes first; then, in one stream over both checkpoints, untouched tensors byte for
byte and the identities of every site (`identities`); with the key the signature, and the lock undone in
memory and compared with the source; where there is room, both models run side by side (`runtime`).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod

import numpy as np

from .certificate import Certificate, Check
from .checkpoint import TensorInfo, to_float32
from .checkpoint.numeric import bits_dtype
from .engine import HALF_STEP, HALF_ULP, Meter, Progress
from .errors import InputError, UsageError
from .identities import Component, components, natural
from .keys import Key, load_key
from .likeness import check_files, check_manifest, check_structure, labelled
from .manifest import Manifest
from .match import match_spec
from .plan import ConfigLike, Member, Opened, SpecLike, change_dtype, match_all, open_all
from .rounding import Finding
from .sealed import unpack
from .sketch import Noise, Sketch, sketch_tensor
from .undone import check_undone

__all__ = ["Certificate", "Check", "verify"]

RUN = ("auto", "always", "never")
_CHUNK = 1 << 20


def verify(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    key: Key | str | os.PathLike[str] | None = None,
    run: str = "auto",
    config: ConfigLike | None = None,
    spec: SpecLike | None = None,
    jobs: int = 2,
    progress: Progress | None = None,
    seed: int | None = None,
) -> Certificate:
    """Check that DST computes what SRC computes.

    Args:
        src, dst: the checkpoint before and after the lock: folders, single files or pipelines.
        key: also checks the manifest's signature, undoes the lock and compares with SRC.
        run: whether to load both models with the stock classes and compare their outputs: "auto" if torch and
            transformers are there and both fit in half of the memory, "always" or "never".
        config: takes the place of config.json, or is that of a single file.
        spec: takes the place of a shipped or proven one.
        jobs: threads.
        progress: called with bytes done, bytes in all, and a tensor's name.
        seed: of the random probes; drawn where none is given: what is known beforehand can be evaded.

    Returns: the certificate; a claim that fails is a certificate that does not hold, not an error.

    Raises:
        InputError: a checkpoint, manifest, spec or key that cannot be used.
        UsageError: options that make no sense.
        RunError: reading failed.
    """
    started = time.monotonic()
    if run not in RUN:
        raise UsageError("no such way to run the models", expected=" | ".join(RUN), got=run)
    if jobs < 1:
        raise UsageError("at least one job", got=jobs)
    secret = key if isinstance(key, Key) or key is None else load_key(key)
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    with ExitStack() as stack:
        before, after = open_all(src, config, stack), open_all(dst, config, stack)
        if (before.pipeline is None, before.single_file) != (after.pipeline is None, after.single_file):
            raise InputError(
                "a folder, a file and a pipeline cannot be compared", where=dst, expected=f"as {src}"
            )
        manifest = None if after.manifest_path is None else Manifest.read(after.manifest_path)
        if secret is not None:
            _check_key(secret, manifest, after)
        notes = _find_sites(before, manifest, spec, secret, after)
        if _pruned(manifest):
            notes.append(
                "the lock pruned weights: this is not the same function, and the checks say by how much"
            )
        checks, comparable = _outside(before, after, manifest)
        if comparable:
            meter = Meter(_nbytes(before, after, secret is not None), progress)
            seen = _stream(before, after, manifest, jobs, seed, meter)
            checks += _inside(before, after, manifest, seen)
            if secret is not None and manifest is not None:
                checks += check_undone(before, after, manifest, secret, jobs, meter)
            if run != "never":
                from .runtime import check_runtime

                checks += check_runtime(before, after, run, None if manifest is None else manifest.method)
        for opened in (before, after):
            for member in opened.members:
                member.source.check_unchanged()
    return Certificate(
        str(src),
        str(dst),
        None if manifest is None else manifest.method,
        tuple(checks),
        seed,
        time.monotonic() - started,
        {} if manifest is None else manifest.options,
        tuple(notes),
    )


def _check_key(key: Key, manifest: Manifest | None, after: Opened) -> None:
    if manifest is None:
        raise InputError("the model is not locked, there is no manifest", where=after.root)
    if manifest.key != key.id:
        raise InputError(
            "the model was locked with another key",
            where=after.manifest_path,
            expected=f"key {manifest.key}",
            got=f"key {key.id}",
            hint="give the key file that has this public id",
        )


def _find_sites(
    before: Opened, manifest: Manifest | None, spec: SpecLike | None, key: Key | None, after: Opened
) -> list[str]:
    """Lay the specs over the source's components, and its layouts as the lock planned them. Returns notes."""
    notes = []
    try:
        match_all(before, spec)
    except InputError:
        # the key's owner has the spec that was used: it is sealed in the manifest
        if (
            key is None
            or manifest is None
            or not key.check_mac(manifest.salt, manifest.payload(), manifest.mac)
        ):
            raise
        details = unpack(manifest.unseal(key), after.manifest_path)
        for member in before.members:
            if member.name in details:
                shapes = {name: info.shape for name, info in member.source.tensors.items()}
                member.match = match_spec(details[member.name].spec, shapes, {}, str(member.source.root))
        notes.append("the sites are those that the manifest keeps for the key's owner")
    for member in before.members:
        part = None if manifest is None else manifest.components.get(member.name)
        if part is not None and part.spec is None:
            member.match, member.reason = None, "it was not locked"
        own = None if member.match is None else member.match.spec.digest
        if part is not None and own is not None and not notes and part.spec != own:
            notes.append(f"{labelled(member, 'model')} was locked by another spec than it is verified by")
        if member.match is not None and manifest is not None and "dtype" in manifest.options:
            change_dtype(member, str(manifest.options["dtype"]))
    return notes


def _nbytes(before: Opened, after: Opened, undone: bool) -> int:
    old, new = (sum(i.nbytes for m in o.members for i in m.source.tensors.values()) for o in (before, after))
    return old + new + (new if undone else 0)


def _outside(before: Opened, after: Opened, manifest: Manifest | None) -> tuple[list[Check], bool]:
    structure, comparable = check_structure(before, after)
    if not comparable:
        return [structure], False
    return [structure, check_files(before, after)], True


# --- one pass over the tensors ------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What one pass over both checkpoints saw of a component.

    Attributes:
        hashes: SHA-256 of the destination's tensors by name.
        changed: untouched tensors whose bytes differ.
        untouched: how many tensors no site acts on.
        findings: by number of the site, with the place of its component in reading order.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    untouched: int = 0
    findings: dict[int, list[tuple[int, Finding]]] = field(default_factory=dict)


def _stream(
    before: Opened, after: Opened, manifest: Manifest | None, jobs: int, seed: int, meter: Meter
) -> dict[str, _Seen]:
    exact = None if manifest is None else manifest.method == "exact"
    seen = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for a, b in zip(before.members, after.members, strict=True):
                part = None if manifest is None else manifest.components.get(b.name)
                hashed = part is not None and bool(part.tensors)
                seen[a.name] = _member(a, b, exact, hashed, pool, seed, meter)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return seen


def _member(
    a: Member, b: Member, exact: bool | None, hashed: bool, pool: ThreadPoolExecutor, seed: int, meter: Meter
) -> _Seen:
    seen = _Seen()
    parts = components(a.match) if a.match is not None else []
    touched = {name for part in parts for name in part.names}
    norms = exact is not True

    def sketch(name: str) -> tuple[Sketch, Sketch, str]:
        assert a.match is not None
        axes = a.match.kept_axes(name)
        digest = hashlib.sha256() if hashed else None
        old = sketch_tensor(a.source, a.source.tensors[name], axes, seed=seed, norms=norms)
        on_bytes = None if digest is None else digest.update
        new = sketch_tensor(b.source, b.source.tensors[name], axes, seed=seed, norms=norms, on_bytes=on_bytes)
        meter.add(a.source.tensors[name].nbytes + b.source.tensors[name].nbytes, labelled(b, name))
        return old, new, digest.hexdigest() if digest is not None else ""

    def same(name: str) -> tuple[bool, str]:
        digest = hashlib.sha256() if hashed else None
        equal = _same_values(a, b, name, None if digest is None else digest.update)
        meter.add(a.source.tensors[name].nbytes + b.source.tensors[name].nbytes, labelled(b, name))
        return equal, digest.hexdigest() if digest is not None else ""

    rest = sorted(a.source.tensors.keys() - touched, key=natural)
    for number, (part, sketches) in enumerate(_ahead(pool, parts, sketch)):
        old = {name: found[0] for name, found in sketches.items()}
        new = {name: found[1] for name, found in sketches.items()}
        seen.hashes.update({name: found[2] for name, found in sketches.items()})
        for finding in _compare(part, old, new, exact, b):
            seen.findings.setdefault(finding.site, []).append((number, finding))
    tasks = [(name, pool.submit(same, name)) for name in rest]
    for name, task in tasks:
        equal, seen.hashes[name] = task.result()
        if not equal:
            seen.changed.append(name)
    seen.untouched = len(rest)
    return seen


def _ahead(
    pool: ThreadPoolExecutor, parts: list[Component], work: Callable[[str], tuple[Sketch, Sketch, str]]
) -> Iterator[tuple[Component, dict[str, tuple[Sketch, Sketch, str]]]]:
    """Sketches of one component after the other, while those of the next few are under way."""
    queue: list[tuple[Component, dict[str, Future[tuple[Sketch, Sketch, str]]]]] = []
    waiting = iter(parts)
    while True:
        while len(queue) < 4 and (part := next(waiting, None)) is not None:
            queue.append((part, {name: pool.submit(work, name) for name in part.names}))
        if not queue:
            return
        part, tasks = queue.pop(0)
        yield part, {name: task.result() for name, task in tasks.items()}


def _compare(
    part: Component, old: Mapping[str, Sketch], new: Mapping[str, Sketch], exact: bool | None, b: Member
) -> list[Finding]:
    """Identities: exact locks to 1e-10, dense ones to the noise of rounding, unknown ones to either."""
    noise = {name: _noise(b.source.tensors[name], part) for name in part.names}
    if exact is False:
        return part.compare(old, new, noise)
    found = part.compare(old, new)
    if exact is True or all(finding.held for finding in found):
        return found
    return part.compare(old, new, noise)


def _noise(info: TensorInfo, part: Component) -> Noise:
    kept = prod(info.shape[axis] for axis in part.match.kept_axes(info.name))
    return Noise(HALF_ULP[info.dtype], HALF_STEP[info.dtype], prod(info.shape) // max(kept, 1))


def _same_values(a: Member, b: Member, name: str, on_bytes: Callable[[memoryview], None] | None) -> bool:
    """Whether an untouched tensor has the same bytes, or after a change of dtype the same values."""
    old, new = a.source.tensors[name], b.source.tensors[name]
    widened = old.dtype != new.dtype
    item_old = bits_dtype(old.dtype).itemsize if widened else 1
    item_new = bits_dtype(new.dtype).itemsize if widened else 1
    count = old.nbytes // item_old
    step = _CHUNK // item_new
    equal = True
    for start in range(0, count, step):
        stop = min(start + step, count)
        first = a.source.read_bytes(name, start * item_old, stop * item_old)
        second = b.source.read_bytes(name, start * item_new, stop * item_new)
        if on_bytes is not None:
            on_bytes(second)
        one: np.ndarray = np.frombuffer(first, bits_dtype(old.dtype) if widened else np.uint8)
        if widened:
            one = to_float32(one, old.dtype).view(np.uint8)
        equal = equal and np.array_equal(one, np.frombuffer(second, np.uint8))
    return equal


# --- what it means ------------------------------------------------------------------------------------------


def _inside(
    before: Opened, after: Opened, manifest: Manifest | None, seen: Mapping[str, _Seen]
) -> list[Check]:
    if manifest is None:
        checks = [Check("manifest", None, detail="there is none: no hashes to compare with")]
    else:
        checks = [check_manifest(manifest, after, {name: part.hashes for name, part in seen.items()})]
    checks.append(_untouched(after, seen))
    for member in before.members:
        checks += _sites(member, seen[member.name], _pruned(manifest))
    return checks


def _pruned(manifest: Manifest | None) -> bool:
    return manifest is not None and bool(manifest.options.get("prune_rate"))


def _untouched(after: Opened, seen: Mapping[str, _Seen]) -> Check:
    changed = [labelled(member, name) for member in after.members for name in seen[member.name].changed]
    count = sum(part.untouched for part in seen.values())
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        what = f"{changed[0]}{more}: no site acts on it, and its bytes differ"
        return Check("untouched tensors", False, float(len(changed)), 0.0, what, changed[0])
    return Check("untouched tensors", True, 0.0, 0.0, f"{count} tensors, byte for byte")


def _sites(member: Member, seen: _Seen, pruned: bool) -> list[Check]:
    """One check a site: those that fail first, in the order of where they fail first, then the others."""
    if member.match is None:
        return []
    failing: list[tuple[int, Check]] = []
    holding: list[Check] = []
    for number, matched in enumerate(member.match.sites):
        found = seen.findings.get(number, [])
        if not found:
            continue
        site = matched.site
        worst = max((finding for _, finding in found), key=lambda finding: finding.measured / finding.bound)
        name, numbers = f"site {labelled(member, site.name)}", (worst.measured, worst.bound)
        about = f"{len(matched.instances)} × {site.group} on {matched.acted}"
        failed = [(place, finding) for place, finding in found if not finding.held]
        if not failed:
            label = labelled(member, worst.label)
            holding.append(Check(name, True, *numbers, f"{about}, worst at {label}", label))
            continue
        label = labelled(member, failed[0][1].label)
        detail = f"{label}: the first that differs, {len(failed)} of {len(found)} parts do; {about}"
        if pruned:
            detail = f"{label}: function changed by pruning: measured {worst.measured:.2g}; {about}"
        failing.append((failed[0][0], Check(name, False, *numbers, detail, label)))
    return [check for _, check in sorted(failing, key=lambda entry: entry[0])] + holding
