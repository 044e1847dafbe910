"""How strong an objective may be, and for how long: what exposes least, of what costs no more than was allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .journal import Journal, Trial
from .measure import Measure
from .objectives import Plain
from .train import Progress, Settings, train

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from .objectives import Objective
    from .owner import Owner

TRIES = 4
LOOKS = 4  # at as many points of a training, its end among them
LONGER = 2  # times the steps, once, if merges keep too much after them
ENOUGH = 0.02  # mean exposure below which a stronger objective is not tried, nor more steps
# Of what the fine-tune is worth, this must be left where no loss was named: less is no fine-tune any more.
LEAST = 0.5
FACTOR = 2.0


class Control(NamedTuple):
    """A plain training of as many steps: its standalone score, its weights, and by step what it was worth."""

    standalone: float
    weights: dict[str, torch.Tensor]
    worths: dict[int, float]


class Found(NamedTuple):
    """All trials, the weights of the best one that is allowed, None if none is, and the control, if there was one."""

    trials: list[Trial]
    taken: Trial | None
    weights: dict[str, torch.Tensor] | None
    plain: Control | None


def lost(before: float, after: float) -> float:
    """What a score lost: points of accuracy, or per cent of a cross-entropy (a score below 0)."""
    return 100 * (before - after) / (abs(before) if before < 0 else 1.0)


def search(
    owner: Owner,
    objective: Objective,
    settings: Settings,
    accelerator: Accelerator,
    measure: Measure,
    max_loss: float | None,
    control: bool,
    longer: bool,
    folder: Path | None,
    progress: Progress | None,
) -> Found:
    """Train with one strength, or with several until one is within `max_loss` and as strong as it may be.

    Where there is a `max_loss`, every training is looked at on its way, and ended where merges keep nothing already;
    `longer` tries twice as many steps where they keep too much after all strengths. Measured are the weights as the
    checkpoint's dtypes hold them.

    Where labels are trained on, a strength that follows comes after a plain training of as many steps on the same
    batches, on labels alone: it says what that does by itself, and its model is the teacher of what is not asked of
    labels. `control` asks for it in any case: after a search, which is what says how many steps there are.
    """
    start = owner.weights.copy()
    ends = measure.ends() if settings.may is not None else None
    journal, searching = Journal(folder), max_loss is not None

    def plainly(done: int, of: int) -> Control:
        """The fine-tune after `done` steps of a plain training of `of`."""
        owner.weights.load(start)
        worths = train(
            owner,
            Plain(),
            replace(settings, may=None, labels=1.0, steps=of),
            accelerator,
            ends=ends,
            pauses=[done],
            pause=lambda done, figures: True,
            folder=None if folder is None else folder / "plain",
            progress=None if progress is None else _told(progress, "plain training, to compare with"),
        )
        owner.round()
        return Control(measure.standalone(), owner.weights.copy(), worths)

    plain: Control | None = None
    follows = ends is not None and settings.labels > 0
    if follows or (control and not searching):
        plain = plainly(settings.steps, settings.steps)
    # A control that was only asked for changes nothing.
    teacher = plain.weights if follows and plain is not None else None

    def tried(number: int, strength: float, steps: int) -> Trial:
        """Where a training of its own ends."""
        points = list[Trial]()

        def pause(done: int, figures: dict[str, float]) -> bool:
            trial = journal.find(strength, done, steps)
            if trial is None:
                trial, weights = _measured(owner, measure, max_loss, strength, done, steps, figures)
                journal.add(trial, weights)
            points.append(trial)
            return searching and _enough(trial)

        owner.weights.load(start)
        train(
            owner,
            objective,
            replace(settings, strength=strength, steps=steps),
            accelerator,
            ends=ends,
            plain=None if plain is None else plain.worths,
            teacher=teacher,
            pauses=[-(-steps * look // LOOKS) for look in range(1, LOOKS + 1)] if searching else [steps],
            pause=pause,
            folder=None if folder is None else folder / f"try-{number}",
            progress=None
            if progress is None
            else _told(progress, f"try {number + 1}, strength {strength:.3g}"),
        )
        return points[-1]

    last: list[Trial] = []
    for plan in _plans(settings, last, TRIES if searching else 1, searching and longer):
        last.append(tried(len(last), *plan))
    if control and plain is None and journal.taken is not None:
        plain = plainly(journal.taken.steps, journal.taken.of)
    return Found(journal.trials, journal.taken, journal.best, plain)


def _measured(
    owner: Owner,
    measure: Measure,
    max_loss: float | None,
    strength: float,
    done: int,
    of: int,
    figures: dict[str, float],
) -> tuple[Trial, dict[str, torch.Tensor]]:
    """The weights as they would be written; they are as they were afterwards."""
    exact = owner.weights.copy()
    owner.round()
    standalone, exposure = measure.standalone(), measure.exposure()
    loss = lost(measure.before, standalone)
    allowed = measure.worth(standalone) >= LEAST if max_loss is None else loss <= max_loss
    weights = owner.weights.copy()
    owner.weights.load(exact)
    return Trial(strength, done, of, standalone, loss, exposure, allowed, figures), weights


def _enough(trial: Trial) -> bool:
    return trial.allowed and trial.exposure.mean < ENOUGH


def _strongest(last: Sequence[Trial]) -> float | None:
    return max((one.strength for one in last if one.allowed), default=None)


def _plans(
    settings: Settings, last: Sequence[Trial], tries: int, longer: bool
) -> Iterator[tuple[float, int]]:
    """Strengths and steps, given where each training before ended."""
    for strength in _strengths(settings.strength, last, tries):
        yield strength, settings.steps
    most = _strongest(last)
    if longer and most is not None and not _enough(last[-1]):
        yield most, LONGER * settings.steps


def _strengths(first: float, last: Sequence[Trial], tries: int) -> Iterator[float]:
    """Stronger while it is allowed, weaker while it is not, then between the two."""
    strength = first
    for _ in range(tries):
        yield strength
        if _enough(last[-1]):
            return
        most = _strongest(last)
        least = min((one.strength for one in last if not one.allowed), default=None)
        if most is None:
            assert least is not None
            strength = least / FACTOR**2
        elif least is None:
            strength = most * FACTOR
        else:
            strength = math.sqrt(most * least)


def _told(progress: Progress, said: str) -> Callable[[int, int, str], None]:
    return lambda done, total, label: progress(done, total, f"{said}: {label}")
