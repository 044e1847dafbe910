"""What an owner can see by himself, on held-out examples: how good the fine-tune is, and how much of it merges keep.

He does not have the thief's tasks, so only the protected task's value is measured: of fixed merges with stand-ins
for the thief's fine-tunes. The audit, with models and data that hardening never saw, is the judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .directions import Directions
from .draws import Draw
from .strength import Ends

if TYPE_CHECKING:
    from ..tasks.task import Floats
    from .owner import Owner

MERGES, EXAMPLES, TEXTS = 16, 128, 16
GRID = tuple((own, other) for own in (0.3, 0.5, 0.7, 0.85) for other in (0.2, 0.45))
SEED = 0x5EED  # other merges than those that are trained against


@dataclass(frozen=True)
class Exposure:
    """The value of the protected task in merges: 0 the base or worse, 1 the fine-tune.

    mean: of them. most: the largest.
    """

    mean: float
    most: float


class Measure:
    """Fixed examples and merges, to compare states of one fine-tune by.

    Args:
        owner: with the fine-tune as it is before hardening, which values are relative to.
        made: as in `Directions`.

    Attributes:
        before_scores, base_scores: of the fine-tune and of its base, an example each. before: the former's mean.
    """

    def __init__(self, owner: Owner, made: tuple[str, ...]) -> None:
        self.owner = owner
        shapes = owner.weights.shapes
        draws = owner.draws(SEED)
        self.draws = [
            *(Draw.whole(shapes, own, other) for own, other in GRID),
            *(draws.draw() for _ in range(MERGES)),
        ]
        self.made = made
        texts = owner.task.evaluation.labels.ndim > 1
        self._few = range(min(TEXTS if texts else EXAMPLES, len(owner.task)))
        self.before_scores = self._scores()
        with owner.weights.merged(Draw.whole(shapes, 0.0), {}):
            self.base_scores = self._scores()
        self.before = float(self.before_scores.mean())

    def standalone(self) -> float:
        """The mean score of the weights as they are."""
        return float(self._scores().mean())

    def _scores(self, index: range | None = None) -> Floats:
        self.owner.module.eval()
        every = range(len(self.owner.task)) if index is None else index
        return self.owner.task.score(self.owner.module, every)

    def ends(self) -> Ends:
        """The base and the fine-tune as it is, on every held-out example."""
        scores = self.base_scores, self.before_scores
        if self.owner.task.metric == "cross-entropy":
            return Ends(scores, (-scores[0], -scores[1]))
        with self.owner.weights.merged(Draw.whole(self.owner.weights.shapes, 0.0), {}):
            base = self._losses()
        return Ends(scores, (base, self._losses()))

    def _losses(self) -> Floats:
        self.owner.module.eval()
        return self.owner.task.losses(self.owner.module, range(len(self.owner.task)))

    def worth(self, standalone: float) -> float:
        """A score between those of the base, 0, and of the fine-tune as it was, 1."""
        base = float(self.base_scores.mean())
        return (standalone - base) / (self.before - base)

    def exposure(self) -> Exposure:
        """Of the weights as they are."""
        weights, few = self.owner.weights, self._few
        # All examples say what fine-tuning brought; the few, what a merge has of it, against the base on the same ones.
        brought = self.before - float(self.base_scores.mean())
        directions = Directions(self.owner.vectors, self.made, SEED, self.owner.device)
        values = []
        for draw in self.draws:
            with torch.no_grad(), weights.merged(draw, directions.draw(weights.vector())):
                found = self._scores(few) - self.base_scores[few]
            # Merges that know less than the base does do not make up for those that know more.
            values.append(max(0.0, float(found.mean()) / brought))
        return Exposure(sum(values) / len(values), max(values))
