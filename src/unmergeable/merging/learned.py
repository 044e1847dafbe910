"""Learnt coefficients: base + Σ c ∘ task vector, c per model, block, tensor or row, by gradient descent.

On unlabelled inputs the entropy of the predictions is minimised (AdaMerging, Yang et al., arXiv 2310.02575);
with a few labels, the cross-entropy. Several starts, and of every start the best step by validation: what
is learnt depends much on where it begins (a start of .4 for all is too kind to a defence).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, RunError, UsageError
from . import Merged
from .blocks import layout
from .tensors import possible, split

if TYPE_CHECKING:
    from . import State

GRANULARITIES = ("model", "block", "tensor", "row")
OBJECTIVES = ("entropy", "labels")
# Suite v1: the coefficients that learning starts from, of the protected model and of all others.
STARTS = ((1.0, 0.1), (1.0, 0.3), (0.4, 0.4))
STEPS, RATE, EVERY = 60, 0.02, 5

# (task, state dict, batch) -> logits (…, classes), differentiable in the state: torch.func.functional_call.
Forward = Callable[[str, Mapping[str, torch.Tensor], Any], torch.Tensor]
Labels = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Learned:
    """The best merge of one start.

    Attributes:
        merged: the merge, float32, detached.
        coefficients: by tensor, (models,) or (models, rows), in the order of the models.
        start: of the protected model and the others.
        step: at which it was best; 0 is the start itself.
        score: by validation, higher is better.
        history: (step, training loss, score or None) as they came.
        forwards: examples that went forward (and back, when training), validation not counted.
    """

    merged: Merged
    coefficients: Mapping[str, torch.Tensor]
    start: tuple[float, float]
    step: int
    score: float
    history: tuple[tuple[int, float, float | None], ...]
    forwards: int


class Coefficients(torch.nn.Module):
    """Coefficients that a merge is differentiable in.

    Args:
        base: the model that the experts were fine-tuned from.
        experts: state dicts by name.
        granularity: "model", "block", "tensor" or "row" (of axis 0).
        start: by model.

    Raises:
        UsageError: no such granularity. InputError: models that do not fit together.
    """

    def __init__(
        self, base: State, experts: Mapping[str, State], granularity: str, start: Mapping[str, float]
    ) -> None:
        super().__init__()
        if granularity not in GRANULARITIES:
            raise UsageError("no such granularity", expected=" | ".join(GRANULARITIES), got=granularity)
        self.parts = split(base, experts)
        self.models = tuple(experts)
        units = layout(self.parts.shared).units
        self._base = {name: base[name].detach().float() for name in self.parts.shared}
        self._kept = {name: base[name] for name in self.parts.kept}
        self._deltas = {}
        self._slot: dict[str, str] = {}
        sizes: dict[str, tuple[int, ...]] = {}
        for name, origin in self._base.items():
            held = [
                experts[model][name].detach().to(origin.device, torch.float32) - origin
                if model in self.parts.shared[name]
                else torch.zeros_like(origin)
                for model in self.models
            ]
            self._deltas[name] = torch.stack(held)
            slot = {"model": "all", "block": units[name][0]}.get(granularity, name)
            self._slot[name] = slot
            rows = (origin.shape[0],) if granularity == "row" and origin.ndim else ()
            sizes[slot] = (len(self.models), *rows)
        self._order = {slot: index for index, slot in enumerate(sizes)}
        device = next(iter(self._base.values())).device
        begin = torch.tensor([float(start[model]) for model in self.models], device=device)
        self.values = torch.nn.ParameterList(
            begin.reshape(-1, *(1,) * (len(size) - 1)).expand(size).clone() for size in sizes.values()
        )

    def coefficient(self, name: str) -> torch.Tensor:
        """The coefficients of a tensor: (models,) or (models, rows)."""
        value: torch.Tensor = self.values[self._order[self._slot[name]]]
        return value

    def merged(self) -> dict[str, torch.Tensor]:
        """The shared tensors as they are now, with gradients to the coefficients."""
        out = dict(self._kept)
        for name, origin in self._base.items():
            c = self.coefficient(name)
            delta = self._deltas[name]
            total = origin + (c.reshape(*c.shape, *(1,) * (delta.ndim - c.ndim)) * delta).sum(0)
            out[name] = possible(name, total)
        return out

    def snapshot(self) -> Merged:
        """The merge as it is now, detached."""
        with torch.no_grad():
            shared = {name: tensor.detach().clone() for name, tensor in self.merged().items()}
        return Merged(shared, self.parts.private)


def learn(
    base: State,
    experts: Mapping[str, State],
    forward: Forward,
    batches: Mapping[str, Sequence[Any]],
    *,
    protected: str,
    granularity: str = "tensor",
    objective: str = "entropy",
    labels: Labels | None = None,
    starts: Iterable[tuple[float, float]] = STARTS,
    steps: int = STEPS,
    rate: float = RATE,
    every: int = EVERY,
    validate: Callable[[Merged], float] | None = None,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[Learned]:
    """Learn the coefficients of a merge from several starts.

    Args:
        base: the model that the experts were fine-tuned from.
        experts: state dicts by name; a task has the name of its expert.
        forward: logits of a task for a batch, with a given state dict; the task's private tensors are in it.
        batches: of every task that the thief has data of; used in turn, in an order that the seed gives.
        protected: the model that the first number of a start belongs to.
        granularity: of the coefficients.
        objective: "entropy", or "labels".
        labels: the answers of a batch, integers of the shape of the logits without classes; negative ones are
            left out. For "labels".
        starts: coefficients of (the protected model, each other).
        steps: of Adam, at learning rate `rate`; every step takes one batch of every task.
        every: how often validation looks.
        validate: a merge's score, higher is better; without it, minus the objective over all batches.
        weights: of the tasks in the objective; 1 for all if not given.
        seed: of the order of batches.

    Returns: the best of each start, best start first.

    Raises:
        UsageError: options that contradict each other, or no batches.
        InputError: models that do not fit together.
        RunError: the objective is not finite.
    """
    if objective not in OBJECTIVES or (objective == "labels") != (labels is not None):
        expected = "entropy, or labels with a function that gives them"
        raise UsageError("an objective that cannot be computed", expected=expected, got=objective)
    if protected not in experts:
        raise UsageError("no such expert", where=f"'{protected}'", expected=" | ".join(experts))
    if not batches or not all(batches.values()):
        raise UsageError("learning needs batches of at least one task, and no empty task")
    task_weights = {task: 1.0 if weights is None else float(weights[task]) for task in batches}

    def loss(task: str, state: Mapping[str, torch.Tensor], batch: Any) -> torch.Tensor:
        logits = forward(task, state, batch)
        return entropy(logits) if labels is None else cross_entropy(logits, labels(batch))

    def score(merged: Merged) -> float:
        if validate is not None:
            return float(validate(merged))
        with torch.no_grad():
            total = 0.0
            for task, some in batches.items():
                state = merged.for_task(task)
                total += task_weights[task] * sum(float(loss(task, state, one)) for one in some) / len(some)
        return -total / sum(task_weights.values())

    found = []
    for start in starts:
        begin = {name: start[0] if name == protected else start[1] for name in experts}
        values = Coefficients(base, experts, granularity, begin)
        found.append(_descend(values, start, loss, batches, task_weights, steps, rate, every, score, seed))
    if not found:
        raise UsageError("learning needs at least one start")
    return sorted(found, key=lambda one: -one.score)


def _descend(
    values: Coefficients,
    start: tuple[float, float],
    loss: Callable[[str, Mapping[str, torch.Tensor], Any], torch.Tensor],
    batches: Mapping[str, Sequence[Any]],
    weights: Mapping[str, float],
    steps: int,
    rate: float,
    every: int,
    score: Callable[[Merged], float],
    seed: int,
) -> Learned:
    """Adam from one start; what is kept is the step that scored best."""
    generator = torch.Generator().manual_seed(seed)
    orders: dict[str, list[int]] = {task: [] for task in batches}
    optimizer = torch.optim.Adam(values.parameters(), lr=rate)
    best = score(values.snapshot())
    kept = [value.detach().clone() for value in values.values]
    at, forwards = 0, 0
    history: list[tuple[int, float, float | None]] = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        with torch.enable_grad():
            shared = values.merged()
            total = torch.zeros(())
            for task, some in batches.items():
                if not orders[task]:
                    orders[task] = torch.randperm(len(some), generator=generator).tolist()
                batch = some[orders[task].pop()]
                state = Merged(shared, values.parts.private).for_task(task)
                part = loss(task, state, batch)
                total = total.to(part.device) + weights[task] / sum(weights.values()) * part
                forwards += _length(batch)
            if not bool(torch.isfinite(total)):
                raise RunError("the objective is not finite", where=f"step {step}", got=float(total.detach()))
            total.backward()
        optimizer.step()
        seen: float | None = None
        if step % every == 0 or step == steps:
            seen = score(values.snapshot())
            if seen > best:
                best, at = seen, step
                kept = [value.detach().clone() for value in values.values]
        history.append((step, float(total.detach()), seen))
    with torch.no_grad():
        for value, good in zip(values.values, kept, strict=True):
            value.copy_(good)
    coefficients = {name: values.coefficient(name).detach().clone() for name in values.parts.shared}
    return Learned(values.snapshot(), coefficients, start, at, best, tuple(history), forwards)


def _length(batch: Any) -> int:
    """Examples in a batch, for the bill: of the first tensor in it."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else 1
    items = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    )
    return next((_length(item) for item in items if isinstance(item, torch.Tensor)), 1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """The mean entropy of predictions, in nats; logits (…, classes)."""
    chances = logits.float().log_softmax(-1)
    return -(chances.exp() * chances).sum(-1).mean()


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy, in nats; logits (…, classes), labels (…), negative ones left out.

    Raises:
        InputError: shapes that do not fit, or no label at all.
    """
    if logits.shape[:-1] != labels.shape:
        got, expected = list(labels.shape), list(logits.shape[:-1])
        raise InputError("labels do not have the shape of the logits", expected=expected, got=got)
    flat = labels.flatten().to(logits.device)
    if not bool((flat >= 0).any()):
        raise InputError("a batch without labels")
    flat = torch.where(flat < 0, torch.full_like(flat, -100), flat)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), flat)
