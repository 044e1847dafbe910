"""The strength of an objective while it is trained: fixed, or as much as it takes until merges have forgotten.

How strong a trap must be depends on the task: what removes a task of ten classes leaves one of sixty-four as it is.
So the strength rises while simulated merges keep more of the task than they may, and falls while they keep less: a
multiplier of the constraint, updated in proportion to its violation (as GECO, arXiv 1810.00597, does for autoencoders).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GAIN = 0.03  # e-foldings a step, per unit of what is kept beyond what may be
MEMORY = 0.05  # the part of the running mean that a step replaces
WIDEST = 64.0  # how far from where it began


@dataclass
class Strength:
    """One number, followed step by step.

    Attributes:
        value: now. first: to begin with.
        may: what merges may keep of the task, 0 to 1; None leaves the strength as it is.
        ends: of the objective: at the base and at the fine-tune, which what is kept is relative to.
        kept: running mean of what merges keep.
    """

    first: float
    may: float | None = None
    ends: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        self.value, self.kept = self.first, 1.0

    def follow(self, objective: float) -> None:
        """After a step, by the objective that its merges had."""
        if self.may is None:
            return
        low, high = self.ends
        # Merges that know less than the base does do not make up for those that know more.
        kept = min(max((objective - low) / (high - low), 0.0), 1.0)
        self.kept += MEMORY * (kept - self.kept)
        changed = self.value * math.exp(GAIN * (self.kept - self.may))
        self.value = min(max(changed, self.first / WIDEST), self.first * WIDEST)

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.value, self.kept]

    def load(self, state: list[float]) -> None:
        """As it was."""
        self.value, self.kept = state
