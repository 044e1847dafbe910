"""What a task is: examples, what a model scores on each of them, and a loss to train on.

Scores are per example and higher is better: 1 or 0 for a right or wrong answer, or minus the mean loss in nats
a token. Means over examples, differences and bootstraps are for whoever compares models.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputError, RunError, UnmergeableError, UsageError

Floats = NDArray[np.float64]
# A module, or `functional_call` of one: the model's keyword inputs -> its output, with `.logits`.
Call = Callable[..., Any]

IGNORED = -100  # a label that counts for nothing, as in torch and transformers
METRICS = ("accuracy", "cross-entropy")


@dataclass(frozen=True)
class Examples:
    """Some examples of a task.

    Attributes:
        inputs: the model's keyword arguments, each (n, …).
        labels: (n,) classes, or (n, positions) tokens, aligned with the task's logits; IGNORED ones are left out.
    """

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Sequence[int] | torch.Tensor | slice) -> Examples:
        """A part of them, in the order of the index."""
        rows = index if isinstance(index, slice) else torch.as_tensor(index, dtype=torch.long)
        return Examples({name: values[rows] for name, values in self.inputs.items()}, self.labels[rows])

    def to(self, device: torch.device | str) -> Examples:
        """The same on a device."""
        return Examples({n: v.to(device) for n, v in self.inputs.items()}, self.labels.to(device))

    def batches(self, size: int) -> Iterator[Examples]:
        """In their order, so many at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @property
    def tokens(self) -> int:
        """How many labels there are: tokens of a text, or one an example."""
        return int((self.labels != IGNORED).sum())

    def digest(self) -> str:
        """SHA-256 of names, shapes, dtypes and values."""
        found = hashlib.sha256()
        for name, values in [*sorted(self.inputs.items()), ("", self.labels)]:
            plain = values.detach().cpu().contiguous()
            found.update(f"{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
            found.update(plain.flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()


class Task(ABC):
    """A task to score models on.

    Attributes:
        name: as the configuration calls it; its fine-tune has the same name.
        kind: as `tasks.KINDS` lists it.
        metric: what a score is.
        digest: SHA-256 of everything that scores depend on but the model.
        screen: how many examples are enough for a first look.
        complete: whether the digest covers all of that; not what a function of the user's reads by itself.
    """

    complete: ClassVar[bool] = True

    name: str
    kind: str
    metric: str
    digest: str
    screen: int

    @abstractmethod
    def __len__(self) -> int:
        """How many examples models are scored on."""

    @abstractmethod
    def score(self, module: torch.nn.Module, index: Sequence[int]) -> Floats:
        """The score of a model on some of the examples, (n,); higher is better.

        Raises:
            RunError: the model or the evaluation fails. InputError: scores that are not finite.
        """


def finite(scores: Floats, name: str) -> Floats:
    """Scores of a task, if all of them are numbers.

    Raises:
        InputError: some are infinite or none.
    """
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        got = f"{len(bad)} of {len(scores)} that are not, the first is {scores[bad[0]]}"
        raise InputError("scores are not finite", where=name, expected="finite numbers", got=got)
    return scores


def hidden_states(call: Call, inputs: Mapping[str, Any], where: str) -> tuple[torch.Tensor, ...]:
    """Hidden states of a model for a batch, first to last, (n, positions, width) each; of a decoder if it has one.

    Raises:
        InputError: the model gives none.
    """
    output = call(**inputs, output_hidden_states=True)
    found = getattr(output, "hidden_states", None) or getattr(output, "decoder_hidden_states", None)
    if not found:
        what = "the model gives no hidden states to learn from"
        raise InputError(what, where=where, got=type(output).__name__)
    return tuple(found)


@dataclass(frozen=True)
class TensorTask(Task):
    """A task whose examples are tensors: it can be scored, and trained on.

    Attributes:
        evaluation: what models are scored on.
        training: what a thief, or an owner, may train on: other examples; None if there are none.
        next_token: logits at a position are for the next one, and the last is left out.
        batch: examples at a time when scoring.
        augment: a random change of a batch of inputs that keeps its labels, for training; None if none is known.
        classes: how many, of a classification.
        constants: further keyword arguments of every call, the same for all examples.
    """

    name: str
    kind: str
    metric: str
    evaluation: Examples
    training: Examples | None = None
    next_token: bool = False
    batch: int = 64
    screen: int = 96
    augment: Callable[[Examples, torch.Generator], Examples] | None = None
    classes: int | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    digest: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError("no such metric", where=self.name, expected=" | ".join(METRICS), got=self.metric)
        text = f"{self.kind}|{self.metric}|{self.next_token}|{self.batch}|{self.evaluation.digest()}|"
        text += self.training.digest() if self.training is not None else ""
        object.__setattr__(self, "digest", hashlib.sha256(text.encode()).hexdigest())

    def __len__(self) -> int:
        return len(self.evaluation)

    def logits(self, call: Call, batch: Examples) -> torch.Tensor:
        """What a model answers, (n, [positions,] classes), aligned with the labels."""
        logits: torch.Tensor = call(**batch.inputs, **self.constants).logits
        return logits[:, :-1] if self.next_token else logits

    def states(self, call: Call, batch: Examples) -> tuple[torch.Tensor, ...]:
        """A model's hidden states, first to last; see `hidden_states`."""
        return hidden_states(call, {**batch.inputs, **self.constants}, self.name)

    def loss(self, call: Call, batch: Examples) -> torch.Tensor:
        """The mean cross-entropy of a batch in nats, differentiable."""
        return cross_entropy(self.logits(call, batch), batch.labels)

    def score(self, module: torch.nn.Module, index: Sequence[int]) -> Floats:
        return self._each(module, index, self.metric)

    def losses(self, module: torch.nn.Module, index: Sequence[int]) -> Floats:
        """The mean cross-entropy of a model on some of the examples in nats, (n,), whatever the metric.

        Raises:
            As `score`.
        """
        return -self._each(module, index, "cross-entropy")

    def _each(self, module: torch.nn.Module, index: Sequence[int], metric: str) -> Floats:
        device = next(module.parameters()).device
        found = []
        with torch.inference_mode():
            for batch in self.evaluation[index].batches(self.batch):
                placed = batch.to(device)
                try:
                    logits = self.logits(module, placed)
                except UnmergeableError:
                    raise
                except Exception as error:  # a model may fail in any way
                    got = f"{type(error).__name__}: {str(error)[:200]}"
                    raise RunError("the model fails on the task", where=self.name, got=got) from error
                if logits.shape[:-1] != placed.labels.shape:
                    raise InputError(
                        "the model's answers have another shape than the labels",
                        where=self.name,
                        expected=[*placed.labels.shape, "classes"],
                        got=list(logits.shape),
                        hint=f"is its class one for {self.kind}?",
                    )
                found.append(_scores(metric, logits, placed.labels).cpu().double().numpy())
        scores = np.concatenate(found) if found else np.empty(0)
        return finite(scores, self.name)

    def few(self, each: int, seed: int) -> Examples:
        """Training examples of a thief who has few: so many of each class, or so many texts.

        Raises:
            InputError: the task has no training examples.
        """
        if self.training is None:
            raise InputError("the task has no training examples", where=self.name, hint="give it train:")
        random = np.random.default_rng([seed, 0xFE3])
        labels = self.training.labels.cpu().numpy()
        if labels.ndim > 1:
            return self.training[np.sort(random.permutation(len(labels))[:each]).tolist()]
        chosen = [random.permutation(np.flatnonzero(labels == c))[:each] for c in np.unique(labels)]
        return self.training[np.concatenate(chosen).tolist()]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over labelled places in nats, differentiable.

    Args:
        logits: (n, [positions,] classes). labels: (n, [positions]); places that are IGNORED are left out.
    """
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED
    )


def _scores(metric: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per example: the mean over its labels of what is right, or of minus the loss."""
    if labels.ndim == 1:
        logits, labels = logits[:, None], labels[:, None]
    counted = labels != IGNORED
    if metric == "accuracy":
        # NaN would pass for a wrong answer: it is no answer, and `score` says so.
        values = (logits.argmax(-1) == labels).float() + 0 * logits.float().sum(-1)
    else:
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        values = -losses.reshape(labels.shape)
    return torch.where(counted, values, 0).sum(-1) / counted.sum(-1).clamp(min=1)
