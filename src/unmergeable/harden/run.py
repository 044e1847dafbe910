"""The verb `harden`, from paths to a checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..audit.separation import check_separation, separation
from ..checkpoint import check_destination, open_checkpoint
from ..errors import ClaimError, InputError, UsageError
from ..merging.vectors import is_adapter
from ..options import check_seed
from ..stock import memory
from . import HardenReport, Progress
from .defaults import MAY, OBJECTIVE, kind_of_task, labels_of, made_of, may_of, settings_of
from .device import PRECISIONS, accelerating, checkpoint_activations
from .journal import Trial
from .measure import Measure
from .objectives import Objective, needs_before, needs_states, stateless
from .objectives import objective as objective_of
from .owner import Owner
from .places import Places
from .release import write
from .search import LEAST, lost, search
from .train import Settings

if TYPE_CHECKING:
    from ..keys import Key
    from ..tasks.task import TensorTask

SAID = 1.0  # point, or per cent, of loss that is worth a note
# What helps where a step does not fit a device.
STEP = "give gradient checkpointing, with which the same command goes on; or a smaller batch, or bf16"


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
    check_seed(seed)
    kind = kind_of_task(Path(base) if adapter else source, task)
    chosen = named or objective_of(OBJECTIVE.get(kind, "trap"))
    settings = settings_of(kind, adapter, strength, steps, rate, batch, seed)
    settings = replace(settings, may=may_of(may, kind, strength, max_loss, chosen))
    settings = replace(settings, labels=labels_of(labels, settings, chosen, control is not None))
    if made is not None:
        settings = replace(settings, made=made_of(made, proxies))
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
    own = [name for name in ("kind", "data") if name in (fields or {})]
    if own:
        hint = "give the data, and the kind of task, as arguments of their own"
        raise UsageError("not a further field of the task", where="fields", got=own[0], hint=hint)
    written = {"kind": kind, "data": str(data), **dict(fields or {})}
    others = [Path(path) for path in proxies]
    places = Places(source, target, None if control is None else Path(control))
    with (
        accelerating(device, precision) as accelerator,
        tempfile.TemporaryDirectory(prefix="unmergeable-harden-") as work,
    ):
        machine = accelerator.device.type, accelerator.mixed_precision
        models = [source, Path(base), *others]
        folder = places.training(models, written, chosen, settings, [max_loss, *machine])
        there = control is not None and places.check_control(folder)
        with memory(accelerator.device, "the models", "free the device, or train on another one"):
            owner = Owner(
                source, Path(base), written, others, Path(work), accelerator, int(needs_before(chosen))
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
                chosen = stateless(chosen.name)
            measure = Measure(owner, settings.made)
            check_separation({owner.task.name: separation(measure.base_scores, measure.before_scores)})
            exposed = measure.exposure()
        with memory(owner.device, "a step", STEP):
            trials, taken, state, plain = search(
                owner, chosen, settings, accelerator, measure, max_loss, control is not None, steps is None, folder,
                progress,
            )  # fmt: skip
        if taken is None or state is None:
            places.clear(folder)  # nothing goes on from here: whatever the owner changes is another training
            raise _refused(source, trials, measure, max_loss)
        if places.control is not None and plain is not None and not there:
            owner.weights.load(plain.weights)
            write(owner, source, places.control, Path(work), None)
            places.note_control(folder)
        owner.weights.load(state)
        write(owner, source, target, Path(work), lock)
    places.clear(folder, all_of_them=True)
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
