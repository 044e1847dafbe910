"""The verb `harden`, from paths to a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..audit.init import kind_of
from ..audit.separation import check_separation, separation
from ..checkpoint import check_destination, open_checkpoint
from ..checkpoint.files import load_json
from ..errors import ClaimError, InputError, UsageError
from ..merging.vectors import is_adapter
from ..stock import memory
from . import HardenReport, Progress
from .device import PRECISIONS, accelerating, checkpoint_activations
from .directions import check_made
from .journal import Trial
from .measure import Measure
from .objectives import Objective, needs_states
from .objectives import objective as objective_of
from .owner import KINDS, Owner
from .release import clear, write
from .search import LEAST, lost, search
from .train import Settings

if TYPE_CHECKING:
    from ..keys import Key
    from ..tasks.task import TensorTask

# By kind of task: what a training is, unless it is asked for otherwise.
DEFAULTS = {
    "image-classification": Settings(strength=0.15, steps=300, rate=3e-4, batch=64),
    "text-classification": Settings(strength=0.15, steps=300, rate=1e-4, batch=32),
    "sequence-to-sequence": Settings(strength=0.3, steps=600, rate=3e-4, batch=16),
    "language-modelling": Settings(strength=0.3, steps=1200, rate=5e-4, batch=16),
}
# Where it is not the trap alone: beside it, hidden states that are alike cost less for as much; of text they do not.
OBJECTIVE = {"image-classification": "trap+collapse"}
SUFFIX = ".hardening"
# Of the task, that simulated merges may keep on average; text models give away more at as much.
MAY, MAY_TEXT = 0.1, 0.02
SAID = 1.0  # point, or per cent, of loss that is worth a note
# What helps where a step does not fit a device.
STEP = "give a smaller batch, gradient checkpointing, or bf16; the same command goes on from its checkpoint"


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
    objective: str | Objective | None,
    strength: float | None,
    max_loss: float | None,
    may: float | None,
    labels: float | None,
    steps: int | None,
    rate: float | None,
    batch: int | None,
    seed: int,
    lock: Key | None,
    control: str | os.PathLike[str] | None,
    device: str,
    precision: str,
    checkpointing: bool,
    progress: Progress | None,
) -> HardenReport:
    """As `harden`."""
    began = time.monotonic()
    named = objective_of(objective) if isinstance(objective, str) else objective
    source, target = Path(expert), Path(dst)
    adapter = is_adapter(source)
    if adapter and lock is not None:
        what = "an adapter cannot be locked: it would no longer fit its base"
        raise UsageError(what, where="lock", hint="fold it into its base, harden that, and lock it")
    if precision not in PRECISIONS:
        raise UsageError(
            "no such precision", where="precision", expected=" | ".join(PRECISIONS), got=precision
        )
    _check_there(source, Path(base))
    if not 0 <= seed < 2**63 - 10:
        raise UsageError("no seed", where="seed", expected="0 to 2⁶³ − 11", got=seed)
    kind = _kind(Path(base) if adapter else source, task)
    chosen = named or objective_of(OBJECTIVE.get(kind, "trap"))
    settings = _settings(kind, strength, steps, rate, batch, seed)
    settings = replace(
        settings,
        may=_may(may, kind, strength, max_loss, chosen),
        labels=_labels(labels, chosen, control is not None),
    )
    if made is not None:
        settings = replace(settings, made=_made(made, proxies))
    if max_loss is not None and not max_loss >= 0:
        raise UsageError("no loss that can be allowed", where="max_loss", expected="0 or more", got=max_loss)
    _check_there(Path(data), *map(Path, proxies))
    if source.is_file():
        what = "a file of weights cannot be trained by itself"
        raise InputError(what, where=source, expected="a model's folder")
    if adapter:
        check_destination(source, target, sum(one.stat().st_size for one in source.iterdir()))
    else:
        with open_checkpoint(source) as checkpoint:
            check_destination(checkpoint.root, target, checkpoint.nbytes)
    beside = None if control is None else Path(control)
    if beside is not None:
        _check_beside(source, target, beside)
    written = {"kind": kind, "data": str(data), **dict(fields or {})}
    progress_folder = target.with_name(target.name + SUFFIX)
    folder = progress_folder / _digest(source, base, written, proxies, chosen, settings, max_loss)
    with (
        accelerating(device, precision) as accelerator,
        tempfile.TemporaryDirectory(prefix="unmergeable-harden-") as work,
    ):
        with memory(accelerator.device, "the models", "free the device, or train on another one"):
            owner = Owner(
                source, Path(base), written, [Path(path) for path in proxies], Path(work), accelerator
            )
        if checkpointing:
            checkpoint_activations(owner.module)
        # A training must not fail at its end: what it begins with is written, and locked, for once.
        write(owner, source, Path(work) / "tried", Path(work), lock)
        shutil.rmtree(Path(work) / "tried")
        with memory(owner.device, "the held-out examples", "give the task a smaller batch: --set batch=N"):
            if needs_states(chosen) and not _has_states(owner):
                if named is not None:
                    raise _stateless(source, chosen)
                chosen = objective_of("trap")
            measure = Measure(owner, settings.made)
            check_separation({owner.task.name: separation(measure.base_scores, measure.before_scores)})
            exposed = measure.exposure()
        with memory(owner.device, "a step", STEP):
            trials, taken, state, plain = search(
                owner, chosen, settings, accelerator, measure, max_loss, beside is not None, steps is None, folder,
                progress,
            )  # fmt: skip
        if taken is None or state is None:
            clear(folder)  # nothing goes on from here: whatever the owner changes is another training
            raise _refused(source, trials, measure, max_loss)
        if beside is not None and plain is not None:
            owner.weights.load(plain.weights)
            write(owner, source, beside, Path(work), None)
        owner.weights.load(state)
        write(owner, source, target, Path(work), lock)
    clear(folder)
    alone = None if plain is None else plain.standalone
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
        labels=settings.labels,
        steps=taken.steps,
        rate=settings.rate,
        batch=min(settings.batch, len(owner.training)),
        seed=seed,
        metric=owner.task.metric,
        standalone={"before": measure.before, "after": taken.standalone, **_named(plain=alone)},
        loss=lost(measure.before, taken.standalone),
        exposure={"before": asdict(exposed), "after": asdict(taken.exposure)},
        trials=[asdict(one) for one in trials],
        locked=None if lock is None else lock.id,
        examples={"training": len(owner.training), "held": len(owner.task)},
        seconds=time.monotonic() - began,
        device=str(owner.device),
        notes=tuple(_notes(taken, settings, owner.task, measure.before, alone, max_loss)),
    )


def _check_there(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise InputError("no such file or folder", where=path)


def _has_states(owner: Owner) -> bool:
    """Whether the model gives hidden states, which some objectives learn from."""
    try:
        with torch.no_grad():
            owner.task.states(owner.module.eval(), owner.task.evaluation[:1].to(owner.device))
    except InputError:
        return False
    return True


def _stateless(source: Path, objective: Objective) -> InputError:
    return InputError(
        "the model gives no hidden states, which the objective learns from",
        where=source,
        got=objective.name,
        hint="give another objective: trap learns from answers alone",
    )


def _check_beside(source: Path, target: Path, control: Path) -> None:
    """Where the control goes: as the result, and not in one place with it."""
    if control.absolute() == target.absolute():
        raise UsageError("the control and the result cannot be the same folder", where="control", got=control)
    check_destination(source, control, sum(one.stat().st_size for one in source.iterdir() if one.is_file()))


def _refused(source: Path, trials: Sequence[Trial], measure: Measure, max_loss: float | None) -> ClaimError:
    least = min(trials, key=lambda one: one.loss)
    if max_loss is None:
        return ClaimError(
            "training took more than half of what the fine-tune is worth",
            where=str(source),
            expected=f"more than {LEAST:g} of what it has over its base on held-out examples",
            got=f"{least.standalone:.4f}, from {measure.before:.4f}",
            hint="nothing was written; give a lower rate or strength, or more data; --max-loss N allows so much",
        )
    return ClaimError(
        "no strength that was tried keeps the score",
        where=str(source),
        expected=f"a loss of at most {max_loss:g}",
        got=f"{least.loss:.3g} at strength {least.strength:.3g}",
        hint="nothing was written; allow more, or give more data or steps",
    )


def _named(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _notes(
    taken: Trial,
    settings: Settings,
    task: TensorTask,
    before: float,
    plain: float | None,
    max_loss: float | None,
) -> Iterator[str]:
    """What the owner should know before he takes the result for a protection."""
    unit = "points of accuracy" if task.metric == "accuracy" else "% of the cross-entropy"
    each = 100 / len(task)
    # Texts have a token's accuracy each: there an example is no step of the score.
    if (
        max_loss is not None
        and task.metric == "accuracy"
        and task.evaluation.labels.ndim == 1
        and each > max_loss
    ):
        yield (
            f"{len(task)} examples are held out, one of them is {each:.2g} points: they cannot tell whether a loss is "
            f"within {max_loss:g}; more data tells more, most of all with other examples to train on (train)"
        )
    if taken.loss > SAID:
        itself = "" if plain is None else f" (plain training alone: {lost(before, plain):.2f})"
        answers = (
            ", --labels 0 keeps to its own answers"
            if plain is not None and lost(before, plain) > SAID
            else ""
        )
        yield (
            f"the result is worse at its task by {taken.loss:.2f} {unit} on held-out examples{itself}: more data costs "
            f"less, --max-loss bounds it{answers}"
        )
    if taken.exposure.mean > (MAY if settings.may is None else settings.may):
        more = (
            ", and its strength was at its bound: begin from a higher one" if taken.figures["bound"] else ""
        )
        yield f"simulated merges still keep {taken.exposure.mean:.0%} of the task{more}; more steps take more"
    if taken.figures["falls"]:
        yield f"the loss was not finite {taken.figures['falls']:.0f} times: the rate was halved as often"


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
    asked: float | None, kind: str, strength: float | None, max_loss: float | None, objective: Objective
) -> float | None:
    """What merges may keep: followed by itself where there is a trap, and nothing else was asked for."""
    if asked is None:
        trap = "trap" in objective.name.split("+")
        own = MAY_TEXT if kind == "language-modelling" else MAY
        return own if trap and strength is None and max_loss is None else None
    if not 0 < asked < 1:
        raise UsageError("no part of a task", where="may", expected="above 0 and below 1", got=asked)
    if objective.name == "plain":
        raise UsageError("plain training has no strength to follow what merges keep", where="may", got=asked)
    if max_loss is not None:
        what = "a strength that follows what merges keep leaves nothing to search"
        raise UsageError(what, where="may", got=f"max_loss {max_loss:g}")
    return asked


def _labels(asked: float | None, objective: Objective, control: bool) -> float:
    """The part of the loss that asks for labels: all, if nothing else was asked for."""
    plain, labels = objective.name == "plain", 1.0 if asked is None else asked
    if not 0 <= labels <= 1:
        raise UsageError("no part of a loss", where="labels", expected="0 to 1", got=labels)
    if not labels and (plain or control):
        raise UsageError(
            "a training on the fine-tune's own answers alone leaves it as it is",
            where="objective" if plain else "control",
            hint="compare with the fine-tune itself, or give labels a part of the loss",
        )
    return labels


def _made(made: Sequence[str], proxies: Sequence[object]) -> tuple[str, ...]:
    check_made(made)
    if not made and not proxies:
        raise UsageError(
            "nothing in the place of a thief's fine-tunes", hint="give proxies, or directions to make"
        )
    return tuple(made)


def _digest(
    expert: Path,
    base: object,
    fields: Mapping[str, Any],
    proxies: Sequence[object],
    objective: Objective,
    settings: Settings,
    max_loss: float | None,
) -> str:
    """Names a training by what it is of, so that none goes on from another's checkpoint."""
    stamps = []
    train = fields.get("train")
    trained = [train["data"]] if isinstance(train, Mapping) and "data" in train else []
    for path in (expert, base, fields["data"], *trained, *proxies):
        place = Path(str(path))
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        stamps += [[str(one), one.stat().st_size, one.stat().st_mtime_ns] for one in files if one.is_file()]
    facts = [
        __version__,
        str(expert),
        str(base),
        fields,
        list(map(str, proxies)),
        repr(objective),
        asdict(settings),
        max_loss,
    ]
    return hashlib.sha256(json.dumps([facts, stamps], sort_keys=True).encode()).hexdigest()[:16]
