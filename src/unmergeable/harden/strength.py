"""The strength of an objective while it is trained: fixed, or as much as it takes until merges have forgotten.

How strong a trap must be depends on the task: what removes a task of ten classes leaves one of sixty-four as it is.
So the strength rises while simulated merges keep more of the task than they may, and falls while they keep less: a
multiplier of the constraint, updated in proportion to its violation (as GECO, arXiv 1810.00597, does for autoencoders).
It never rises while the fine-tune itself is the worse for it. Both are looked at every few steps, on examples that are
held out: what was trained on is known by heart, and merges know it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

EVERY = 5  # steps between looks
RISE, FALL = 0.15, 0.075  # e-foldings a look, where merges keep everything, and where they keep nothing
MEMORY = 0.2  # the part of the running means that a look replaces
WIDEST = 16.0  # how far from where it began
WORTH = 0.9  # of what fine-tuning took off the loss, below which the strength falls


@dataclass(frozen=True)
class Ends:
    """The base and the fine-tune as it was, (base, fine-tune): scores as the task has them, and losses in nats."""

    scores: tuple[float, float] = (0.0, 1.0)
    losses: tuple[float, float] = (1.0, 0.0)


@dataclass
class Strength:
    """One number, followed step by step.

    Attributes:
        value: now. first: to begin with.
        may: what merges may keep of the task, 0 to 1; None leaves the strength as it is.
        ends: what is kept, and what the fine-tune is worth, are relative to these.
        kept, worth: running means.
    """

    first: float
    may: float | None = None
    ends: Ends = Ends()

    def __post_init__(self) -> None:
        self.value, self.kept, self.worth = self.first, 1.0, 1.0

    def follow(self, scores: Sequence[float], loss: float) -> None:
        """After a look, by the scores of merges, and the fine-tune's own loss."""
        if self.may is None:
            return
        # Merges that know less than the base does do not make up for those that know more.
        parts = [min(max(_part(self.ends.scores, score), 0.0), 1.0) for score in scores]
        self.kept += MEMORY * (sum(parts) / len(parts) - self.kept)
        self.worth += MEMORY * (min(max(_part(self.ends.losses, loss), -1.0), 1.0) - self.worth)
        over = self.kept - self.may
        step = RISE * over / (1 - self.may) if over > 0 else FALL * over / self.may
        if self.worth < WORTH:
            step = min(step, -FALL)
        changed = self.value * math.exp(step)
        self.value = min(max(changed, self.first / WIDEST), self.first * WIDEST)

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.value, self.kept, self.worth]

    def load(self, state: list[float]) -> None:
        """As it was."""
        self.value, self.kept, self.worth = state


def _part(ends: tuple[float, float], value: float) -> float:
    """0 at the first end, 1 at the second."""
    return (value - ends[0]) / (ends[1] - ends[0])
