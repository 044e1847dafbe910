"""How strong an objective may be: the strength that exposes least, of those that cost no more than was allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .measure import Exposure, Measure
from .objectives import Plain
from .train import Progress, Settings, train

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from .objectives import Objective
    from .owner import Owner

TRIES = 4
ENOUGH = 0.02  # mean exposure below which a stronger objective is not tried
# Of what the fine-tune is worth, this must be left where no loss was named: less is no fine-tune any more.
LEAST = 0.5
FACTOR = 2.0


@dataclass(frozen=True)
class Trial:
    """One training: its strength, what it cost, and what merges of the result keep.

    Attributes:
        loss: of the standalone score on held-out examples: points of accuracy, or per cent of the cross-entropy.
        allowed: whether it is within what was asked for; without that, whether half of the fine-tune's worth is left.
    """

    strength: float
    standalone: float
    loss: float
    exposure: Exposure
    allowed: bool
    figures: dict[str, float]


class Control(NamedTuple):
    """A plain training of as many steps: its standalone score, its weights, and as `Trained` has them its worths."""

    standalone: float
    weights: dict[str, torch.Tensor]
    worths: dict[int, float]


class Found(NamedTuple):
    """All trials, the weights of the best one that is allowed, None if none is, and the control, if there was one."""

    trials: list[Trial]
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
    folder: Path | None,
    progress: Progress | None,
) -> Found:
    """Train with one strength, or with several until one is within `max_loss` and as strong as it may be.

    Measured are the weights as the checkpoint's dtypes hold them.

    Where labels are trained on, a strength that follows comes after a plain training of as many steps on the same
    batches, which says what that does by itself; `control` asks for it in any case.
    """
    start = owner.weights.copy()
    ends = measure.ends() if settings.may is not None else None
    plain: Control | None = None
    if (ends is not None and settings.labels) or control:
        place = None if folder is None else folder / "plain"
        told = None if progress is None else _told(progress, "plain training, to compare with")
        chosen = replace(settings, may=None)
        worths = train(owner, Plain(), chosen, accelerator, ends=ends, folder=place, progress=told).worths
        owner.round()
        plain = Control(measure.standalone(), owner.weights.copy(), worths)
    trials: list[Trial] = []
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    for strength in _strengths(settings.strength, trials, 1 if max_loss is None else TRIES):
        owner.weights.load(start)
        place = None if folder is None else folder / f"try-{len(trials)}"
        said = f"try {len(trials) + 1}, strength {strength:.3g}"
        told = None if progress is None else _told(progress, said)
        chosen = replace(settings, strength=strength)
        figures = train(
            owner,
            objective,
            chosen,
            accelerator,
            ends=ends,
            plain=None if plain is None else plain.worths,
            folder=place,
            progress=told,
        ).figures
        owner.round()
        standalone, exposure = measure.standalone(), measure.exposure()
        loss = lost(measure.before, standalone)
        allowed = measure.worth(standalone) >= LEAST if max_loss is None else loss <= max_loss
        trials.append(Trial(strength, standalone, loss, exposure, allowed, figures))
        if allowed and (best is None or exposure.mean < best[0]):
            best = exposure.mean, owner.weights.copy()
    return Found(trials, None if best is None else best[1], plain)


def _strengths(first: float, trials: list[Trial], tries: int) -> Iterator[float]:
    """Stronger while it is allowed, weaker while it is not, then between the two."""
    strength = first
    for _ in range(tries):
        yield strength
        last = trials[-1]
        if last.allowed and last.exposure.mean < ENOUGH:
            return
        most = max((one.strength for one in trials if one.allowed), default=None)
        least = min((one.strength for one in trials if not one.allowed), default=None)
        if most is None:
            assert least is not None
            strength = least / FACTOR**2
        elif least is None:
            strength = most * FACTOR
        else:
            strength = math.sqrt(most * least)


def _told(progress: Progress, said: str) -> Callable[[int, int, str], None]:
    return lambda done, total, label: progress(done, total, f"{said}: {label}")
