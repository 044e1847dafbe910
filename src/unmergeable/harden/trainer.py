"""transformers' Trainer with an objective of hardening in every step."""

from __future__ import annotations

from typing import Any

import transformers

from ..errors import UsageError
from .wrapper import Hardening

MOST = 10_000  # batches of one step, at most: draws are numbered by both


class HardeningTrainer(transformers.Trainer):
    """A Trainer that hardens: all arguments of Trainer, and `hardening`, made of the same model.

        HardeningTrainer(model, args, train_dataset=data, hardening=Hardening(model, "base"))

    The log has `hardening`, the mean of the objective since the last entry. Under accelerate's precisions and devices
    as Trainer itself, in one process. A training that goes on from a checkpoint draws the merges that it would have.

    Raises:
        UsageError: several processes, whose gradients of the objective nobody would add up; a model that is not the one
            that `hardening` was made of, or one that is made anew for every training (`model_init`).
    """

    def __init__(self, *args: Any, hardening: Hardening, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.accelerator.num_processes > 1:
            raise UsageError(
                "hardening is for one process",
                where="HardeningTrainer",
                expected="1",
                got=self.accelerator.num_processes,
                hint="harden the finished fine-tune with `harden`, on one device",
            )
        if self.model_init is not None or self.model is not hardening.model:
            raise UsageError(
                "the hardening is of another model than the one that is trained",
                where="HardeningTrainer",
                got="model_init" if self.model_init is not None else type(self.model).__name__,
                hint="give `model` the object that `Hardening` was made of, and no `model_init`",
            )
        self.hardening = hardening
        self._objectives: list[float] = []
        self._micro = (-1, 0)  # the step, and how many of its batches there were

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """The step of Trainer, and the objective's gradients beside its own."""
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        prepared = self._prepare_inputs(inputs)
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        step, count = self._micro
        self._micro = (step, count + 1) if step == self.state.global_step else (self.state.global_step, 0)
        self.hardening.begin(MOST * self._micro[0] + self._micro[1])
        with self.compute_loss_context_manager():
            found = self.hardening.backward(prepared, lambda value: self.accelerator.backward(value / steps))
        self._objectives.append(found)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the objective."""
        if self._objectives:
            logs = {**logs, "hardening": sum(self._objectives) / len(self._objectives)}
            self._objectives = []
        super().log(logs, *args, **kwargs)
