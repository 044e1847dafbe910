"""Attacks from checkpoint to checkpoint: open both models, run, write the result, measure the distance."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import (
    Checkpoint,
    ShardWriter,
    StagedFile,
    Staging,
    TensorInfo,
    check_destination,
    copy_side_files,
    is_float,
    is_pipeline,
    open_checkpoint,
    to_bits,
    to_float64,
)
from ..engine import check_range
from ..errors import InputError, UsageError
from ..execute import apply_plan
from ..groups import Floats
from ..match import Match
from ..options import check_seed
from ..plan import ConfigLike, SpecLike, find_match, read_config
from ..transform import Array, compile_tensor
from . import NEEDS, AttackReport, Case, Outcome, Progress, attack_named

Path_ = str | os.PathLike[str]


class Stored(Mapping[str, Floats]):
    """Tensors of a checkpoint as float64, read when they are asked for.

    Args:
        source: the checkpoint.
        names: its name for each name that it is asked by; None for its own.
    """

    def __init__(self, source: Checkpoint, names: Mapping[str, str] | None = None) -> None:
        self._source = source
        self._names = {name: name for name in source.tensors} if names is None else names

    def __getitem__(self, name: str) -> Floats:
        own = self._names[name]
        info = self._source.tensors[own]
        if not is_float(info.dtype):
            raise InputError("not a floating-point tensor", where=own, got=info.dtype)
        return to_float64(self._source.read(own), info.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def attack_files(
    name: str,
    target: Path_,
    dst: Path_,
    *,
    base: Path_ | None,
    anchor: Path_ | None,
    seed: int,
    config: ConfigLike | None,
    spec: SpecLike | None,
    progress: Progress | None,
    options: Mapping[str, Any],
) -> AttackReport:
    """As `attacks.attack`."""
    started = time.monotonic()
    check_seed(seed)
    chosen = attack_named(name)
    other = _other(name, chosen.needs, base, anchor)
    with ExitStack() as stack:
        source = stack.enter_context(_open(target, read_config(config)))
        check_destination(source.root, dst, source.nbytes)
        match = find_match(source, spec)
        names: dict[str, str] | None = None
        compared: Stored | None = None
        if other is not None:
            found = stack.enter_context(_open(other, None))
            names = anchor_names(match, source, found)
            compared = Stored(found, names)
        case = Case(match, Stored(source), compared, seed, progress)
        outcome = chosen.run(case, **options)
        measured = _write(source, Path(dst), case, outcome)
    return AttackReport(
        attack=name,
        target=str(target),
        destination=str(dst),
        anchor=None if other is None else str(other),
        needs=chosen.needs,
        access=chosen.access,
        cost=chosen.cost,
        budget=chosen.budget,
        keeps_function=chosen.keeps_function,
        seed=seed,
        seconds=time.monotonic() - started,
        before=measured.distance(0),
        after=measured.distance(1),
        changed=measured.changed,
        facts=outcome.facts,
    )


def _other(name: str, needs: tuple[str, ...], base: Path_ | None, anchor: Path_ | None) -> Path_ | None:
    """The model that an attack holds beside the target."""
    if "base" in needs:
        if base is None:
            raise UsageError(f"{name} needs the base", hint="give --base")
        return base
    if "anchor" in needs and anchor is None and base is None:
        raise UsageError(f"{name} needs an anchor", expected=NEEDS["anchor"], hint="give --base or --anchor")
    return base if anchor is None else anchor


def _open(path: Path_, config: dict[str, Any] | None) -> Checkpoint:
    if is_pipeline(Path(path)):
        raise InputError(
            "a pipeline cannot be attacked as a whole", where=path, hint="name one of its components"
        )
    return open_checkpoint(path, config=config)


def anchor_names(match: Match, source: Checkpoint, anchor: Checkpoint) -> dict[str, str]:
    """The anchor's name for each of the target's tensors that it has, with or without the model's own prefix.

    Raises:
        InputError: the anchor lacks a tensor of a site, or has it in another shape.
    """
    prefix = match.spec.prefix
    found: dict[str, str] = {}
    for name in source.tensors:
        bare = name.removeprefix(prefix) if prefix else name
        known = [other for other in (name, bare, prefix + name) if other in anchor.tensors]
        if known:
            found[name] = known[0]
    for name in match.parts:
        expected = source.tensors[name].shape
        if name not in found:
            hint = "give the base, or another fine-tune of it, in the same layout of names"
            raise InputError("the anchor lacks a tensor", where=f"{anchor.root}: {name}", hint=hint)
        if anchor.tensors[found[name]].shape != expected:
            raise InputError(
                "the anchor has another shape here",
                where=f"{anchor.root}: {name}",
                expected=list(expected),
                got=list(anchor.tensors[found[name]].shape),
                hint="give the base, or another fine-tune of it",
            )
    return found


class _Measured:
    """Squares of distances to the anchor, before and after, over the tensors of all sites."""

    def __init__(self) -> None:
        self.squares = [0.0, 0.0]
        self.norm = 0.0
        self.changed = 0

    def add(self, before: Floats, after: Floats, anchor: Floats) -> None:
        self.norm += float((anchor**2).sum())
        for k, values in enumerate((before, after)):
            self.squares[k] += float(((values - anchor) ** 2).sum())

    def distance(self, which: int) -> float | None:
        return float(np.sqrt(self.squares[which] / self.norm)) if self.norm else None


def _write(source: Checkpoint, dst: Path, case: Case, outcome: Outcome) -> _Measured:
    """The target's files with the attacked tensors in them, and the distances."""
    measured = _Measured()
    staging = StagedFile(dst) if source.single_file else Staging(dst)
    with staging as staged:
        if not source.single_file:
            copy_side_files(
                source.root, source.side_files, source.side_folders, source.generated, staged.path
            )
        for shard in source.shards:
            path = staged.path if source.single_file else staged.path / shard.file
            with ShardWriter(path, shard.header, shard.size) as writer:
                for info in shard.tensors:
                    bits = np.ascontiguousarray(_made(source, info, case, outcome, measured))
                    writer.write_at(info.start, bits.reshape(-1).data)
        source.check_unchanged()
        staged.commit()
    return measured


def _made(source: Checkpoint, info: TensorInfo, case: Case, outcome: Outcome, measured: _Measured) -> Array:
    before = source.read(info.name)
    after = before
    if outcome.elements is not None:
        plan = compile_tensor(case.match, outcome.elements, info.name, undo=True)
        stored = source.tensors[plan.source]
        bits = before if plan.source == info.name else source.read(plan.source)
        after = apply_plan(bits, plan, stored.dtype, info.dtype)
        if not plan.exact:
            check_range(after, info.dtype, info.name)
    elif outcome.replace is not None and (values := outcome.replace(info.name)) is not None:
        after = to_bits(values, info.dtype)
        check_range(after, info.dtype, info.name)
    measured.changed += not np.array_equal(before, after)
    if case.anchor is not None and info.name in case.match.parts and is_float(info.dtype):
        old, new = to_float64(before, info.dtype), to_float64(after, info.dtype)
        measured.add(old, new, case.anchor[info.name])
    return after
