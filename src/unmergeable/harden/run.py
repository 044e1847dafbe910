"""The verb `harden`, from paths to a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from ..audit.init import kind_of
from ..audit.scores import check_separation, separation
from ..checkpoint import Staging, check_destination, open_checkpoint
from ..checkpoint.files import load_json
from ..errors import ClaimError, InputError, UsageError
from ..merging.tensors import load_state
from ..merging.vectors import WEIGHTS, is_adapter
from ..merging.write import write_merged
from ..stock import quiet
from . import HardenReport, Progress
from .directions import check_made
from .measure import Measure
from .objectives import Objective
from .objectives import objective as objective_of
from .owner import KINDS, Owner
from .search import lost, search
from .train import Settings

if TYPE_CHECKING:
    import torch

    from ..keys import Key

# By kind of task: what a training is, unless it is asked for otherwise.
DEFAULTS = {
    "image-classification": Settings(strength=0.15, steps=300, rate=3e-4, batch=64),
    "text-classification": Settings(strength=0.15, steps=300, rate=1e-4, batch=32),
    "sequence-to-sequence": Settings(strength=0.3, steps=600, rate=3e-4, batch=16),
    "language-modelling": Settings(strength=0.3, steps=1000, rate=5e-4, batch=16),
}
SUFFIX = ".hardening"
MAY = 0.1  # of the task, that simulated merges keep on average
PRECISIONS = ("auto", "fp32", "bf16")


def run_harden(
    expert: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    data: str | os.PathLike[str],
    task: str | None,
    fields: Mapping[str, Any] | None,
    proxies: Sequence[str | os.PathLike[str]],
    made: Sequence[str] | None,
    objective: str | Objective,
    strength: float | None,
    max_loss: float | None,
    may: float | None,
    steps: int | None,
    rate: float | None,
    batch: int | None,
    seed: int,
    lock: Key | None,
    device: str,
    precision: str,
    checkpointing: bool,
    progress: Progress | None,
) -> HardenReport:
    """As `harden`."""
    began = time.monotonic()
    chosen = objective_of(objective) if isinstance(objective, str) else objective
    source, target = Path(expert), Path(dst)
    adapter = is_adapter(source)
    if adapter and lock is not None:
        what = "an adapter cannot be locked: it would no longer fit its base"
        raise UsageError(what, where="lock", hint="fold it into its base, harden that, and lock it")
    if precision not in PRECISIONS:
        raise UsageError(
            "no such precision", where="precision", expected=" | ".join(PRECISIONS), got=precision
        )
    kind = _kind(Path(base) if adapter else source, task)
    settings = _settings(kind, strength, steps, rate, batch, seed)
    settings = replace(settings, may=_may(may, strength, max_loss, chosen))
    if made is not None:
        settings = replace(settings, made=_made(made, proxies))
    if max_loss is not None and not max_loss >= 0:
        raise UsageError("no loss that can be allowed", where="max_loss", expected="0 or more", got=max_loss)
    if source.is_file():
        what = "a file of weights cannot be trained by itself"
        raise InputError(what, where=source, expected="a model's folder")
    if adapter:
        check_destination(source, target, sum(one.stat().st_size for one in source.iterdir()))
    else:
        with open_checkpoint(source) as checkpoint:
            check_destination(checkpoint.root, target, checkpoint.nbytes)
    written = {"kind": kind, "data": str(data), **dict(fields or {})}
    progress_folder = target.with_name(target.name + SUFFIX)
    folder = progress_folder / _digest(source, base, written, proxies, chosen)
    with (
        _accelerating(device, precision) as accelerator,
        tempfile.TemporaryDirectory(prefix="unmergeable-harden-") as work,
    ):
        owner = Owner(source, Path(base), written, [Path(path) for path in proxies], Path(work), accelerator)
        if checkpointing:
            _checkpoint(owner.module)
        measure = Measure(owner, settings.made)
        check_separation({owner.task.name: separation(measure.base_scores, measure.before_scores)})
        exposed = measure.exposure()
        trials, state = search(owner, chosen, settings, accelerator, measure, max_loss, folder, progress)
        if state is None:
            least = min(trials, key=lambda one: one.loss)
            raise ClaimError(
                "no strength that was tried keeps the score",
                where=str(source),
                expected=f"a loss of at most {max_loss:g}",
                got=f"{least.loss:.3g} at strength {least.strength:.3g}",
                hint="nothing was written; allow more, or give more data or steps",
            )
        owner.weights.load(state)
        _write(owner, source, target, Path(work), lock)
    shutil.rmtree(progress_folder, ignore_errors=True)
    taken = min((one for one in trials if one.allowed), key=lambda one: one.exposure.mean)
    return HardenReport(
        expert=str(expert),
        base=str(base),
        dst=str(dst),
        data=str(data),
        proxies=tuple(map(str, proxies)),
        made=settings.made,
        objective=chosen.name,
        strength=taken.figures["strength"],
        may=settings.may,
        steps=settings.steps,
        rate=settings.rate,
        batch=settings.batch,
        seed=seed,
        metric=owner.task.metric,
        standalone={"before": measure.before, "after": taken.standalone},
        loss=lost(measure.before, taken.standalone),
        exposure={"before": asdict(exposed), "after": asdict(taken.exposure)},
        trials=[asdict(one) for one in trials],
        locked=None if lock is None else lock.id,
        examples={"training": len(owner.training), "held": len(owner.task)},
        seconds=time.monotonic() - began,
        device=str(owner.device),
    )


def _kind(model: Path, asked: str | None) -> str:
    kind = asked
    if kind is None and model.is_dir():
        kind = kind_of(load_json(model / "config.json"))
    if kind not in KINDS:
        expected = " | ".join(KINDS)
        raise UsageError("no kind of task that can be trained on", where="task", expected=expected, got=kind)
    return kind


def _settings(
    kind: str, strength: float | None, steps: int | None, rate: float | None, batch: int | None, seed: int
) -> Settings:
    given = {"strength": strength, "steps": steps, "rate": rate, "batch": batch}
    chosen = {**asdict(DEFAULTS[kind]), "seed": seed, **{n: v for n, v in given.items() if v is not None}}
    for name, value in given.items():
        if value is not None and not value > 0:
            raise UsageError("a number that must be above 0", where=name, got=value)
    if chosen["steps"] < 3:
        raise UsageError("too few steps for a training", where="steps", expected="3 or more", got=steps)
    return Settings(**{**chosen, "made": tuple(chosen["made"])})


def _may(
    asked: float | None, strength: float | None, max_loss: float | None, objective: Objective
) -> float | None:
    """What merges may keep: followed by itself where there is a trap, and nothing else was asked for."""
    if asked is None:
        trap = "trap" in objective.name.split("+")
        return MAY if trap and strength is None and max_loss is None else None
    if not 0 < asked < 1:
        raise UsageError("no part of a task", where="may", expected="above 0 and below 1", got=asked)
    if objective.name == "plain":
        raise UsageError("plain training has no strength to follow what merges keep", where="may", got=asked)
    if max_loss is not None:
        what = "a strength that follows what merges keep leaves nothing to search"
        raise UsageError(what, where="may", got=f"max_loss {max_loss:g}")
    return asked


def _made(made: Sequence[str], proxies: Sequence[object]) -> tuple[str, ...]:
    check_made(made)
    if not made and not proxies:
        raise UsageError(
            "nothing in the place of a thief's fine-tunes", hint="give proxies, or directions to make"
        )
    return tuple(made)


def _checkpoint(module: torch.nn.Module) -> None:
    """Keep no activations but those between blocks: less memory, a forward pass more.

    Raises:
        UsageError: the class does not know how.
    """
    found: Any = module
    if not getattr(found, "supports_gradient_checkpointing", False):
        got = type(module).__name__
        raise UsageError("a model without gradient checkpointing", where="checkpointing", got=got)
    # Weights are swapped in place between passes: what is computed again must be so before they are.
    found.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def _accelerating(device: str, precision: str) -> Iterator[Accelerator]:
    """Where, and in which precision: by itself, bf16 on a GPU that has it, float32 elsewhere.

    accelerate has one state a process: what is made here is gone afterwards, anybody else's is left as it is.

    Raises:
        UsageError: the process uses accelerate already, otherwise than this.
    """
    import torch
    from accelerate.state import AcceleratorState

    from ..audit.bench import pick_device

    placed = pick_device(device)
    able = placed.type == "cuda" and torch.cuda.is_bf16_supported()
    mixed = "bf16" if precision == "bf16" or (precision == "auto" and able) else "no"
    ours = not AcceleratorState._shared_state
    try:
        made = Accelerator(cpu=placed.type == "cpu", mixed_precision=mixed)
    except ValueError as error:
        raise UsageError(
            "this process uses accelerate already, with other settings",
            where="device, precision",
            got=error,
            hint="harden in a process of its own, or by `Hardening` in a loop of yours",
        ) from error
    try:
        yield made
    finally:
        if ours:
            AcceleratorState._reset_state(reset_partial_state=True)


def _digest(
    expert: Path, base: object, fields: Mapping[str, Any], proxies: Sequence[object], objective: Objective
) -> str:
    """Names a training by what it is of, so that none goes on from another's checkpoint."""
    stamps = []
    for path in (expert, base, fields["data"], *proxies):
        place = Path(str(path))
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        stamps += [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files if one.is_file()]
    facts = [str(expert), str(base), fields, list(map(str, proxies)), repr(objective), stamps]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _write(owner: Owner, source: Path, target: Path, work: Path, lock: Key | None) -> None:
    """The trained weights with the fine-tune's files, names and dtypes; locked, if there is a key."""
    module: Any = owner.module
    with quiet():
        module.save_pretrained(work / "saved")
    if owner.adapter:
        _write_adapter(work / "saved", source, target)
        return
    state: Mapping[str, torch.Tensor] = load_state(work / "saved")
    if lock is None:
        write_merged(target, state, source)
        return
    from ..lock import lock as lock_checkpoint

    write_merged(work / "hardened", state, source)
    lock_checkpoint(work / "hardened", target, key=lock)


def _write_adapter(saved: Path, source: Path, target: Path) -> None:
    """The adapter's files, with the trained matrices in its dtypes."""
    from safetensors.torch import load_file, save_file

    trained, before = (load_file(folder / WEIGHTS) for folder in (saved, source))
    unlike = sorted(trained.keys() ^ before.keys())
    if unlike:
        raise InputError("the adapter was saved with other tensors", where=source, got=", ".join(unlike[:3]))
    with Staging(target) as staged:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name != WEIGHTS:
                shutil.copyfile(path, staged.path / path.name)
        found = {name: tensor.to(before[name].dtype).contiguous() for name, tensor in trained.items()}
        save_file(found, staged.path / WEIGHTS, metadata={"format": "pt"})
        staged.commit()
