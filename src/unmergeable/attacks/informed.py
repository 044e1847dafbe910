"""Merges that weigh models by their inputs, RegMean and Fisher, with statistics that the thief gathers himself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..merging import Merged, merge_method
from ..merging.statistics import EXACT_CLASSES, REDUCTIONS, Gram, fisher_information, grams
from ..merging.tensors import without_padding
from ..tasks.padding import masks
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

    def _statistics(self, thief: Thief) -> dict[str, Any]:
        """By model; gathered once for a thief."""
        return thief.once(self.name, lambda: self._gathered(thief))

    def _gathered(self, thief: Thief) -> dict[str, Any]:
        found = {}
        for task, state in thief.experts.items():
            inputs = thief.unlabelled(task, self.count)
            fill(thief.modules[task], {**thief.heads.get(task, {}), **state})
            found[task] = self._gather(thief, task, inputs)
        return found

    @abstractmethod
    def _gather(self, thief: Thief, task: str, inputs: Examples) -> Any:
        """Of the model of a task, which is in the thief's module now."""


class RegMean(_Informed):
    """RegMean (arXiv 2212.09849) over how much of the Gram matrices is kept off their diagonals."""

    name = "regmean"
    about = "least squares on the inputs of every linear layer"
    count = INPUTS
    budget: ClassVar[dict[str, int]] = {"merges": len(REDUCTIONS), "examples": INPUTS}

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
            masks,
        )


class Fisher(_Informed):
    """Fisher-weighted averaging (arXiv 2111.09832) over the weight of the protected model."""

    name = "fisher"
    about = "mean weighted by the diagonal Fisher information of every model"
    count = FISHER_INPUTS
    budget: ClassVar[dict[str, int]] = {"merges": len(WEIGHTS), "examples": FISHER_INPUTS}

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

        def logits(batch: Examples) -> torch.Tensor:
            batch = batch.to(thief.device)
            found = without_padding(thief.trainable(task).logits(module, batch), masks(batch))
            classes, answers = found.shape[-1], found[..., 0].numel()
            # One gradient an example, or one a class; each costs as much as two passes forward.
            gradients = classes if answers == 1 and classes <= EXACT_CLASSES else 1
            thief.bill.forwards += 1 + (TRAIN - 1) * gradients
            return found

        with torch.enable_grad():
            found = fisher_information(module, logits, inputs.batches(1), seed=thief.seed)
        return normalised({name: found[name] for name in found if name in thief.base})


def normalised(information: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fisher information with a root mean square of one over all entries, as its authors' code normalises it.

    A model that is unsure of its answers has much more of it everywhere, and would take over the mean.
    """
    count = sum(tensor.numel() for tensor in information.values())
    total = sum(float(tensor.double().square().sum()) for tensor in information.values())
    size = (total / count) ** 0.5 if total else 1.0
    return {name: tensor / size for name, tensor in information.items()}
