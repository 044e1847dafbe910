"""The strength of an objective while it is trained: fixed, or as much as it takes until merges have forgotten.

How strong a trap must be depends on the task: what removes a task of ten classes leaves one of sixty-four as it is.
So the strength rises while simulated merges keep more of the task than they may, and falls while they keep less: a
multiplier of the constraint, updated in proportion to its violation (as GECO, arXiv 1810.00597, does for autoencoders).
It never rises while the fine-tune itself is the worse for it. Both are looked at every few steps, on examples that are
held out: what was trained on is known by heart, and merges know it too. Every look is compared with the base and the
fine-tune as it was on the same examples: what differs from example to example would drown everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..audit.separation import separation

if TYPE_CHECKING:
    from ..tasks.task import Floats

EVERY = 5  # steps between looks
# E-foldings a look, at most, where merges keep everything; half of it down, where they keep nothing.
RISE = 0.15
# E-foldings of a whole training's looks, where merges keep everything throughout, if nothing else was found for a kind
# of task. What rises faster takes apart on its way what the steps that are left do not mend; by what rises too slowly
# the last steps alone are strong enough, and merges fail of which there was something alike in training, no others.
WHOLE = 5.0
# What merges keep comes in bursts. A fall that is steeper than one to nothing from here would outweigh them: where
# merges may keep little, the strength would sink while they keep all of it and more.
GENTLE = 0.1
MEMORY = 0.2  # the part of the running means that a look replaces
WIDEST = 16.0  # how far from where it began
WORTH = 0.9  # of what fine-tuning took off the loss, below which the strength falls


@dataclass(frozen=True)
class Ends:
    """What the base and the fine-tune as it was, (base, fine-tune), have on the held-out examples, one number each.

    scores: as the task has them. losses: in nats.
    """

    scores: tuple[Floats, Floats]
    losses: tuple[Floats, Floats]

    def kept(self, scores: Floats, index: Sequence[int]) -> float:
        """What a merge with these scores on some of the examples keeps of the task: 0 the base, 1 the fine-tune."""
        base, fine = self.scores
        return float((scores - base[index]).mean() / (fine - base).mean())

    @cached_property
    def _by_loss(self) -> bool:
        base, fine = self.losses
        return separation(-base, -fine).enough

    def worth(self, scores: Floats, losses: Floats, index: Sequence[int]) -> float:
        """What the fine-tune is worth now: 1 as it was, 0 the base.

        By the loss, which sees more than accuracy does, unless fine-tuning did not clearly lower it: a fine-tune may be
        right more often, and the surer of what it has wrong.
        """
        base, fine = self.losses
        if self._by_loss:
            return float(1 - (losses - fine[index]).mean() / (base - fine).mean())
        base, fine = self.scores
        return float(1 + (scores - fine[index]).mean() / (fine - base).mean())


@dataclass
class Strength:
    """One number, followed step by step.

    Attributes:
        value: now. first: to begin with.
        may: what merges may keep of the task, 0 to 1; None leaves the strength as it is.
        looks: of the whole training. whole: e-foldings by which it rises in them, at most.
        kept, worth: running means.
    """

    first: float
    may: float | None = None
    looks: int = 1
    whole: float = WHOLE

    def __post_init__(self) -> None:
        self.value, self.kept, self.worth = self.first, 1.0, 1.0

    def follow(self, kept: Sequence[float], worth: float) -> None:
        """After a look: what each of some merges keeps, and what the fine-tune is worth."""
        if self.may is None:
            return
        # Merges that know less than the base does do not make up for those that know more.
        parts = [min(max(part, 0.0), 1.0) for part in kept]
        self.kept += MEMORY * (sum(parts) / len(parts) - self.kept)
        # Only what is absurd is cut off: a mean of numbers that are cut at 1 would be too low.
        self.worth += MEMORY * (min(max(worth, -1.0), 3.0) - self.worth)
        over = self.kept - self.may
        rise = min(RISE, self.whole / self.looks)
        slope = rise / (1 - self.may) if over > 0 else rise / 2 / max(self.may, GENTLE)
        step = slope * over
        if self.worth < WORTH:
            step = min(step, -rise / 2)
        changed = self.value * math.exp(step)
        self.value = min(max(changed, self.first / WIDEST), self.first * WIDEST)

    @property
    def bound(self) -> bool:
        """Whether it would be higher, if it might."""
        return self.may is not None and self.value >= self.first * WIDEST

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.value, self.kept, self.worth]

    def load(self, state: list[float]) -> None:
        """As it was."""
        self.value, self.kept, self.worth = state
