"""What is added to a fine-tune's own loss so that merges of it fail. Each objective is one function of a step.

They leave their gradients in the parameters, pass by pass, so that no two forward passes are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import UsageError
from ..tasks.task import IGNORED, Call, Examples
from .draws import Draw

if TYPE_CHECKING:
    from ..merging import State
    from .directions import Directions
    from .draws import Draws
    from .merged import Weights

LEAST = 1e-4  # of 1 − p: what an answer that is all but certain costs is bounded by −log of it


class Learner(Protocol):
    """What objectives ask of a task: its TensorTask, or labels that come with every batch."""

    def logits(self, call: Call, batch: Examples) -> torch.Tensor:
        """(n, [positions,] classes), aligned with the labels."""

    def loss(self, call: Call, batch: Examples) -> torch.Tensor:
        """The mean cross-entropy, differentiable."""

    def states(self, call: Call, batch: Examples) -> tuple[torch.Tensor, ...]:
        """Hidden states, first to last, differentiable."""


@dataclass(frozen=True)
class Step:
    """What objectives are given.

    Attributes:
        weights: the fine-tune and its base. draws, directions: of simulated merges.
        task: what the fine-tune is for. call: its module. batch: labelled examples, on its device.
        backward: of a loss, with its factor.
        before: the task vector as it was before hardening, for objectives that ask for it.
        whole: whether the batch cannot be cut: there are inputs of which nobody knows whose they are.
    """

    weights: Weights
    draws: Draws
    directions: Directions
    task: Learner
    call: Call
    batch: Examples
    backward: Callable[[torch.Tensor], None]
    before: State = field(default_factory=dict)
    whole: bool = False

    def part(self, start: int, stop: int) -> Step:
        """The same for some of the examples; for all of them where the batch cannot be cut."""
        return self if self.whole else replace(self, batch=self.batch[start:stop])


class Objective(Protocol):
    """One way of hardening, with where it is from.

    One that learns from hidden states says so by an attribute, `states = True`: models without them are then refused
    before anything is trained. One that asks for the task vector as it was says `before = True`. A training that was
    killed goes on from its checkpoint if the objective's `repr` is what it was, as a dataclass's is: Python's own names
    the object, and training begins anew.
    """

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    def add(self, step: Step, strength: float) -> float:
        """Add the gradients of strength × the objective; returns the objective."""


@dataclass(frozen=True)
class Plain:
    """Nothing but the fine-tune's own loss: the control, trained for as many steps."""

    name = "plain"
    source = "a control"

    def add(self, step: Step, strength: float) -> float:
        """Nothing."""
        return 0.0


@dataclass(frozen=True)
class Trap:
    """Simulated merges must not know the task: −log(1 − p) of the right answer, bounded.

    merges: a step. part: of the batch that every merge sees; the merges of a step see different parts, as far as
    there are. among: where the thief takes some blocks or kinds of tensors, he takes the best of so many choices, as a
    few examples show. inner: steps of gradient descent that he takes on his coefficients before he is judged, each
    with a forward and a backward pass more; rate: of these steps.
    """

    merges: int = 2
    part: float = 0.5
    among: int = 4
    inner: int = 0
    rate: float = 0.1
    name = "trap"
    source = "this package; the bounded term is unlikelihood training, arXiv 1908.04319"

    def add(self, step: Step, strength: float) -> float:
        """Every merge in turn."""
        total, vector = 0.0, step.weights.vector()
        size = max(1, round(self.part * len(step.batch)))
        for number in range(self.merges):
            start = number * size % (len(step.batch) - size + 1)
            part = step.part(start, start + size)
            draw, direction = step.draws.draw(), step.directions.draw(vector)
            if draw.parts and self.among > 1:
                draw = _best(part, [draw, *(step.draws.again() for _ in range(self.among - 1))], direction)
            for _ in range(self.inner):
                draw = _improved(part, draw, direction, self.rate)
            total += _forgotten(part, draw, direction, strength / self.merges) / self.merges
        return total


@dataclass(frozen=True)
class Collapse:
    """Hidden states of a simulated merge must be alike for all inputs, so that there is no task to read out of them.

    The part of the last layers' mean states that differs between the examples of a batch, after RepNoise, which asks
    for noise. To go beside the trap: `factor` times its strength.
    """

    factor: float = 2.0
    layers: int = 3
    states = True
    name = "collapse"
    source = "representations without information, after RepNoise, arXiv 2405.14577"

    def add(self, step: Step, strength: float) -> float:
        """One merge.

        Raises:
            InputError: the model gives no hidden states.
        """
        draw, direction = step.draws.draw(), step.directions.draw(step.weights.vector())
        with step.weights.merged(draw, direction):
            total = torch.zeros((), device=step.batch.labels.device)
            for state in mean_states(step, self.layers):
                away = state - state.mean(0, keepdim=True)
                total = total + away.square().sum() / state.square().sum().clamp(min=1e-6) / self.layers
            step.backward(self.factor * strength * total)
        return float(total.detach())


@dataclass(frozen=True)
class Kindred:
    """Blocks of the fine-tune must not work among blocks of the fine-tune as it was before.

    A thief's own task may be akin to the protected one, as letters are to letters: then so are features that his
    fine-tunes have learnt, and whole blocks of the protected model know what to do with them. Neither noise nor a
    fine-tune on something else stands in for that. The fine-tune as it was does: nothing is more akin.

    part: of the batch that the merge sees. among: he takes the best of so many choices of blocks and kinds of tensors.
    """

    part: float = 0.5
    among: int = 4
    before = True
    name = "kindred"
    source = "this package, as the trap"

    def add(self, step: Step, strength: float) -> float:
        """One merge."""
        size = max(1, round(self.part * len(step.batch)))
        start = int(torch.randint(len(step.batch) - size + 1, (), generator=step.draws.generator))
        part = step.part(start, start + size)
        draw = _best(part, [step.draws.again() for _ in range(self.among)], step.before)
        return _forgotten(part, draw, step.before, strength)


@dataclass(frozen=True)
class Trap2:
    """The loss of the fine-tune's task vector at another scale must rise, over the scale (arXiv 2601.21898).

    Unbounded, as published: small strengths only.
    """

    name = "trap2"
    source = "Trap², arXiv 2601.21898"

    def add(self, step: Step, strength: float) -> float:
        """One scale, from .05 to .95 or from 1.05 to 2."""
        first, second = torch.rand(2, generator=step.draws.generator).tolist()
        scale = 0.05 + 0.9 * first if second < 0.5 else 1.05 + 0.95 * first
        with step.weights.merged(Draw.whole(step.weights.shapes, scale), {}):
            loss = -step.task.loss(step.call, step.batch) / scale
            step.backward(strength * loss)
        return float(loss.detach())


@dataclass(frozen=True)
class Repel:
    """Every matrix must be at least `distance` of its base's norm away from it (after ARF, arXiv 2606.30360)."""

    distance: float = 0.05
    name = "repel"
    source = "anchor repulsion, after arXiv 2606.30360"

    def add(self, step: Step, strength: float) -> float:
        """No forward pass at all."""
        base = step.weights.base
        total = torch.zeros((), device=next(iter(base.values())).device)
        for name, delta in step.weights.deltas():
            if delta.ndim > 1:
                far = base[name].square().sum()
                # A square root has no gradient at 0, where a fine-tune that left a matrix alone stands.
                apart = (delta.square().sum() + 1e-12 * far).sqrt() / far.sqrt().clamp(min=1e-12)
                total = total + torch.relu(self.distance - apart)
        if total.requires_grad:
            step.backward(strength * total)
        return float(total.detach())


@dataclass(frozen=True)
class Together:
    """Several objectives at once."""

    parts: tuple[Objective, ...]

    @property
    def name(self) -> str:
        """As `objective` reads it."""
        return "+".join(part.name for part in self.parts)

    @property
    def source(self) -> str:
        """Of each."""
        return "; ".join(part.source for part in self.parts)

    @property
    def states(self) -> bool:
        """Whether one of them learns from hidden states."""
        return any(map(needs_states, self.parts))

    @property
    def before(self) -> bool:
        """Whether one of them asks for the task vector as it was."""
        return any(map(needs_before, self.parts))

    def add(self, step: Step, strength: float) -> float:
        """One after the other."""
        return sum(part.add(step, strength) for part in self.parts)


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "trap": Trap,
    "collapse": Collapse,
    "kindred": Kindred,
    "trap2": Trap2,
    "repel": Repel,
    "plain": Plain,
}


def objective(name: str) -> Objective:
    """An objective by its name, or several with a + between them.

    Raises:
        UsageError: no such objective.
    """
    names = name.split("+")
    for one in names:
        if one not in OBJECTIVES:
            raise UsageError("no such objective", where=one, expected=" | ".join(OBJECTIVES))
    parts = tuple(OBJECTIVES[one]() for one in names)
    return parts[0] if len(parts) == 1 else Together(parts)


def needs_states(objective: Objective) -> bool:
    """Whether it learns from hidden states."""
    return bool(getattr(objective, "states", False))


def stateless(name: str) -> Objective:
    """What is left of it, of these names, for models without hidden states."""
    return objective("+".join(one for one in name.split("+") if not needs_states(objective(one))))


def needs_before(objective: Objective) -> bool:
    """Whether it asks for the task vector as it was before hardening."""
    return bool(getattr(objective, "before", False))


def mean_states(step: Step, layers: int) -> list[torch.Tensor]:
    """Hidden states of the last layers, the mean over positions that are no padding, (n, width) each, in float32.

    Those of convolutions are (n, width, rows, columns).

    Raises:
        InputError: the model gives none.
    """
    found = [state.float() for state in step.task.states(step.call, step.batch)[-layers:]]
    return [one.mean((2, 3)) if one.ndim == 4 else _mean(one.flatten(1, -2), step.batch) for one in found]


def _mean(states: torch.Tensor, batch: Examples) -> torch.Tensor:
    """Over positions: (n, positions, width) to (n, width)."""
    counted = _text(batch)
    if counted is None or counted.shape != states.shape[:2] or bool(counted.all()):
        return states.mean(1)
    # Not by a product: what a model has at padding may be no number.
    return torch.where(counted[..., None], states, 0).sum(1) / counted.sum(1, keepdim=True).clamp(min=1)


def _text(batch: Examples) -> torch.Tensor | None:
    """Which positions of what hidden states are of are no padding, (n, positions) booleans; None if nothing says it.

    Not every IGNORED label is padding, as `tasks.padding` has it for answers: prompts, and tokens that were not masked,
    are text all the same. What is behind the last label that counts is none.
    """
    inputs, labels = batch.inputs, batch.labels
    # Of an encoder and a decoder the states are the decoder's: the attention mask is of what it answers to.
    answers = labels.ndim > 1 and ("decoder_input_ids" in inputs or "labels" in inputs)
    if "attention_mask" in inputs and not answers:
        return inputs["attention_mask"].bool()
    if labels.ndim == 1:
        return None
    counted = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
    # Those of a language model are for the next token: the first one has none.
    return counted if answers else torch.nn.functional.pad(counted, (1, 0), value=True)


def unlikelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean of −log(1 − p + ε) over labels, p the probability of the right one. Differentiable.

    Args:
        logits: (n, [positions,] classes). labels: (n, [positions]); IGNORED ones are left out.
    """
    logits, labels = logits.float().flatten(0, -2), labels.flatten()
    counted = labels != IGNORED
    right = torch.softmax(logits[counted], -1).gather(1, labels[counted, None])[:, 0]
    return -(1 - right + LEAST).log().sum() / counted.sum().clamp(min=1)


def _forgotten(step: Step, draw: Draw, direction: State, strength: float) -> float:
    """Add the gradients of strength × a merge's unlikelihood; returns that."""
    with step.weights.merged(draw, direction):
        loss = unlikelihood(step.task.logits(step.call, step.batch), step.batch.labels)
        step.backward(strength * loss)
    return float(loss.detach())


@torch.no_grad()
def _best(step: Step, draws: Sequence[Draw], direction: State) -> Draw:
    """The merge that knows most of the task, on a part of the batch: all of them together see it about once."""
    few = step.part(0, -(-len(step.batch) // len(draws))).batch
    found = []
    for draw in draws:
        with step.weights.merged(draw, direction):
            found.append(step.task.loss(step.call, few))
    return draws[int(torch.stack(found).argmin())]


def _improved(step: Step, draw: Draw, direction: State, rate: float) -> Draw:
    """Coefficients after a step of the thief: down the gradient of the task's own loss, one a tensor."""
    if draw.mix is not None or draw.even:
        return draw  # of two numbers in all
    weights = step.weights
    with weights.merged(draw, direction):
        step.backward(step.task.loss(step.call, step.batch))
        slopes = weights.slopes()
        for one in weights.parameters.values():
            one.grad = None  # the thief's, not the owner's
    longest = max(map(abs, slopes.values()), default=0.0)
    if not longest:
        return draw
    return Draw({name: part - rate * slopes[name] / longest for name, part in draw.own.items()}, draw.other)
