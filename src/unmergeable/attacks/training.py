"""The thief's training loop: a few steps of AdamW on the weights of a merge, looked at on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import RunError
from ..tasks.task import Examples
from .thief import TRAIN, Thief

if TYPE_CHECKING:
    from ..merging import State

LONGEST, WARM = 1.0, 0.1  # a gradient's norm; the part of the steps in which the rate rises
# Suite v1: examples a step and task; texts are windows of many tokens.
IMAGES, TEXTS = 64, 8
# A text stands for fewer labels than its tokens: where others have so many examples a class, so many times more.
TEXTS_EACH = 8
Batches = Callable[[], Examples]


def train(
    state: State,
    loss: Callable[[State], torch.Tensor],
    *,
    steps: int,
    rate: float,
    every: int,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """AdamW on all floating-point tensors with a one-cycle rate and clipped gradients.

    Args:
        state: where to begin; not changed.
        loss: of the weights, differentiable; draws its own batches.
        steps, rate: of the optimiser; three steps or more.
        every: how often the weights are yielded; always at the end.
        device: where the weights are put.

    Yields: steps done, and the weights, which the next step overwrites.

    Raises:
        RunError: a loss that is not finite.
    """
    weights = {
        name: tensor.detach().to(device, torch.float32, copy=True).requires_grad_()
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }
    rest = {name: tensor.to(device) for name, tensor in state.items() if name not in weights}
    optimizer = torch.optim.AdamW(weights.values(), lr=rate, weight_decay=0.0)
    warm = max(WARM, 2 / steps)  # a rise takes a step at least
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warm)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss({**weights, **rest})
        if not bool(torch.isfinite(value)):
            raise RunError("the loss is not finite", where=f"step {step}", got=float(value.detach()))
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), LONGEST)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            yield step, {**{name: tensor.detach() for name, tensor in weights.items()}, **rest}


def batch_size(examples: Examples) -> int:
    """Examples a step: fewer where each has many labels."""
    return IMAGES if examples.labels.ndim == 1 else TEXTS


def labelled(thief: Thief, task: str, each: int) -> Examples:
    """The few labelled examples that a thief has of a task, put on the bill: so many a class, or units of texts.

    In random order: where each batch had a few of the classes alone, every step would forget the others.

    Raises:
        InputError: the task has no training examples.
    """
    found = thief.trainable(task)
    assert found.training is not None
    texts = found.training.labels.ndim > 1
    few = found.few(each * TEXTS_EACH if texts else each, thief.seed)
    thief.spend(task, few, labels=True)
    return few[torch.randperm(len(few), generator=torch.Generator().manual_seed(thief.seed))]


def sampler(
    thief: Thief, task: str, examples: Examples, generator: torch.Generator, *, price: float = TRAIN
) -> Batches:
    """Random batches of a task's examples, changed at random where the task knows how; put on the bill.

    Args:
        thief: who pays.
        task: whose examples they are.
        examples: to draw from.
        generator: of draws and changes.
        price: forward passes that the use of an example counts for.
    """
    augment = thief.trainable(task).augment
    size = batch_size(examples)

    def batch() -> Examples:
        rows = torch.randint(0, len(examples), (min(size, len(examples)),), generator=generator)
        found = examples[rows]
        thief.bill.forwards += price * len(found)
        return (found if augment is None else augment(found, generator)).to(thief.device)

    return batch


def supervised(
    thief: Thief, draws: Mapping[str, Batches], heads: Mapping[str, State]
) -> Callable[[State], torch.Tensor]:
    """The sum of the tasks' losses, each on a batch of its own and under its head."""

    def loss(shared: State) -> torch.Tensor:
        total = torch.zeros((), device=thief.device)
        for task, draw in draws.items():
            call = thief.call(task, {**shared, **heads.get(task, {})})
            total = total + thief.trainable(task).loss(call, draw())
        return total

    return loss
