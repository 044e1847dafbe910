"""Hardening in a training of one's own: one call after the loss's backward pass, or a Trainer that makes it.

hardening = Hardening(model, "base")
for inputs in batches:
    model(**inputs).loss.backward()
    hardening.backward(inputs)
    optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, UsageError
from ..merging.tensors import rename_like, split
from ..stock import load_module, module_state
from ..tasks.task import IGNORED, Call, Examples, hidden_states
from .directions import Directions, check_made
from .draws import Draws
from .merged import Weights
from .objectives import Step, objective

if TYPE_CHECKING:
    from ..merging import State

    Model = str | os.PathLike[str] | State


class Hardening:
    """Adds the gradients of an objective to those of a model that is being trained.

    Args:
        model: a stock module in training; its parameters that require gradients, and that the base has, are hardened.
        base: what it is fine-tuned from: a folder, or tensors by the model's names.
        name: an objective, as `harden` takes it.
        strength: its factor.
        proxies: fine-tunes of the base in the place of a thief's: folders, or tensors.
        made: directions that are made up beside them: `random`, `spectrum`.
        next_token: whether logits at a position are for the next label; of labels with positions they are, unless the
            model has an encoder and a decoder.
        seed: of everything random.

    Raises:
        UsageError: no such objective or direction. InputError: a base or proxies of other shapes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        base: Model,
        name: str = "trap",
        *,
        strength: float = 0.15,
        proxies: Sequence[Model] = (),
        made: Sequence[str] = ("random",),
        next_token: bool | None = None,
        seed: int = 0,
    ) -> None:
        check_made(made)
        self.model, self.objective, self.strength = model, objective(name), strength
        self.next_token = next_token
        held = module_state(model)
        origin = rename_like(held, _tensors(base))[0]
        shared = split(origin, {"the model": held}).shared
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and n in shared}
        if not parameters:
            raise InputError("nothing that the base has is being trained", where=type(model).__name__)
        self.weights = Weights(parameters, origin)
        vectors = []
        for number, proxy in enumerate(proxies):
            state = rename_like(origin, _tensors(proxy))[0]
            split(origin, {f"proxy {number}": state})
            vectors.append({n: state[n].to(start) - start for n, start in self.weights.base.items()})
        self.draws = Draws(self.weights.shapes, seed + 1)
        self.directions = Directions(vectors, made, seed + 2, next(iter(parameters.values())).device)

    def backward(
        self, inputs: Mapping[str, Any], backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
    ) -> float:
        """Add the objective's gradients for a batch; returns the objective.

        Args:
            inputs: of the model, with `labels`.
            backward: of a loss; accelerate's, where that is used.

        Raises:
            UsageError: no labels.
        """
        if "labels" not in inputs:
            raise UsageError("a batch without labels", expected="labels", got=", ".join(inputs))
        labels = inputs["labels"]
        config: Any = getattr(self.model, "config", None)
        shifted = self.next_token
        if shifted is None:
            shifted = labels.ndim > 1 and not getattr(config, "is_encoder_decoder", False)
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        if getattr(config, "is_encoder_decoder", False):
            rest["labels"] = labels  # the decoder's inputs are made of them
        batch = Examples(rest, labels[:, 1:] if shifted else labels)
        learner = _Labelled(bool(shifted))
        step = Step(self.weights, self.draws, self.directions, learner, self.model, batch, backward)
        # What merges do not share, a head, learns its task and nothing else.
        held = {id(one) for one in self.weights.parameters.values()}
        rest_of_all = [one for one in self.model.parameters() if one.requires_grad and id(one) not in held]
        for one in rest_of_all:
            one.requires_grad_(False)
        try:
            return self.objective.add(step, self.strength)
        finally:
            for one in rest_of_all:
                one.requires_grad_(True)


@dataclass(frozen=True)
class _Labelled:
    """A task of batches that come with their labels."""

    next_token: bool

    def logits(self, call: Call, batch: Examples) -> torch.Tensor:
        """As TensorTask's."""
        logits: torch.Tensor = call(**batch.inputs).logits
        return logits[:, :-1] if self.next_token else logits

    def states(self, call: Call, batch: Examples) -> tuple[torch.Tensor, ...]:
        """As TensorTask's."""
        return hidden_states(call, batch.inputs, "the model")

    def loss(self, call: Call, batch: Examples) -> torch.Tensor:
        """As TensorTask's."""
        logits = self.logits(call, batch).float().flatten(0, -2)
        return torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED)


def _tensors(model: Model) -> State:
    """A model by the names that its class has in memory."""
    return model if isinstance(model, Mapping) else module_state(load_module(model))
