"""Hardening in a training of one's own: one call after the loss's backward pass, or a Trainer that makes it.

hardening = Hardening(model, "base")
for inputs in batches:
    model(**inputs).loss.backward()
    hardening.backward(inputs)
    optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..audit.init import kind_of
from ..errors import InputError, UsageError
from ..merging.tensors import rename_like, split
from ..merging.vectors import is_adapter, load_adapter
from ..stock import load_module, module_state
from ..tasks.task import IGNORED, Call, Examples, cross_entropy, hidden_states
from .attention import attending
from .directions import Directions, check_made, check_proxy
from .draws import Draws
from .lora import LoraWeights, inner
from .merged import Weights, freeze_statistics, modes_kept, statistics
from .objectives import Step, needs_before, objective

if TYPE_CHECKING:
    from ..merging import State

    Model = str | os.PathLike[str] | State

# Endings of classes with labels for positions: whose logits are for the label there, and which have texts beside
# pictures or sound, and predict the next token of them.
ALIGNED, SHIFTED = ("ForMaskedLM", "ForTokenClassification"), "ForConditionalGeneration"
# What configurations call the tokens in a text that pictures, films and sound stand at.
PLACES = tuple(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index"))


class Hardening:
    """Adds the gradients of an objective to those of a model that is being trained.

    Args:
        model: a stock module in training; its parameters that require gradients, and that the base has, are hardened.
            Of a peft model, or of one with transformers' own `add_adapter`, its LoRA adapter.
        base: what it is fine-tuned from: a folder, or tensors by the model's names. One with an adapter has it in
            itself.
        name: an objective, as `harden` takes it.
        strength: its factor.
        proxies: fine-tunes of the base in the place of a thief's: folders (of LoRA adapters too), or tensors.
        made: directions that are made up beside them: `random`, `spectrum`.
        next_token: whether logits at a position are for the next label; if not given, the model's class says it.
        seed: of everything random.

    Raises:
        UsageError: no such objective or direction, none at all, no base, a strength below 0, `kindred` for a model
            that is not fine-tuned yet. InputError: a base or
            proxies of other shapes, a proxy that is the base, not one adapter of linear layers.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        base: Model | None = None,
        name: str = "trap",
        *,
        strength: float = 0.15,
        proxies: Sequence[Model] = (),
        made: Sequence[str] = ("random",),
        next_token: bool | None = None,
        seed: int = 0,
    ) -> None:
        check_made(made)
        if not made and not proxies:
            hint = "give proxies, or directions to make"
            raise UsageError("nothing in the place of a thief's fine-tunes", hint=hint)
        if not strength >= 0:
            raise UsageError("no strength", where="strength", expected="0 or more", got=strength)
        self.model, self.objective, self.strength = model, objective(name), strength
        self.next_token, self.seed = next_token, seed
        self.weights = _adapted(model, base) if hasattr(model, "peft_config") else _whole(model, base)
        device = next(iter(self.weights.parameters.values())).device
        vectors = [_vector(model, self.weights, proxy) for proxy in proxies]
        for number, (proxy, vector) in enumerate(zip(proxies, vectors, strict=True)):
            added = {name: vector[name] for name in self.weights.shapes}
            place = f"proxies[{number}]" if isinstance(proxy, Mapping) else proxy
            check_proxy(place, added, base=self.weights.base)
        texts = _is_language_model(model) if next_token is None else next_token
        self.draws = Draws(self.weights.shapes, seed + 1, self.weights.adapts, texts)
        self.directions = Directions(vectors, made, seed + 2, device)
        self.before = self.weights.snapshot() if needs_before(self.objective) else {}
        if self.before and not any(one.any() for one in self.before.values()):
            what = "an objective for finished fine-tunes, and the model is its base still"
            raise UsageError(what, where=name, hint="fine-tune it first, or leave kindred out")

    def begin(self, step: int) -> None:
        """From here on, the draws of this step: a training that goes on from a checkpoint has those of one that was
        never stopped."""
        self.draws.generator.manual_seed(_mixed(self.seed + 1, step))
        self.directions.generator.manual_seed(_mixed(self.seed + 2, step))
        self.directions.noise.manual_seed(_mixed(self.seed + 2, step))

    def backward(
        self, inputs: Mapping[str, Any], backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
    ) -> float:
        """Add the objective's gradients for a batch; returns the objective.

        Args:
            inputs: of the model, with `labels`. What is not a tensor of one entry an example is passed as it is; if it
                may be of some of the examples (pictures of texts, as many as there are), merges see the whole batch.
            backward: of a loss; accelerate's, where that is used.

        Raises:
            UsageError: no labels, or ones that are no classes, or that it cannot be said which logits they are for.
        """
        if "labels" not in inputs:
            raise UsageError("a batch without labels", expected="labels", got=", ".join(inputs))
        labels = inputs["labels"]
        if labels.is_floating_point():
            what = "labels that are no classes"
            raise UsageError(what, where="labels", expected="integers", got=str(labels.dtype))
        if not (labels != IGNORED).any():
            return 0.0
        config: Any = getattr(self.model, "config", None)
        shifted = _shifted(self.model, labels) if self.next_token is None else self.next_token
        rest = {name: value for name, value in inputs.items() if name != "labels" and _batched(value, labels)}
        constants = {name: value for name, value in inputs.items() if name != "labels" and name not in rest}
        if getattr(config, "is_encoder_decoder", False):
            rest["labels"] = labels  # the decoder's inputs are made of them
        batch = Examples(rest, labels[:, 1:] if shifted else labels)
        learner = _Labelled(shifted, constants)
        whole = not all(map(_plain, constants.values())) or _uneven(config, inputs)
        step = Step(
            self.weights,
            self.draws,
            self.directions,
            learner,
            self.model,
            batch,
            backward,
            self.before,
            whole,
        )
        # What merges do not share, a head, learns its task and nothing else.
        held = {id(one) for one in self.weights.parameters.values()}
        rest_of_all = [one for one in self.model.parameters() if one.requires_grad and id(one) not in held]
        for one in rest_of_all:
            one.requires_grad_(False)
        try:
            with attending(labels.device), modes_kept(self.model):
                freeze_statistics(self.model)
                return self.objective.add(step, self.strength)
        finally:
            for one in rest_of_all:
                one.requires_grad_(True)


@dataclass(frozen=True)
class _Labelled:
    """A task of batches that come with their labels; constants are passed with every part of one."""

    next_token: bool
    constants: Mapping[str, Any]

    def logits(self, call: Call, batch: Examples) -> torch.Tensor:
        """As TensorTask's."""
        logits: torch.Tensor = call(**batch.inputs, **self.constants).logits
        return logits[:, :-1] if self.next_token else logits

    def states(self, call: Call, batch: Examples) -> tuple[torch.Tensor, ...]:
        """As TensorTask's."""
        return hidden_states(call, {**batch.inputs, **self.constants}, "the model")

    def loss(self, call: Call, batch: Examples) -> torch.Tensor:
        """As TensorTask's."""
        return cross_entropy(self.logits(call, batch), batch.labels)


def _class(model: torch.nn.Module) -> str:
    return type(inner(model)).__name__


def _is_language_model(model: Any) -> bool:
    return kind_of({"architectures": [_class(model)]}) == "language-modelling"


def _shifted(model: Any, labels: torch.Tensor) -> bool:
    """Whether logits at a position are for the label of the next one."""
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if labels.ndim == 1 or decodes or _class(model).endswith(ALIGNED):
        return False
    if _is_language_model(model) or _class(model).endswith(SHIFTED):
        return True
    raise UsageError(
        "labels with positions, of a class of which it is not known which logits they are for",
        where=_class(model),
        hint="say by next_token whether logits at a position are for the next label (True) or for the one there",
    )


def _batched(value: Any, labels: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == len(labels)


def _plain(value: Any) -> bool:
    """Whether an input is the same for any part of a batch."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0
    return value is None or isinstance(value, (bool, int, float, str))


def _uneven(config: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether texts differ in their pictures, films or sound: there may be as many as texts by chance alone."""
    texts = inputs.get("input_ids")
    if texts is None:
        return False
    tokens = {getattr(config, name, None) for name in PLACES} - {None}
    counts = [(texts == token).sum(1) for token in tokens]
    return any(bool((count != count[0]).any()) for count in counts)


def _mixed(seed: int, step: int) -> int:
    """A seed of two numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:7], "big")


def _whole(model: torch.nn.Module, base: Model | None) -> Weights:
    """What is trained of a model, and the base has."""
    if base is None:
        raise UsageError("no base", where="base", hint="give the folder of what the model is fine-tuned from")
    held = module_state(model)
    origin = rename_like(held, _tensors(base))[0]
    shared = split(origin, {"the model": held}).shared
    parameters = [n for n, p in model.named_parameters() if p.requires_grad and n in shared]
    if not parameters:
        raise InputError("nothing that the base has is being trained", where=type(model).__name__)
    return Weights(model, origin, parameters, statistics(model, shared))


def _adapted(model: torch.nn.Module, base: Model | None) -> LoraWeights:
    """A model's adapter, whose base is below it."""
    if base is not None:
        raise UsageError("a model with an adapter has its base in itself", where="base", hint="leave it out")
    return LoraWeights(model)


def _vector(model: torch.nn.Module, weights: Weights, proxy: Model) -> dict[str, torch.Tensor]:
    """What another fine-tune adds to the base."""
    if isinstance(weights, LoraWeights):
        # As the model was before peft took its layers over.
        held = module_state(inner(model))
        origin = {n.replace(".base_layer.", "."): one for n, one in held.items() if ".lora_" not in n}
    else:
        origin = weights.base
    if not isinstance(proxy, Mapping) and is_adapter(proxy):
        vector = weights.fitted(load_adapter(proxy, origin).deltas)
        if isinstance(weights, LoraWeights):
            vector.update(weights.fitted_factors(Path(proxy)))
        return vector
    state = rename_like(origin, _tensors(proxy))[0]
    shared = split(origin, {"a proxy": state}).shared
    return weights.fitted({n: state[n].to(origin[n].device) - origin[n] for n in shared})


def _tensors(model: Model) -> State:
    """A model by the names that its class has in memory."""
    return model if isinstance(model, Mapping) else module_state(load_module(model))
