"""What an owner can see by himself, on held-out examples: how good the fine-tune is, and how much of it merges keep.

He does not have the thief's tasks, so only the protected task's value is measured: of fixed merges with stand-ins
for the thief's fine-tunes. The audit, with models and data that hardening never saw, is the judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .directions import Directions
from .draws import Draw, Draws
from .strength import Ends

if TYPE_CHECKING:
    from ..tasks.task import Floats
    from .owner import Owner

MERGES, EXAMPLES, TEXTS = 16, 128, 16
GRID = tuple((own, other) for own in (0.3, 0.5, 0.7, 1.0) for other in (0.2, 0.45))
SEED = 0x5EED  # other merges than those that are trained against


@dataclass(frozen=True)
class Exposure:
    """The value of the protected task in merges: 0 the base, 1 the fine-tune. mean: of them; most: the largest."""

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
        draws = Draws(shapes, SEED)
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
        """The base and the fine-tune as it is, which what merges keep is relative to."""
        return Ends(
            (float(self.base_scores.mean()), float(self.before_scores.mean())),
            (self._loss(0.0), self._loss(1.0)),
        )

    def _loss(self, own: float) -> float:
        """The mean loss of so much of the task vector on a few examples, in nats."""
        owner = self.owner
        owner.module.eval()
        few = owner.task.evaluation[list(self._few)]
        with torch.no_grad(), owner.weights.merged(Draw.whole(owner.weights.shapes, own), {}):
            parts = [
                float(owner.task.loss(owner.module, batch.to(owner.device))) * len(batch)
                for batch in few.batches(owner.task.batch)
            ]
        return sum(parts) / len(few)

    def exposure(self) -> Exposure:
        """Of the weights as they are."""
        weights = self.owner.weights
        plain, base = (float(one[self._few].mean()) for one in (self.before_scores, self.base_scores))
        directions = Directions(self.owner.vectors, self.made, SEED, self.owner.device)
        values = []
        for draw in self.draws:
            with torch.no_grad(), weights.merged(draw, directions.draw(weights.vector())):
                values.append((float(self._scores(self._few).mean()) - base) / (plain - base))
        return Exposure(sum(values) / len(values), max(values))
