"""Distillation: a student from the base learns what the protected model answers, and is merged in its place.

No lock changes what a model answers, so none can hinder this; what it costs is inputs and training. The inputs
are the protected task's own, or foreign ones: those of the thief's tasks. The student learns soft answers at a
temperature, hard ones, or the last hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError
from ..merging.tensors import without_padding
from ..tasks.padding import masks
from ..tasks.task import Call, Examples, TensorTask
from .merges import PROBE
from .repair import merged_with
from .thief import TRAIN, Look, Subject, Thief
from .training import sampler, train

# Suite v1: temperatures of soft answers, inputs a task, steps and their rate.
TEMPERATURES = (1.0, 2.0, 4.0)
TARGETS = (*(f"soft-{t:g}" for t in TEMPERATURES), "hard", "features")
INPUTS, STEPS, RATE = 2048, 200, 2e-4


@dataclass(frozen=True)
class Distil:
    """A student for one kind of target, on the protected task's own inputs or on foreign ones."""

    target: str
    foreign: bool
    alone: bool = False
    needs: tuple[str, ...] = ("base", "experts", "inputs")
    access: int = 2

    @property
    def name(self) -> str:
        """As rows call it."""
        return f"distil-{self.target}-{'foreign' if self.foreign else 'own'}"

    @property
    def about(self) -> str:
        """One line."""
        inputs = "inputs of other tasks" if self.foreign else "its own inputs"
        return f"teach the base the protected model's answers ({self.target}) on {inputs}, then merge"

    @property
    def budget(self) -> dict[str, int]:
        """Of one student."""
        return {"merges": len(PROBE), "examples": INPUTS, "steps": STEPS}

    def explore(self, thief: Thief, look: Look) -> None:
        """One student, every point of the probe grid.

        Raises:
            InputError: a task without training examples, or a model that gives no hidden states.
        """
        student = self._student(thief)
        for dose, others in PROBE:
            look({"dose": dose, "others": others}, merged_with(thief, student, dose, others))

    def make(self, thief: Thief, options: Mapping[str, Any]) -> Subject:
        """Train, if that was not done for this thief, and merge."""
        return merged_with(thief, self._student(thief), options["dose"], options["others"])

    def _student(self, thief: Thief) -> dict[str, torch.Tensor]:
        return thief.once(self, lambda: self._taught(thief))

    def _taught(self, thief: Thief) -> dict[str, torch.Tensor]:
        task = thief.protected
        taught = thief.teachable(task)  # on foreign inputs it need not have any of its own
        teacher = thief.call(task, thief.experts[task])
        generator = torch.Generator().manual_seed(thief.seed)
        draws = []
        for source in thief.others if self.foreign else (task,):
            inputs = thief.unlabelled(source, INPUTS)
            draws.append(sampler(thief, source, inputs, generator, price=TRAIN + 1))  # the teacher runs too

        def loss(shared: Mapping[str, torch.Tensor]) -> torch.Tensor:
            which = int(torch.randint(0, len(draws), (), generator=generator))
            batch = draws[which]()
            return self._loss(taught, teacher, thief.call(task, shared), batch)

        done = train(thief.base, loss, steps=STEPS, rate=RATE, every=STEPS, device=thief.device)
        *_, (_, student) = done
        return student

    def _loss(self, task: TensorTask, teacher: Call, student: Call, batch: Examples) -> torch.Tensor:
        counted = masks(batch)
        if self.target == "features":
            with torch.no_grad():
                wanted = without_padding(task.states(teacher, batch)[-1], counted)
            return torch.nn.functional.mse_loss(
                without_padding(task.states(student, batch)[-1], counted), wanted
            )
        with torch.no_grad():
            answers = without_padding(task.logits(teacher, batch).float(), counted)
        logits = without_padding(task.logits(student, batch).float(), counted)
        if self.target == "hard":
            return torch.nn.functional.cross_entropy(logits.flatten(0, -2), answers.argmax(-1).flatten())
        temperature = float(self.target.removeprefix("soft-"))
        chances = (answers / temperature).softmax(-1)
        # T² keeps gradients alike at all temperatures (Hinton et al., arXiv 1503.02531).
        losses = -(chances * (logits / temperature).log_softmax(-1)).sum(-1)
        return temperature**2 * losses.mean()


def distil(*, answers: str = "soft-2", foreign: bool = False) -> Distil:
    """A distillation, as `unmergeable attack` takes it: of these answers, one of `TARGETS`.

    Raises:
        UsageError: no such answers.
    """
    if answers not in TARGETS:
        raise UsageError("no such answers to learn from", expected=" | ".join(TARGETS), got=answers)
    return Distil(answers, foreign)
