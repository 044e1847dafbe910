"""Repair: train a merge on a few labelled examples of all tasks; and un-trap: train the protected model first.

Both are done as well by a thief without the protected model, from the merge of his own, or from the base: what
he gets by labels alone is not the protected model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from ..errors import UsageError
from ..merging import Merged
from ..merging.tensors import possible
from .merges import PROBE
from .thief import Look, Subject, Thief, all_of, detached
from .training import TEXTS_EACH, labelled, sampler, supervised, train

# Suite v1: labelled examples a class or units of texts, learning rates, steps, and how often the result is looked at.
EACH = (4, 16)
RATES = (1e-4, 3e-4)
STEPS, EVERY = 60, 20
# The part of a task vector that an un-trapping begins from.
DOSES = (0.5, 1.0)


@dataclass(frozen=True)
class Repair:
    """Fine-tuning of merges, from the best ones that earlier attacks found."""

    each: int
    alone: bool = True
    needs: tuple[str, ...] = ("base", "experts", "labels")
    access: int = 3

    @property
    def name(self) -> str:
        """As rows call it."""
        return f"repair-{self.each}"

    @property
    def about(self) -> str:
        """One line."""
        many = f"{self.each} labelled examples a class, or {self.each * TEXTS_EACH} texts"
        return f"train the best merges on {many}, of every task"

    @property
    def budget(self) -> dict[str, int]:
        """Of every start."""
        return {"merges": len(RATES) * -(-STEPS // EVERY), "examples": self.each, "steps": STEPS}

    def explore(self, thief: Thief, look: Look) -> None:
        """From every start, with every learning rate.

        Raises:
            InputError: a task without training examples. RunError: every training diverges.
        """
        tries = [(number, rate) for number in range(len(thief.starts)) for rate in RATES]
        all_of(partial(self._one, thief, look, *each) for each in tries)

    def _one(self, thief: Thief, look: Look, number: int, rate: float) -> None:
        options = {"start": number, "rate": rate}
        for step, merged in self._train(thief, options):
            look({**options, "steps": step}, merged, kept=detached(merged))

    def make(self, thief: Thief, options: Mapping[str, Any]) -> Subject:
        """Train once more, for so many steps of the same schedule."""
        return next(m for step, m in self._train(thief, options) if step == options["steps"])

    def _train(self, thief: Thief, options: Mapping[str, Any]) -> Iterator[tuple[int, Merged]]:
        start = thief.whole(thief.starts[options["start"]][1])
        generator = torch.Generator().manual_seed(thief.seed)
        draws = {}
        for task in thief.tasks:
            few = labelled(thief, task, self.each)
            draws[task] = sampler(thief, task, few, generator)
        loss = supervised(thief, draws, start.private)
        rate, device = options["rate"], thief.device
        for step, shared in train(start.shared, loss, steps=STEPS, rate=rate, every=EVERY, device=device):
            yield step, Merged(shared, start.private)


def repair(*, each: int = EACH[-1]) -> Repair:
    """A repair, as `unmergeable attack` takes it: with so many labelled examples a class, or eight times as many texts.

    Raises:
        UsageError: fewer than one.
    """
    if each < 1:
        raise UsageError("a repair needs examples", where="each", expected="1 or more", got=each)
    return Repair(each)


class Untrap:
    """Fine-tuning of the protected model, or of the base without it, on labels of its task; merges of that."""

    name = "untrap"
    about = "train the protected model on a few labels until it merges, then merge"
    needs = ("base", "experts", "labels")
    access = 3
    alone = True
    each = EACH[-1]
    budget: ClassVar[dict[str, int]] = {
        "merges": len(DOSES) * len(PROBE),
        "examples": EACH[-1],
        "steps": STEPS,
    }

    def explore(self, thief: Thief, look: Look) -> None:
        """From every part of the task vector, every point of the probe grid.

        Raises:
            InputError: the task has no training examples. RunError: every training diverges.
        """
        all_of(partial(self._one, thief, look, dose) for dose in (DOSES if thief.has else (0.0,)))

    def _one(self, thief: Thief, look: Look, dose: float) -> None:
        student = self._student(thief, dose)
        for weight, others in PROBE:
            options = {"start": dose, "dose": weight, "others": others}
            look(options, merged_with(thief, student, weight, others))

    def make(self, thief: Thief, options: Mapping[str, Any]) -> Subject:
        """Train, if that was not done for this thief, and merge."""
        student = self._student(thief, options["start"])
        return merged_with(thief, student, options["dose"], options["others"])

    def _student(self, thief: Thief, dose: float) -> dict[str, torch.Tensor]:
        return thief.once((self.name, dose), lambda: self._trained(thief, dose))

    def _trained(self, thief: Thief, dose: float) -> dict[str, torch.Tensor]:
        task = thief.protected
        few = labelled(thief, task, self.each)
        generator = torch.Generator().manual_seed(thief.seed)
        weights = {task: dose} if thief.has else {}
        start = thief.mixer.mix(weights)  # `train` copies it
        loss = supervised(thief, {task: sampler(thief, task, few, generator)}, thief.heads)
        done = train(start.shared, loss, steps=STEPS, rate=RATES[0], every=STEPS, device=thief.device)
        *_, (_, shared) = done
        return shared


def merged_with(thief: Thief, student: Mapping[str, torch.Tensor], dose: float, others: float) -> Merged:
    """base + dose · (student − base) + others · every other model's task vector."""
    own = thief.mixer.mix(dict.fromkeys(thief.others, others))
    shared = {
        name: possible(name, tensor + dose * (student[name].to(tensor) - thief.base[name].to(tensor)))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in own.shared.items()
    }
    return thief.whole(Merged(shared, own.private))
