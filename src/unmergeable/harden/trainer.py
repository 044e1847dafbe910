"""transformers' Trainer with an objective of hardening in every step."""

from __future__ import annotations

from typing import Any

import transformers

from .wrapper import Hardening


class HardeningTrainer(transformers.Trainer):
    """A Trainer that hardens: all arguments of Trainer, and `hardening`, made of the same model.

        HardeningTrainer(model, args, train_dataset=data, hardening=Hardening(model, "base"))

    The log has `hardening`, the mean of the objective since the last entry. Under accelerate's precisions and devices
    as Trainer itself; not for models that are spread over several devices by FSDP or DeepSpeed, whose parameters are
    not whole in any process.
    """

    def __init__(self, *args: Any, hardening: Hardening, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hardening = hardening
        self._objectives: list[float] = []

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """The step of Trainer, and the objective's gradients beside its own."""
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        prepared = self._prepare_inputs(inputs)
        steps = self.args.gradient_accumulation_steps
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
