"""What a hardening is where nothing else is asked for, and what may be asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..audit.init import kind_of
from ..checkpoint.files import load_json
from ..errors import UsageError
from .directions import check_made
from .owner import KINDS
from .train import Settings

if TYPE_CHECKING:
    from .objectives import Objective

# By kind of task: what a training is, unless it is asked for otherwise. Of images the strength rises three times as
# fast as of text: where a thief's own task was akin, what rose as slowly let through .3 to .4 of the task.
DEFAULTS = {
    "image-classification": Settings(strength=0.03, rise=15.0, labels=0.5, steps=900, rate=3e-4, batch=64),
    "text-classification": Settings(strength=0.15, steps=300, rate=1e-4, batch=32),
    "sequence-to-sequence": Settings(strength=0.3, steps=600, rate=3e-4, batch=16),
    "language-modelling": Settings(strength=0.3, steps=1200, rate=5e-4, batch=16),
}
# Adapters are trained at higher rates than whole models; this one was audited.
ADAPTER_RATES = {"language-modelling": 1e-3}
# Where it is not the trap alone: beside it, hidden states that are alike cost less for as much, and what a thief's akin
# fine-tunes lend to whole blocks is taken away; of text the first gained nothing, the second was not measured.
OBJECTIVE = {"image-classification": "trap+collapse+kindred"}
# Of the task, that simulated merges may keep on average; text models give away more at as much.
MAY, MAY_TEXT = 0.03, 0.02


def kind_of_task(model: Path, asked: str | None) -> str:
    kind = asked
    if kind is None and model.is_dir():
        kind = kind_of(load_json(model / "config.json"))
    if kind not in KINDS:
        expected = " | ".join(KINDS)
        raise UsageError("no kind of task that can be trained on", where="task", expected=expected, got=kind)
    return kind


def settings_of(
    kind: str,
    adapter: bool,
    strength: float | None,
    steps: int | None,
    rate: float | None,
    batch: int | None,
    seed: int,
) -> Settings:
    if rate is None and adapter:
        rate = ADAPTER_RATES.get(kind)
    given = {"strength": strength, "steps": steps, "rate": rate, "batch": batch}
    chosen = {**asdict(DEFAULTS[kind]), "seed": seed, **{n: v for n, v in given.items() if v is not None}}
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise UsageError("a number that must be above 0", where=name, got=value)
    if chosen["steps"] < 3:
        raise UsageError("too few steps for a training", where="steps", expected="3 or more", got=steps)
    return Settings(**{**chosen, "made": tuple(chosen["made"])})


def may_of(
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


def labels_of(asked: float | None, settings: Settings, objective: Objective, control: bool) -> float:
    """The part of the loss that asks for labels: all, if nothing else was asked for, and no teacher comes first."""
    plain = objective.name == "plain"
    labels = asked if asked is not None else 1.0 if settings.may is None else settings.labels
    if not 0 <= labels <= 1:
        raise UsageError("no part of a loss", where="labels", expected="0 to 1", got=labels)
    if not labels and (plain or control):
        raise UsageError(
            "a training on the fine-tune's own answers alone leaves it as it is",
            where="objective" if plain else "control",
            hint="compare with the fine-tune itself, or give labels a part of the loss",
        )
    return labels


def made_of(made: Sequence[str], proxies: Sequence[object]) -> tuple[str, ...]:
    check_made(made)
    if not made and not proxies:
        raise UsageError(
            "nothing in the place of a thief's fine-tunes", hint="give proxies, or directions to make"
        )
    return tuple(made)
