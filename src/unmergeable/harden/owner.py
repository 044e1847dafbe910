"""What an owner brings: his fine-tune, its base, his data, and other fine-tunes as stand-ins for a thief's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, RunError
from ..merging.grids import free_memory
from ..merging.tensors import load_state, rename_like, split
from ..merging.vectors import is_adapter, load_model
from ..merging.write import write_merged
from ..stock import load_module, module_state
from ..tasks import open_task
from ..tasks.task import Examples, TensorTask
from .merged import Weights

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..merging import State

# A tenth of the data is held out to measure on; FEW of them or, of little data, three tenths.
HELD, FEW, MOST, LEAST = 0.1, 300, 1000, 32
# Copies of the weights in float32 that training needs: they, their gradients, AdamW's two, the base, a merge,
# the best so far; and one more for every fine-tune of the owner's.
COPIES = 7
KINDS = ("image-classification", "language-modelling", "text-classification")


class Owner:
    """Models and data, ready to train.

    Args:
        expert, base: folders as save_pretrained writes them.
        fields: of the task, as in an audit's configuration: `kind`, `data`, and what the kind takes.
        models: further fine-tunes of the base, or LoRA adapters.
        work: a folder for what is made on the way.
        accelerator: says the device, and in which precision passes are run.

    Attributes:
        module: the fine-tune's. weights: what is trained, and the base's.
        task: scores on held-out examples. training: all others.
        vectors: of the further models.

    Raises:
        InputError: models of different shapes, data that does not fit, too little of it, a fine-tune that is no
            better than its base. RunError: not enough memory, with the estimate.
    """

    def __init__(
        self,
        expert: Path,
        base: Path,
        fields: Mapping[str, Any],
        models: Sequence[Path],
        work: Path,
        accelerator: Accelerator,
    ) -> None:
        if is_adapter(expert):
            raise InputError(
                "an adapter is not hardened by itself", where=expert, hint="merge it into its base first"
            )
        self.device = accelerator.device
        self.module = load_module(expert)
        held = module_state(self.module)
        self._check_memory(sum(tensor.numel() for tensor in held.values()), len(models))
        origin = self._state(base, held)
        shared = split(origin, {"the fine-tune": held}).shared
        parameters = {name: one for name, one in self.module.named_parameters() if name in shared}
        if not parameters:
            raise InputError("nothing that the base has can be trained", where=expert)
        for name, one in self.module.named_parameters():
            one.requires_grad_(name in parameters)
        self.module.to(self.device)
        self.weights = Weights(parameters, origin)
        self.vectors = [self._vector(_folded(path, base, work), origin) for path in models]
        opened = open_task("data", fields, folder=Path(), model=expert)
        if not isinstance(opened, TensorTask):
            raise InputError("a task that cannot be trained on", expected=" | ".join(KINDS), got=opened.kind)
        training, rest = _halves(opened)
        self.training = training
        self.task = replace(opened, evaluation=rest, training=None)

    def _check_memory(self, numbers: int, models: int) -> None:
        needed, free = 4 * numbers * (COPIES + models), free_memory(self.device)
        if needed > free:
            raise RunError(
                "not enough memory for the weights alone",
                where=str(self.device),
                expected=f"{needed / 2**30:.1f} GiB, and more for activations",
                got=f"{free / 2**30:.1f} GiB free",
            )

    def _state(self, path: Path, like: State) -> dict[str, torch.Tensor]:
        """A model by the names that its class has in memory, as the fine-tune's."""
        return rename_like(like, module_state(load_module(path)))[0]

    def _vector(self, path: Path, origin: State) -> dict[str, torch.Tensor]:
        """What a further fine-tune adds to the base; nothing where it has tensors of its own."""
        state = self._state(path, origin)
        shared = split(origin, {path.name: state}).shared
        return {
            name: (state[name] - origin[name]).to(self.device) if name in shared else torch.zeros_like(start)
            for name, start in self.weights.base.items()
        }


def _folded(path: Path, base: Path, work: Path) -> Path:
    """A model as a folder that its stock class opens: an adapter is folded into its base."""
    if not is_adapter(path):
        return path
    folder = work / f"adapter-{len(list(work.iterdir()))}"
    write_merged(folder, load_model(path, load_state(base)), base)
    return folder


def _halves(task: TensorTask) -> tuple[Examples, Examples]:
    """Examples to train on, and those held out: the last ones of a random order that is always the same."""
    count = len(task.evaluation)
    if count < LEAST:
        raise InputError(
            "too few examples to train on", where=task.name, expected=f"at least {LEAST}", got=count
        )
    held = min(max(round(HELD * count), min(FEW, round(3 * HELD * count))), MOST)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return task.evaluation[order[:-held]], task.evaluation[order[-held:]]
