"""Accuracies on the embedded zoo: one body of weights, under the head of each task."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from . import zoo
from .merging import Merged

State = Mapping[str, torch.Tensor]

Item = TypeVar("Item")
Result = TypeVar("Result")

CHOOSE, REPORT = 100, 400  # images a task: to choose a merge on, and to report it on
MOST_WORKERS = 8


class Spread(Protocol):
    """A `map` over several threads."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]: ...


@contextmanager
def one_core_each() -> Iterator[Spread]:
    """A `map` over threads with one core each: many small models run faster so than one on all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(MOST_WORKERS, len(os.sched_getaffinity(0)))) as pool:

            def spread(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
                return list(pool.map(function, items))

            yield spread
    finally:
        torch.set_num_threads(before)


class Scorer:
    """The zoo's models and images, and what a state dict is worth on them.

    Attributes:
        tasks: all tasks, the protected one first. own: the thief's.
        path, expert: the protected model's folder and state dict. others: the thief's fine-tunes.
        base_state: the base's state dict.
        base, plain: accuracy of the base, and of each task's own fine-tune, on the reported half.
    """

    def __init__(self, protected: str) -> None:
        self.tasks = [protected, *(task for task in zoo.tasks() if task != protected)]
        self.own = self.tasks[1:]
        self.path = zoo.model_path(protected)
        self._models = {task: zoo.load_model(zoo.model_path(task)) for task in self.tasks}
        self.expert = self._models[protected].state_dict()
        self.others = {task: self._models[task].state_dict() for task in self.own}
        self.base_state = self.load(zoo.model_path(zoo.BASE))
        self._local = threading.local()  # a model holds one state at a time: every thread has its own
        self._images: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for task in self.tasks:
            images, labels = zoo.images(task)
            pixels = torch.from_numpy(zoo.pixels(images[: CHOOSE + REPORT]))
            self._images[task] = pixels, torch.from_numpy(labels[: CHOOSE + REPORT])
        fine_tunes = {protected: self.expert, **self.others}
        heads = {task: self._head(fine_tunes[task]) for task in self.tasks}
        self._heads = heads
        self.base = {t: self.accuracy({**self.base_state, **heads[t]}, t) for t in self.tasks}
        self.plain = {t: self.accuracy(fine_tunes[t], t) for t in self.tasks}
        self._base_chosen = {t: self._right({**self.base_state, **heads[t]}, t, True) for t in self.tasks}
        self._plain_chosen = {t: self._right(fine_tunes[t], t, True) for t in self.tasks}
        self._outputs = self._logits(self.expert, protected, False)
        self._protected = protected

    @staticmethod
    def load(path: Path) -> dict[str, torch.Tensor]:
        """A model folder's weights in float32, by the names that the loaded model has for them."""
        return dict(zoo.load_model(path).state_dict())

    def sizes(self, task: str) -> tuple[int, int]:
        """Images to choose on, and to report on."""
        return CHOOSE, len(self._images[task][1]) - CHOOSE

    def accuracy(self, state: State, task: str) -> float:
        """Accuracy on the reported half."""
        return self._right(state, task, False)

    def value(self, task: str, accuracy: float) -> float:
        """An accuracy on the scale on which the base is 0 and the task's own fine-tune is 1."""
        return (accuracy - self.base[task]) / (self.plain[task] - self.base[task])

    def values(self, merged: Merged, *, chosen: bool) -> dict[str, float]:
        """The value of a merge on every task, on the half that merges are chosen on or on the other."""
        if not chosen:
            return {t: self.value(t, self.accuracy(merged.for_task(t), t)) for t in self.tasks}
        return {
            t: (self._right(merged.for_task(t), t, True) - self._base_chosen[t])
            / (self._plain_chosen[t] - self._base_chosen[t])
            for t in self.tasks
        }

    def alone(self) -> tuple[float, float]:
        """The protected model by itself, under each task's head: its own value and the worst other's."""
        body = {name: tensor for name, tensor in self.expert.items() if name in self.base_state}
        shared = {name: t for name, t in body.items() if t.shape == self.base_state[name].shape}
        value = {t: self.value(t, self.accuracy({**shared, **self._heads[t]}, t)) for t in self.tasks}
        return value[self._protected], min(value[task] for task in self.own)

    def output_change(self, state: State) -> float:
        """The largest change of an output of the protected model, relative to its largest output."""
        outputs = self._logits(state, self._protected, False)
        return float((outputs - self._outputs).abs().max() / self._outputs.abs().max())

    def distance(self, path: Path) -> float:
        """The largest relative difference of a tensor to the protected model's: ‖a − b‖ / ‖b‖."""
        other = self.load(path)
        return max(
            float((other[name] - tensor).norm() / tensor.norm().clamp(min=1e-30))
            for name, tensor in self.expert.items()
        )

    def _head(self, fine_tune: State) -> State:
        """What of a fine-tune the base does not have: the head of its task."""
        return {
            name: tensor
            for name, tensor in fine_tune.items()
            if name not in self.base_state or tensor.shape != self.base_state[name].shape
        }

    def _right(self, state: State, task: str, chosen: bool) -> float:
        labels = self._images[task][1]
        labels = labels[:CHOOSE] if chosen else labels[CHOOSE:]
        return float((self._logits(state, task, chosen).argmax(-1) == labels).float().mean())

    def _logits(self, state: State, task: str, chosen: bool) -> torch.Tensor:
        pixels = self._images[task][0]
        pixels = pixels[:CHOOSE] if chosen else pixels[CHOOSE:]
        if not hasattr(self._local, "models"):
            self._local.models = copy.deepcopy(self._models)
        model: Any = self._local.models[task]
        with torch.inference_mode():
            return torch.func.functional_call(model, dict(state), (pixels,)).logits
