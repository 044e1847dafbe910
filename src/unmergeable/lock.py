"""Lock: rewrite a checkpoint with secret transformations that leave its function as it is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from . import __version__
from .checkpoint import MANIFEST, Checkpoint, StagedFile, Staging, check_destination, open_checkpoint
from .engine import Meter, Progress
from .errors import ClaimError, InputError, UsageError
from .keys import Key, domain_salt, fresh_salt, load_key
from .manifest import Manifest
from .methods import METHODS
from .methods.context import CONDITION, MIN_MOVE
from .movement import Movement
from .output import manifest_components, rename_single, staging, write_members
from .plan import ConfigLike, Member, Opened, SpecLike, change_dtype, draw, match_all, open_all
from .preflight import check_exchanged, check_keys, check_not_locked
from .report import LockReport, Plan, SiteLock, lock_report
from .sealed import Detail, concrete_spec, pack

__all__ = ["LockReport", "SiteLock", "lock"]


def lock(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    key: Key | str | os.PathLike[str],
    method: str = "exact",
    scales: bool = False,
    domain: str | None = None,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    prune_rate: float | None = None,
    keep_pruned: str | os.PathLike[str] | None = None,
    condition: float = CONDITION,
    config: ConfigLike | None = None,
    spec: SpecLike | None = None,
    jobs: int = 2,
    dry_run: bool = False,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
    salt: bytes | None = None,
) -> LockReport:
    """Lock a checkpoint: DST computes what SRC computes and is undone by the key alone.

    Args:
        src: a folder as save_pretrained writes it, a .safetensors file, or a pipeline folder; never changed.
        dst: the new folder or file; it appears whole or not at all.
        key: the owner's key, or its file.
        method: one of `METHODS`.
        scales: `exact` also draws power-of-two scales, where they lose nothing.
        domain: models locked under one domain name stay mergeable with each other.
        base: the model that `params` moves away from.
        dtype: "float32" stores all floating-point tensors in that dtype.
        prune_rate: part of the MLP weights that `params` drops.
        keep_pruned: a new file for what was dropped, private to the owner; without it, it is lost.
        condition: cap on the condition number of dense elements.
        config: takes the place of config.json, or is that of a single file.
        spec: takes the place of a shipped or proven one.
        jobs: threads; the bytes do not depend on it.
        dry_run: plan and report, write nothing.
        progress: called with bytes done, bytes in all, and a tensor's name.
        options: further options of the method.
        salt: 32 bytes, to repeat a lock; random if not given.

    Raises:
        UsageError: options that contradict each other.
        InputError: a source, key, base or destination that cannot be used.
        ClaimError: a site could not be moved far enough.
        RunError: reading or writing failed. Nothing is left at DST in any of these cases.
    """
    started = time.monotonic()
    key = key if isinstance(key, Key) else load_key(key)
    settings = method_options(method, scales=scales, condition=condition, prune_rate=prune_rate, more=options)
    _check_usage(method, base, domain, salt, jobs)
    if keep_pruned is not None and not prune_rate:
        raise UsageError("nothing is pruned that could be kept", where=keep_pruned)
    kept = None if keep_pruned is None else Path(keep_pruned)
    with ExitStack() as stack:
        opened = open_all(src, config, stack)
        check_not_locked(opened)
        match_all(opened, spec)
        if dtype is not None:
            settings = {**settings, "dtype": dtype}
            for member in opened.members:
                if not member.passed:
                    change_dtype(member, dtype)
        if not dry_run:
            check_destination(opened.root, dst, opened.nbytes)
            if kept is not None:
                _check_kept(kept, opened.root, Path(dst))
        if salt is None:
            salt = fresh_salt() if domain is None else domain_salt(domain, key)
        for member in opened.members:
            if not member.passed:
                compared = None if base is None else _open_base(base, member, stack)
                draw(member, method, key, salt, settings, source=member.source, base=compared)
        plan = Plan(method, settings, salt, domain is not None, kept)
        return write_lock(opened, Path(dst), key, plan, jobs, progress, dry_run=dry_run, started=started)


def method_options(
    method: str,
    *,
    scales: bool = False,
    condition: float = CONDITION,
    prune_rate: float | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The options that a method reads, as the manifest records them.

    Raises:
        UsageError: no such method, or an option that the method does not have.
    """
    if method not in METHODS:
        raise UsageError("no such method", where=f"'{method}'", expected=" | ".join(METHODS))
    settings: dict[str, Any] = dict(more or {})
    if scales:
        if method != "exact":
            raise UsageError("--scales belongs to the method exact", got=method)
        settings["scales"] = True
    if prune_rate is not None:
        if method != "params":
            raise UsageError("--prune-rate belongs to the method params", got=method)
        settings["prune_rate"] = prune_rate
    if "form" in settings and method != "params":
        raise UsageError("--form belongs to the method params", got=method)
    if method != "exact":
        if not 1 < condition <= 1e6:
            raise UsageError(
                "the cap on condition numbers is out of range", expected="1 to 1e6", got=condition
            )
        settings["condition"] = condition
    elif condition != CONDITION:
        raise UsageError("--condition belongs to the methods that compute", got=method)
    return settings


def _check_usage(method: str, base: object, domain: str | None, salt: bytes | None, jobs: int) -> None:
    if base is not None and method != "params":
        raise UsageError("--base belongs to the method params", got=method)
    if domain is not None and salt is not None:
        raise UsageError("a domain has its own salt")
    if jobs < 1:
        raise UsageError("at least one job", got=jobs)


def _open_base(base: str | os.PathLike[str], member: Member, stack: ExitStack) -> Checkpoint:
    path = Path(base) if member.name == "." else Path(base, member.name)
    whole = Path(base) / MANIFEST
    found = stack.enter_context(open_checkpoint(path))
    if found.manifest_path is not None or whole.is_file():
        raise InputError("the base is locked", where=path, hint="give the base as it was published")
    return found


def write_lock(
    opened: Opened,
    dst: Path,
    key: Key,
    plan: Plan,
    jobs: int,
    progress: Progress | None,
    *,
    dry_run: bool = False,
    started: float,
) -> LockReport:
    """Write what was planned, measure it, sign the manifest, and publish the destination.

    Raises: as `lock`.
    """
    check_keys(opened)
    check_exchanged(opened)
    if dry_run:
        return lock_report(opened, dst, key.id, plan, None, {}, {}, started, dry_run=True)
    rename_single(opened, dst)
    meter = Meter(sum(info.nbytes for m in opened.members for s in m.shards for info in s.tensors), progress)
    with staging(opened, dst) as staged:
        movement = {
            m.name: Movement(m.match, m.drawn.elements)
            for m in opened.members
            if m.match is not None and m.drawn is not None
        }
        outcomes = write_members(opened, staged, workers=jobs, meter=meter, movement=movement)
        moved = {m.name: _smallest(m, movement[m.name]) for m in opened.members if not m.passed}
        manifest = Manifest(
            tool=__version__,
            key=key.id,
            method=plan.method,
            salt=plan.salt,
            components=manifest_components(opened, staged, outcomes),
            options=plan.options,
            domain=plan.domain,
        )
        manifest = manifest.seal(key, pack(_details(opened))).sign(key)
        path = staged.manifest_path if isinstance(staged, StagedFile) else staged.path / MANIFEST
        manifest.write(path)
        with _kept(opened, plan, staged):
            staged.commit()
    where = dst.with_name(path.name) if opened.single_file else dst / path.name
    return lock_report(opened, dst, key.id, plan, where, outcomes, moved, started)


def _check_kept(path: Path, src: Path, dst: Path) -> None:
    """The owner's file must not lie where it would be published."""
    if dst.resolve() in [path.resolve(), *path.resolve().parents]:
        raise InputError("what is pruned would be published with the locked model", where=path)
    check_destination(src, path, 0)


@contextmanager
def _kept(opened: Opened, plan: Plan, staged: Staging) -> Iterator[None]:
    """Write the owner's file of what is pruned; remove it again where the lock does not come about.

    One that is published stays one, whatever fails after that.
    """
    if plan.kept is None:
        yield
        return
    from .methods.sidecar import write_sidecar

    parts = [(m.name, m.source, m.drawn.prune) for m in opened.members if m.drawn is not None]
    write_sidecar(plan.kept, plan.salt, parts)
    try:
        yield
    except BaseException:
        if not staged.committed and not os.path.lexists(staged.dst):
            os.unlink(plan.kept)
        raise


def _smallest(member: Member, movement: Movement) -> dict[int, float | None]:
    """The smallest movement of an instance of every site.

    Raises:
        ClaimError: an instance whose weights moved by less than half of their norm.
    """
    assert member.match is not None
    smallest: dict[int, float | None] = {}
    for (number, instance), moved in movement.measured().items():
        if moved is not None and moved < MIN_MOVE:
            raise ClaimError(
                "the weights hardly moved: merges would still work",
                where=member.match.sites[number].label(instance),
                expected=f"a movement of at least {MIN_MOVE:.0%} of their norm",
                got=f"{moved:.1%}",
            )
        before = smallest.get(number)
        smallest[number] = moved if before is None else min(before, moved or before)
    return smallest


def _details(opened: Opened) -> dict[str, Detail]:
    details = {}
    for member in opened.members:
        if member.match is None or member.drawn is None:
            continue
        details[member.name] = Detail(
            concrete_spec(member.match), member.drawn.recorded, member.headers, member.originals
        )
    return details
