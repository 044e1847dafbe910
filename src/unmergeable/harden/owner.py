"""What an owner brings: his fine-tune, its base, his data, and other fine-tunes as stand-ins for a thief's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import open_checkpoint
from ..errors import InputError, RunError
from ..merging.grids import free_memory
from ..merging.tensors import load_state, rename_like, split
from ..merging.vectors import TaskVector, apply_vector, check_adapter, is_adapter, load_adapter
from ..merging.write import FLOATS, write_merged
from ..stock import load_module, module_state
from ..tasks import open_task
from ..tasks.task import Examples, TensorTask
from .directions import check_proxy
from .draws import Draws
from .lora import LoraWeights
from .merged import Weights, statistics

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..merging import State

# A tenth of the data is held out to measure on; FEW of them or, of little data, three tenths.
HELD, FEW, MOST, LEAST = 0.1, 300, 1000, 32
# Copies of the weights in float32 that training needs: they, as they were, their gradients twice, AdamW's two, the
# base, a merge, the task vector, a direction; the last good weights with AdamW's two, and the best. Of an adapter: the
# frozen weights, the base, a merge, the task vector, a direction. And one more for every fine-tune of the owner's.
COPIES, COPIES_ADAPTER = 14, 5
KINDS = ("image-classification", "language-modelling", "text-classification", "sequence-to-sequence")


class Owner:
    """Models and data, ready to train.

    Args:
        expert, base: folders as save_pretrained writes them; the expert may be a LoRA adapter of the base.
        fields: of the task, as in an audit's configuration: `kind`, `data`, and what the kind takes.
        models: further fine-tunes of the base, or LoRA adapters.
        work: a folder for what is made on the way.
        accelerator: says the device, and in which precision passes are run.
        copies: of the weights, that an objective holds beside those of any training.

    Attributes:
        expert: as given. module: the fine-tune's. adapter: whether it is one. weights: what is trained, and the base's.
        task: scores on held-out examples: where the task's fields have `train:`, on all of `data`, else on a tenth of
            it. training: the others.
        vectors: of the further models.

    Raises:
        InputError: models of different shapes, data that does not fit, too little of it, a further model that is the
            base or the fine-tune. RunError: not enough memory, with the estimate.
    """

    def __init__(
        self,
        expert: Path,
        base: Path,
        fields: Mapping[str, Any],
        models: Sequence[Path],
        work: Path,
        accelerator: Accelerator,
        copies: int = 0,
    ) -> None:
        self.device, self.expert = accelerator.device, expert
        self.adapter = is_adapter(expert)
        self.stored = _stored(base if self.adapter else expert)
        self._check_memory(sum(count for count, _ in self.stored.values()), len(models) + copies)
        self.module = load_module(base if self.adapter else expert)
        held = module_state(self.module)
        origin = (
            {name: tensor.clone() for name, tensor in held.items()}
            if self.adapter
            else self._state(base, held)
        )
        vectors = [self._vector(_folded(path, base, work), origin) for path in models]
        self.weights: Weights = self._adapted(expert) if self.adapter else self._whole(held, origin, expert)
        self.vectors = [self.weights.fitted(vector) for vector in vectors]
        if isinstance(self.weights, LoraWeights):
            for path, vector in zip(models, self.vectors, strict=True):
                if is_adapter(path):
                    vector.update(self.weights.fitted_factors(path))
        self._check_proxies(models)
        opened = open_task("data", fields, folder=Path(), model=base if self.adapter else expert)
        if not isinstance(opened, TensorTask):
            raise InputError("a task that cannot be trained on", expected=" | ".join(KINDS), got=opened.kind)
        training, rest = _halves(opened)
        self.training = training
        self.task = replace(opened, evaluation=rest, training=None)

    def draws(self, seed: int) -> Draws:
        """Simulated merges of its weights."""
        texts = self.task.kind == "language-modelling"
        return Draws(self.weights.shapes, seed, self.weights.adapts, texts)

    def round(self) -> None:
        """The weights as the checkpoint's dtypes will hold them: what is measured is then what is written."""
        if isinstance(self.weights, LoraWeights):
            self.weights.round(self.expert)
            return
        narrowest = min((dtype for _, dtype in self.stored.values()), key=lambda one: one.itemsize)
        with torch.no_grad():
            for name, one in self.weights.parameters.items():
                # By names in memory, which are those of the file but for a prefix; of one that is not known, all.
                dtype = self.stored.get(name, (0, narrowest))[1]
                one.copy_(one.to(dtype))

    def _check_memory(self, numbers: int, further: int) -> None:
        copies = COPIES_ADAPTER if self.adapter else COPIES
        needed, free = 4 * numbers * (copies + further), free_memory(self.device)
        if needed > free:
            raise RunError(
                "not enough memory for the weights alone",
                where=str(self.device),
                expected=f"{needed / 2**30:.1f} GiB, and more for activations",
                got=f"{free / 2**30:.1f} GiB free",
            )

    def _check_proxies(self, models: Sequence[Path]) -> None:
        """None is the base, or the fine-tune.

        Raises:
            InputError: one is.
        """
        own, names = self.weights.vector() if models else {}, self.weights.shapes.keys()
        factors = {name: own.pop(name) for name in own.keys() - names}
        for path, vector in zip(models, self.vectors, strict=True):
            check_proxy(path, {name: vector[name] for name in names}, own, self.weights.base)
            # Folded into a base in bfloat16, the same adapter's update is not what it was; its factors are.
            if factors and factors.keys() <= vector.keys():
                check_proxy(path, vector, factors)

    def _state(self, path: Path, like: State) -> dict[str, torch.Tensor]:
        """A model by the names that its class has in memory, as the fine-tune's."""
        return rename_like(like, module_state(load_module(path)))[0]

    def _whole(self, held: State, origin: State, expert: Path) -> Weights:
        """All weights that the base has, and no others, are trained."""
        shared = split(origin, {"the fine-tune": held}).shared
        # What the class computes itself, a table of positions perhaps, is in no file.
        computed = getattr(self.module, "_keys_to_ignore_on_save", None) or ()
        names = [name for name, _ in self.module.named_parameters() if name not in computed]
        parameters = [name for name in names if name in shared]
        if not parameters:
            raise InputError("nothing that the base has can be trained", where=expert)
        for name, one in self.module.named_parameters():
            one.requires_grad_(name in parameters)
        self.module.to(self.device)
        return Weights(self.module, origin, parameters, statistics(self.module, shared))

    def _adapted(self, expert: Path) -> LoraWeights:
        """The adapter's low-rank matrices are trained, and nothing else."""
        from peft import PeftModel

        check_adapter(expert)
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


def _folded(path: Path, base: Path, work: Path) -> Path:
    """A model as a folder that its stock class opens: an adapter is folded into its base."""
    if not is_adapter(path):
        return path
    folder, state = work / f"adapter-{len(list(work.iterdir()))}", load_state(base)
    # Without what it has saved whole, a head of its own: that is none of a merge's.
    write_merged(folder, apply_vector(state, TaskVector(load_adapter(path, state, base).deltas)), base)
    return folder


def _halves(task: TensorTask) -> tuple[Examples, Examples]:
    """Examples to train on, and those held out: the last ones of a random order that is always the same.

    With `train:`, those are trained on, and all others are held out.
    """
    training = task.evaluation if task.training is None else task.training
    for count, what in ((len(training), "train on"), (len(task.evaluation), "measure on")):
        if count < LEAST:
            raise InputError(
                f"too few examples to {what}", where=task.name, expected=f"at least {LEAST}", got=count
            )
    # Files may be sorted, by class or by document.
    count = len(task.evaluation)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    if task.training is not None:
        return training, task.evaluation[order[:MOST]]
    held = min(max(round(HELD * count), min(FEW, round(3 * HELD * count))), MOST)
    return task.evaluation[order[:-held]], task.evaluation[order[-held:]]


def _stored(folder: Path) -> dict[str, tuple[int, torch.dtype]]:
    """How many numbers every tensor of floats of a checkpoint holds, and in which dtype."""
    with open_checkpoint(folder) as checkpoint:
        return {
            name: (math.prod(info.shape), FLOATS[info.dtype])
            for name, info in checkpoint.tensors.items()
            if info.dtype in FLOATS
        }
