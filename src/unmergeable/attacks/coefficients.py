"""Learnt coefficients: one for every model, block, tensor or row of every task vector, by gradient descent.

With unlabelled inputs the entropy of the answers is lowered (AdaMerging, arXiv 2310.02575), with a few labels
the loss. Several starts; of every start the step that does best on the examples that merges are chosen on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch

from ..errors import UsageError
from ..merging import Merged
from ..merging.learned import EVERY, GRANULARITIES, OBJECTIVES, RATE, STARTS, STEPS, Learned, learn
from ..merging.tensors import without_padding
from ..tasks.padding import masks
from ..tasks.task import Examples
from .thief import TRAIN, Look, Subject, Thief, all_of, detached
from .training import batch_size, labelled

# Suite v1: unlabelled inputs a task, and labelled examples a class or units of texts.
INPUTS, EACH = 512, 16


@dataclass(frozen=True)
class Coefficients:
    """One granularity of coefficients, and what they are learnt from: "entropy" or "labels"."""

    granularity: str
    objective: str
    alone: bool = True

    @property
    def name(self) -> str:
        """As rows call it."""
        return f"coefficients-{self.granularity}-{self.objective}"

    @property
    def about(self) -> str:
        """One line."""
        taught = "a few labels" if self.labels else "the entropy of unlabelled inputs"
        return f"one coefficient a {self.granularity} and model, learnt from {taught}"

    @property
    def labels(self) -> bool:
        """Whether labels are used."""
        return self.objective == "labels"

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of `NEEDS`."""
        return ("base", "experts", "labels" if self.labels else "inputs")

    @property
    def access(self) -> int:
        """Level of the suite."""
        return 3 if self.labels else 2

    @property
    def budget(self) -> dict[str, int]:
        """A merge a start, and the examples and steps that it is learnt with."""
        return {"merges": len(STARTS), "examples": EACH if self.labels else INPUTS, "steps": STEPS}

    def explore(self, thief: Thief, look: Look) -> None:
        """Learn from every start; what is looked at is the best step of each.

        Raises:
            InputError: a task without training examples. RunError: the objective is finite from no start.
        """
        starts = STARTS if thief.has else [(other, other) for _, other in STARTS[1:]]
        all_of(partial(self._one, thief, look, start) for start in starts)

    def _one(self, thief: Thief, look: Look, start: tuple[float, float]) -> None:
        learned = self._learn(thief, start, STEPS, lambda merged: min(look.peek(thief.whole(merged))))
        merged = thief.whole(learned.merged)
        look({"start": list(start), "step": learned.step}, merged, kept=detached(merged))

    def make(self, thief: Thief, options: Mapping[str, Any]) -> Subject:
        """Learn once more, from one start to one step."""
        calls = count()
        start, step = tuple(options["start"]), options["step"]
        return thief.whole(self._learn(thief, start, step, lambda _: float(next(calls))).merged)

    def _learn(
        self, thief: Thief, start: tuple[float, ...], steps: int, validate: Callable[[Merged], float]
    ) -> Learned:
        data = {}
        for task in thief.tasks:
            found = labelled(thief, task, EACH) if self.labels else thief.unlabelled(task, INPUTS)
            data[task] = list(found.batches(batch_size(found)))

        def forward(task: str, state: Mapping[str, torch.Tensor], batch: Examples) -> torch.Tensor:
            thief.bill.forwards += TRAIN * len(batch)
            logits = thief.forward(task, state, batch)
            return logits if self.labels else without_padding(logits, masks(batch))

        return learn(
            thief.base,
            thief.experts,
            forward,
            data,
            protected=thief.protected if thief.has else next(iter(thief.experts)),
            granularity=self.granularity,
            objective=self.objective,
            labels=_labels if self.labels else None,
            starts=[(start[0], start[1])],
            steps=steps,
            rate=RATE,
            every=EVERY,
            validate=validate,
            seed=thief.seed,
        )[0]


def coefficients(*, granularity: str = "row", objective: str = "labels") -> Coefficients:
    """Learnt coefficients, as `unmergeable attack` takes them.

    Raises:
        UsageError: no such granularity or objective.
    """
    for given, known in ((granularity, GRANULARITIES), (objective, OBJECTIVES)):
        if given not in known:
            raise UsageError("no such coefficients", expected=" | ".join(known), got=given)
    return Coefficients(granularity, objective)


def _labels(batch: Examples) -> torch.Tensor:
    return batch.labels
