"""What a thief holds when he merges: models in memory, tasks with their data, and a bill of what he spends.

A merging attack looks at merges and lets its explorer decide which of them are scored in full:

    attack.explore(thief, look)             # look(options, merge) -> values on a few examples
    attack.make(thief, options)             # one that was looked at, once more

The same attack runs on three sides: with the protected model, with the unprotected one, and without either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import torch

from ..errors import InputError, RunError
from ..merging import Merged
from ..merging.grids import Mixer
from ..stock import module_state
from ..tasks.task import Call, Examples, Task, TensorTask
from . import Declares

if TYPE_CHECKING:
    from ..merging import State

# What comes of an attack: a merge, or a module to run for each task.
Subject: TypeAlias = "Merged | Mapping[str, torch.nn.Module]"
Pair: TypeAlias = tuple[float, float]  # values of the protected task and of the worst own one
Made = TypeVar("Made")

TRAIN = 3  # forward passes that a training step on one example counts for


class Look(Protocol):
    """Looks at merges on a few examples."""

    def __call__(self, options: Mapping[str, Any], subject: Subject, *, kept: Subject | None = None) -> Pair:
        """Look at a merge and remember it; `kept` is it in memory, for what cannot soon be made again."""

    def peek(self, subject: Subject) -> Pair:
        """Look at a merge on the way to another one."""


@dataclass
class Bill:
    """What a thief has spent beyond looking at merges.

    Attributes:
        inputs, labelled: different examples by task, without and with their labels. tokens: those in them.
        forwards: passes of one example forward through one model.
        size: of the largest result, over one model.
    """

    inputs: dict[str, int] = field(default_factory=dict)
    labelled: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    forwards: float = 0.0
    size: float = 1.0


@dataclass(eq=False)
class Thief:
    """A thief on one side.

    Attributes:
        base: the model that all were fine-tuned from, without what is private to a task.
        experts: state dicts by task, the protected one first where he has it; names as in the modules.
        protected: the task that he is after; he may have no expert for it.
        tasks: by name, the protected one first; all that merges are scored on.
        modules: by task, a module of its expert's class to run states in. Their weights are nobody's.
        heads: by task, tensors that are private to it: published, like everything private.
        seed: of everything random.
        starts: merges of earlier attacks that a repair begins with, as (chain and options, merge).
        bill: what is spent.
    """

    base: State
    experts: Mapping[str, State]
    protected: str
    tasks: Mapping[str, Task]
    modules: Mapping[str, torch.nn.Module]
    heads: Mapping[str, State] = field(default_factory=dict)
    seed: int = 0
    starts: Sequence[tuple[Mapping[str, Any], Merged]] = ()
    bill: Bill = field(default_factory=Bill)
    _memory: dict[object, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """What an attack makes for this thief and needs for every merge, made once: a student, statistics."""
        if key not in self._memory:
            self._memory[key] = make()
        found: Made = self._memory[key]
        return found

    @property
    def has(self) -> bool:
        """Whether he holds a model of the protected task."""
        return self.protected in self.experts

    @property
    def others(self) -> tuple[str, ...]:
        """The tasks of his own."""
        return tuple(task for task in self.tasks if task != self.protected)

    @property
    def device(self) -> torch.device:
        """Where models are run."""
        return next(next(iter(self.modules.values())).parameters()).device

    @cached_property
    def mixer(self) -> Mixer:
        """His models, ready for coefficient grids."""
        return Mixer(self.base, self.experts, device=self.device)

    def whole(self, merged: Merged) -> Merged:
        """A merge with the heads of all tasks: also of those that he has no expert of."""
        held = {task: head for task, head in merged.private.items() if task in self.tasks}
        return Merged(merged.shared, {**self.heads, **held})

    def teachable(self, task: str) -> TensorTask:
        """A task whose model can be run on inputs and trained.

        Raises:
            InputError: it is scored in a way of its own.
        """
        found = self.tasks[task]
        if not isinstance(found, TensorTask):
            what = "a task that is scored by a function of its own has no inputs to run its model on"
            raise InputError(what, where=task, got=found.kind)
        return found

    def trainable(self, task: str) -> TensorTask:
        """A task with examples to train on.

        Raises:
            InputError: it has none, with what to add to the configuration.
        """
        found = self.teachable(task)
        if found.training is None:
            hint = "give the task `train:` with examples that are not scored on"
            raise InputError("the task has no examples for a thief to learn from", where=task, hint=hint)
        return found

    def call(self, task: str, state: State) -> Call:
        """The task's model with these weights, differentiable in them; the head is the task's.

        Raises:
            InputError: weights that the model has and the state lacks.
        """
        module = self.modules[task]
        held = {**self.heads.get(task, {}), **state}
        # What norms have seen is no weight: nothing flows back to it.
        seen = {name for name, _ in module.named_buffers()}
        used = {}
        for name in module_state(module):
            tensor = held_by(held, name, task)
            used[name] = tensor.detach() if name in seen else tensor

        def run(**inputs: torch.Tensor) -> Any:
            return torch.func.functional_call(module, used, (), inputs)

        return run

    def forward(self, task: str, state: State, batch: Examples) -> torch.Tensor:
        """Logits of a task for a batch, differentiable in the weights: the form that `learned.learn` takes."""
        return self.trainable(task).logits(self.call(task, state), batch.to(self.device))

    def unlabelled(self, task: str, count: int) -> Examples:
        """So many training inputs of a task, put on the bill; who uses them leaves their labels alone.

        Raises:
            InputError: the task has no training examples.
        """
        training = self.trainable(task).training
        assert training is not None
        generator = torch.Generator().manual_seed(self.seed)
        found = training[torch.randperm(len(training), generator=generator)[:count]]
        self.spend(task, found, labels=False)
        return found

    def spend(self, task: str, examples: Examples, *, labels: bool) -> None:
        """Put examples of a task on the bill, once however often they are used."""
        used = self.bill.labelled if labels else self.bill.inputs
        used[task] = max(used.get(task, 0), len(examples))
        if examples.labels.ndim > 1:
            self.bill.tokens[task] = max(self.bill.tokens.get(task, 0), examples.tokens)


class MergeAttack(Declares, Protocol):
    """An attack that ends in merges.

    name: as rows call it. Its budget has `merges` that it looks at (a repair: of each start), or `moves`, those of a
    search beyond what it begins with; different `examples` of a task, where labels are used of a class, or in units
    of `training.TEXTS_EACH` texts; and `steps` of a training. alone: whether it makes sense without the protected
    model.
    """

    @property
    def name(self) -> str: ...
    @property
    def alone(self) -> bool: ...

    def explore(self, thief: Thief, look: Look) -> None:
        """Look at merges, as many as the attack's grid or search has.

        Raises:
            InputError: the attack does not apply to these models, or its data are missing.
        """

    def make(self, thief: Thief, options: Mapping[str, Any]) -> Subject:
        """The merge of these options."""


def held_by(state: State, name: str, where: str) -> torch.Tensor:
    """A tensor of a state. What a module was left with by somebody else is never taken in its place.

    Raises:
        InputError: the state lacks it.
    """
    if name not in state:
        raise InputError("a model lacks a tensor of its class", where=where, expected=name)
    return state[name]


def all_of(attempts: Iterable[Callable[[], object]]) -> None:
    """Make every attempt, also after one that fails: one point of a grid must not cost the others.

    Raises:
        InputError, RunError: the first one's, where all failed.
    """
    first: Exception | None = None
    done = False
    for attempt in attempts:
        try:
            attempt()
            done = True
        except (InputError, RunError) as error:
            first = first or error
    if first is not None and not done:
        raise first


def detached(merged: Merged) -> Merged:
    """A copy that nothing else writes to, on the CPU."""
    return Merged(
        {name: tensor.detach().to("cpu", copy=True) for name, tensor in merged.shared.items()}, merged.private
    )
