"""What keeps a fine-tune what it is while it is hardened: the labels once more, or answers of a model without a trap.

Labels of few examples are soon known by heart, and the fine-tune is the worse for it, whatever the objective is. That
it answers as before costs it nothing of what it was released for. This is distillation of a model into itself, which
learns something beside it (learning without forgetting, arXiv 1606.09282, section 3). Where a plain training of as many
steps comes first, its model is the better teacher: it has learnt what there was to learn from the labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ..tasks.task import IGNORED, Examples, cross_entropy
from .merged import modes_kept

if TYPE_CHECKING:
    from ..merging import State
    from .owner import Owner


class Fidelity:
    """The loss that an objective is added to.

    Args:
        owner: the weights that he has now are the fine-tune as it was.
        labels: the part of the loss that is the task's own, on the labels, 0 to 1. The rest is on answers.
        teacher: the weights whose answers are asked for, by name; None takes the fine-tune as it was.
    """

    def __init__(self, owner: Owner, labels: float, teacher: State | None = None) -> None:
        self.owner, self.labels = owner, labels
        self.teacher: dict[str, torch.Tensor] = {}
        if labels < 1:
            self.teacher = {
                name: (one if teacher is None else teacher[name]).detach().to(one, copy=True)
                for name, one in owner.weights.parameters.items()
            }

    def loss(self, batch: Examples) -> torch.Tensor:
        """The mean over the labelled places of a batch, differentiable."""
        task, module = self.owner.task, self.owner.module
        if not self.teacher:
            return task.loss(module, batch)
        with torch.no_grad(), modes_kept(module), self.owner.weights.replaced(self.teacher):
            module.eval()
            taught = task.logits(module, batch)
        now, labels = task.logits(module, batch), batch.labels
        loss = (1 - self.labels) * divergence(now, taught, labels)
        if self.labels:
            loss = loss + self.labels * cross_entropy(now, labels)
        return loss


def divergence(now: torch.Tensor, taught: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(taught ‖ now) of two models' answers, the mean over labelled places. Differentiable by the first.

    Args:
        now, taught: logits, (n, [positions,] classes). labels: (n, [positions]); places that are IGNORED are left out.
    """
    counted = labels.flatten() != IGNORED
    one, two = (
        functional.log_softmax(logits.float().flatten(0, -2)[counted], -1) for logits in (now, taught)
    )
    return functional.kl_div(one, two, reduction="batchmean", log_target=True)
