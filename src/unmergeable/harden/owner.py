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
from .lora import LoraWeights
from .merged import Weights

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..merging import State

# A tenth of the data is held out to measure on; FEW of them or, of little data, three tenths.
HELD, FEW, MOST, LEAST = 0.1, 300, 1000, 32
# Copies of the weights in float32 that training needs: they, their gradients twice, AdamW's two, the base, a merge,
# the task vector, a direction, the best so far; and one more for every fine-tune of the owner's.
COPIES = 10
KINDS = ("image-classification", "language-modelling", "text-classification", "sequence-to-sequence")


class Owner:
    """Models and data, ready to train.

    Args:
        expert, base: folders as save_pretrained writes them; the expert may be a LoRA adapter of the base.
        fields: of the task, as in an audit's configuration: `kind`, `data`, and what the kind takes.
        models: further fine-tunes of the base, or LoRA adapters.
        work: a folder for what is made on the way.
        accelerator: says the device, and in which precision passes are run.

    Attributes:
        module: the fine-tune's. adapter: whether it is one. weights: what is trained, and the base's.
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
        self.device = accelerator.device
        self.adapter = is_adapter(expert)
        self.module = load_module(base if self.adapter else expert)
        held = module_state(self.module)
        self._check_memory(sum(tensor.numel() for tensor in held.values()), len(models))
        origin = (
            {name: tensor.clone() for name, tensor in held.items()}
            if self.adapter
            else self._state(base, held)
        )
        vectors = [self._vector(_folded(path, base, work), origin) for path in models]
        self.weights: Weights = self._adapted(expert) if self.adapter else self._whole(held, origin, expert)
        self.vectors = [self._placed(vector) for vector in vectors]
        opened = open_task("data", fields, folder=Path(), model=base if self.adapter else expert)
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

    def _whole(self, held: State, origin: State, expert: Path) -> Weights:
        """All weights that the base has, and no others, are trained."""
        shared = split(origin, {"the fine-tune": held}).shared
        parameters = {name: one for name, one in self.module.named_parameters() if name in shared}
        if not parameters:
            raise InputError("nothing that the base has can be trained", where=expert)
        for name, one in self.module.named_parameters():
            one.requires_grad_(name in parameters)
        self.module.to(self.device)
        return Weights(parameters, origin)

    def _adapted(self, expert: Path) -> LoraWeights:
        """The adapter's low-rank matrices are trained, and nothing else."""
        from peft import PeftModel

        try:
            self.module = PeftModel.from_pretrained(self.module, str(expert), is_trainable=True)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            said = str(error).partition("\n")[0][:300]
            raise InputError("peft does not open the adapter on its base", where=expert, got=said) from error
        self.module.to(self.device)
        weights = LoraWeights(self.module)
        trained = {id(one) for one in weights.parameters.values()}
        for one in self.module.parameters():
            one.requires_grad_(id(one) in trained)
        return weights

    def _vector(self, path: Path, origin: State) -> dict[str, torch.Tensor]:
        """What a further fine-tune adds to the base, where both have the same tensors."""
        state = self._state(path, origin)
        shared = split(origin, {path.name: state}).shared
        return {name: state[name] - origin[name] for name in shared}

    def _placed(self, vector: State) -> dict[str, torch.Tensor]:
        """By the names and shapes of the weights; nothing where a fine-tune has tensors of its own."""
        found = {}
        for name, shape in self.weights.shapes.items():
            delta = vector.get(name)
            if delta is None:
                delta = torch.zeros(shape)
            found[name] = (delta if delta.shape == shape else delta.T).to(self.device)
        return found


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
