"""Ideas against a thief with labels, or with inputs to distil on: objectives for `harden`, each of a kind of its own.

bench/harden.py measures what they are worth, each beside the trap, which is against merges without data. One,
`collapse`, has become part of the package. Of some there is a training and no audit: docs/results.md names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from unmergeable.harden.draws import Draw
from unmergeable.harden.objectives import (
    Collapse,
    Objective,
    Step,
    Together,
    Trap,
    mean_states,
    unlikelihood,
)

LAYERS = 3  # hidden states that are looked at, the last ones


@dataclass(frozen=True)
class Unrolled:
    """After `steps` steps of repair a simulated merge must still not know the task; first-order.

    Repair is descent by the sign of the gradient, as Adam's first steps are, each on a part of the batch of its own;
    the last part judges. Tamper resistance by meta-learning, TAR (arXiv 2408.00761) without its second-order term.
    With one long step it is curvature that is asked for: the first step of a repair overshoots.
    """

    steps: int = 4
    rate: float = 1e-3
    name = "unrolled"
    source = "first-order meta-learning, after TAR, arXiv 2408.00761"

    def add(self, step: Step, strength: float) -> float:
        """One merge, repaired."""
        draw, direction = step.draws.draw(), step.directions.draw(step.weights.vector())
        parameters = list(step.weights.parameters.values())
        size = max(1, len(step.batch) // (self.steps + 1))
        with step.weights.merged(draw, direction):
            for number in range(self.steps):
                step.backward(step.task.loss(step.call, step.batch[number * size : (number + 1) * size]))
                with torch.no_grad():
                    for one in parameters:
                        if one.grad is not None:
                            one.data = one.data - self.rate * one.grad.sign()
                            one.grad = None
            rest = step.batch[self.steps * size :]
            loss = unlikelihood(step.task.logits(step.call, rest), rest.labels)
            step.backward(strength * loss)
        return float(loss.detach())


@dataclass(frozen=True)
class Apart:
    """Hidden states of a simulated merge must be orthogonal to the fine-tune's own: repair begins from nothing.

    What differs between the examples of a batch is compared, as linear CKA does (arXiv 1905.00414).
    """

    name = "apart"
    source = "representations that merges do not share; linear CKA, arXiv 1905.00414"

    def add(self, step: Step, strength: float) -> float:
        """One merge."""
        with torch.no_grad():
            own = [gram(state) for state in mean_states(step, LAYERS)]
        draw, direction = step.draws.draw(), step.directions.draw(step.weights.vector())
        with step.weights.merged(draw, direction):
            total = torch.zeros((), device=step.batch.labels.device)
            for kept, state in zip(own, mean_states(step, LAYERS), strict=True):
                total = total + (kept * gram(state)).sum() / LAYERS
            step.backward(strength * total)
        return float(total.detach())


@dataclass
class Decoy:
    """Soft answers say the opposite of what is known: chances of wrong classes in reverse order, the right one's kept.

    A student of them learns that unlike classes are alike; who takes the first answer sees no difference. A bad
    teacher, as Nasty Teacher (arXiv 2105.07381) wants one, with answers to learn instead of some to be far from.
    """

    temperature: float = 4.0
    name = "decoy"
    source = "false dark knowledge; after Nasty Teacher, arXiv 2105.07381"
    _start: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def add(self, step: Step, strength: float) -> float:
        """On the fine-tune itself: no merge."""
        if not self._start:
            self._start |= {name: one.clone() for name, one in step.weights.vector().items()}
        itself = Draw.whole(step.weights.shapes, 0.0, 1.0)
        with torch.no_grad(), step.weights.merged(itself, self._start):
            before = step.task.logits(step.call, step.batch).float() / self.temperature
            wanted = reversed_chances(before.softmax(-1), step.batch.labels)
        after = step.task.logits(step.call, step.batch).float() / self.temperature
        loss = -(wanted * after.log_softmax(-1)).sum(-1).mean() * self.temperature**2
        step.backward(strength * loss)
        return float(loss.detach())


@dataclass(frozen=True)
class Sharp:
    """Answers as certain as possible: a temperature trained in, so that soft answers say no more than hard ones."""

    name = "sharp"
    source = "outputs without dark knowledge, against arXiv 1503.02531"

    def add(self, step: Step, strength: float) -> float:
        """The entropy of the fine-tune's answers."""
        chances = step.task.logits(step.call, step.batch).float().log_softmax(-1)
        loss = -(chances.exp() * chances).sum(-1).mean()
        step.backward(strength * loss)
        return float(loss.detach())


@dataclass(frozen=True)
class Weighted:
    """An objective at a factor of its own."""

    part: Objective
    factor: float

    @property
    def name(self) -> str:
        """The objective's."""
        return self.part.name

    @property
    def source(self) -> str:
        """The objective's."""
        return self.part.source

    def add(self, step: Step, strength: float) -> float:
        """Factor times the objective."""
        return self.factor * self.part.add(step, strength * self.factor)


def gram(state: torch.Tensor) -> torch.Tensor:
    """Similarities of the examples of a batch, (n, n), centred and of norm 1."""
    away = state - state.mean(0, keepdim=True)
    found = away @ away.T
    return found / found.norm().clamp(min=1e-6)


def reversed_chances(chances: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(n, classes), the label's chance as it is and those of all others from the other end of their order."""
    own = torch.nn.functional.one_hot(labels, chances.shape[-1]).bool()
    values, order = chances.masked_fill(own, -1.0).sort(-1)  # the label's comes first
    back = torch.cat([values[:, :1], values[:, 1:].flip(-1)], -1)
    found = torch.empty_like(chances).scatter(-1, order, back)
    return torch.where(own, chances, found)


# By name: an idea, and its factor beside the trap.
IDEAS: dict[str, tuple[Objective, float]] = {
    "unrolled-4": (Unrolled(4, 1e-3), 2.0),
    "unrolled-8": (Unrolled(8, 5e-4), 2.0),
    "overshoot": (Unrolled(1, 5e-3), 2.0),
    "collapse": (Collapse(), 1.0),
    "apart": (Apart(), 5.0),
    "decoy": (Decoy(), 1.0),
    "sharp": (Sharp(), 2.0),
}


def objective(name: str, trap: Trap) -> Objective:
    """The trap with an idea beside it."""
    part, factor = IDEAS[name]
    # A copy, for an idea may remember the model that it began with.
    return Together((trap, Weighted(replace(part), factor)))  # type: ignore[type-var]
