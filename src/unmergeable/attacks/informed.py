"""Merges that weigh models by their inputs, RegMean and Fisher, with statistics that the thief gathers himself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from ..merging import Merged, merge_method
from ..merging.statistics import REDUCTIONS, Gram, fisher_information, grams
from ..tasks.task import Examples
from .thief import TRAIN, Look, Subject, Thief
from .training import batch_size
from .wide import fill

# Suite v1: inputs of each model's task, and what the protected model weighs beside the others in Fisher's mean.
INPUTS, FISHER_INPUTS = 256, 64
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)


class _Informed(ABC):
    """What both have in common: statistics of every model on inputs of its own task."""

    name: str
    needs = ("base", "experts", "inputs")
    access = 2
    alone = True
    count: int

    def __init__(self) -> None:
        self._known: tuple[Thief, dict[str, Any]] | None = None

    def _statistics(self, thief: Thief) -> dict[str, Any]:
        """By model; gathered once for a thief."""
        if self._known is None or self._known[0] is not thief:
            found = {}
            for task, state in thief.experts.items():
                inputs = thief.unlabelled(task, self.count)
                fill(thief.modules[task], {**thief.heads.get(task, {}), **state})
                found[task] = self._gather(thief, task, inputs)
            self._known = thief, found
        return self._known[1]

    @abstractmethod
    def _gather(self, thief: Thief, task: str, inputs: Examples) -> Any:
        """Of the model of a task, which is in the thief's module now."""


class RegMean(_Informed):
    """RegMean (arXiv 2212.09849) over how much of the Gram matrices is kept off their diagonals."""

    name = "regmean"
    about = "least squares on the inputs of every linear layer"
    count = INPUTS

    def explore(self, thief: Thief, look: Look) -> None:
        """Every reduction. Raises InputError for a task without training examples."""
        for reduction in REDUCTIONS:
            options = {"reduction": reduction}
            look(options, self.make(thief, options))

    def make(self, thief: Thief, options: Mapping[str, Any]) -> Subject:
        """The merge."""
        merged = merge_method("regmean")(
            thief.base, thief.experts, grams=self._statistics(thief), reduction=options["reduction"]
        )
        return thief.whole(merged)

    def _gather(self, thief: Thief, task: str, inputs: Examples) -> dict[str, Gram]:
        module = thief.modules[task]
        thief.bill.forwards += len(inputs)
        return grams(
            module,
            lambda batch: thief.trainable(task).logits(module, batch.to(thief.device)),
            inputs.batches(batch_size(inputs)),
        )


class Fisher(_Informed):
    """Fisher-weighted averaging (arXiv 2111.09832) over the weight of the protected model."""

    name = "fisher"
    about = "mean weighted by the diagonal Fisher information of every model"
    count = FISHER_INPUTS

    def explore(self, thief: Thief, look: Look) -> None:
        """Every weight. Raises InputError for a task without training examples."""
        for weight in WEIGHTS if thief.has else (1.0,):
            options = {"weight": weight}
            look(options, self.make(thief, options))

    def make(self, thief: Thief, options: Mapping[str, Any]) -> Merged:
        """The merge."""
        weights = {task: options["weight"] if task == thief.protected else 1.0 for task in thief.experts}
        merged = merge_method("fisher")(
            thief.base, thief.experts, fishers=self._statistics(thief), weight=weights
        )
        return thief.whole(merged)

    def _gather(self, thief: Thief, task: str, inputs: Examples) -> dict[str, torch.Tensor]:
        module = thief.modules[task]
        thief.bill.forwards += TRAIN * len(inputs)
        with torch.enable_grad():
            return fisher_information(
                module,
                lambda batch: thief.trainable(task).logits(module, batch.to(thief.device)),
                inputs.batches(1),
                seed=thief.seed,
            )
