"""The bench: all models of an audit in memory, their tasks with validation and test halves, and how merges score.

Every worker has one of its own. Models are float32, run by their stock classes; what is private to a task (the
head of a classifier) is taken out of the base, so that nothing merges it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..attacks.thief import Subject, Thief
from ..attacks.wide import fill
from ..checkpoint import open_checkpoint
from ..checkpoint.problems import Problems
from ..errors import InputError, RunError
from ..merging import Merged
from ..merging.grids import free_memory
from ..merging.tensors import distance, load_state, rename_like, split
from ..merging.vectors import is_adapter, load_model
from ..merging.write import write_merged
from ..stock import base_prefix, load_module, module_state
from ..tasks import open_task
from ..tasks.task import Task
from .config import RELEASE, Config
from .prepared import once, prepared
from .rows import Scores, Side

if TYPE_CHECKING:
    from ..merging import State

FEWEST = 4  # examples of a task
HALVES = ("screen", "validation", "test")
CLASSIFIERS = ("image-classification", "text-classification")
GENERATING = ("lm-eval", "python")  # whose scores may be of text that a model generates
# Fields of a model's configuration that say where it is from, or how it was stored.
_ASIDE = ("transformers_version", "dtype", "torch_dtype", "architectures")


class Bench:
    """Models and tasks, ready to score merges on.

    Args:
        config: of the audit.
        work: a folder for prepared models and adapters that were folded into their base.

    Attributes:
        tasks: by name, the protected one first. index: by half and task, which examples.
        modules: by task, a module of its class to run states in; several tasks may share one.
        base: without what is private. models: "protected", "plain" and, by task, the others.
        heads: by the same names, what is private to each. unlike: roles of the protected task's models whose
            configuration is not the protected one's, with which they are run.
        paths: of all models, as folders that stock classes open.
        hashes: by role, SHA-256 of its tensors, the base's without what is private. settings: by task, that of
            the configuration that models are run with.

    Raises:
        InputError: models or data that cannot be used.
    """

    def __init__(self, config: Config, work: Path) -> None:
        self.config, self.work = config, work
        self.seed = config.fields.seed
        self.device = pick_device(config.fields.device)
        self.protected = config.fields.protected.task
        self.others = tuple(config.fields.others)
        work.mkdir(parents=True, exist_ok=True)
        self.paths = {role: self._folder(config.path(written)) for role, written in config.models()}
        self._open_tasks()
        self._load()
        self._prepared: tuple[tuple[Side, str], dict[str, torch.Tensor]] | None = None

    def _open_tasks(self) -> None:
        """Tasks, and which of their examples are for what; what is wrong with any of them is told at once."""
        self.tasks: dict[str, Task] = {}
        self.index: dict[str, dict[str, list[int]]] = {}
        problems = Problems(self.config.where)
        for name in self.config.tasks:
            with problems.collect():
                task = open_task(
                    name,
                    self.config.fields.tasks[name].model_dump(exclude_none=True),
                    folder=self.config.folder,
                    model=self.paths["plain" if name == self.protected else name],
                )
                self.index[name] = halves(len(task), task.screen, self.seed, f"task {name}")
                self.tasks[name] = task
        problems.raise_any()

    def _folder(self, path: Path) -> Path:
        """A model as a folder that its stock class opens: an adapter is folded into its base."""
        if not is_adapter(path):
            return path
        base = self.config.path(self.config.fields.base)
        folded = self.work / "adapters" / hashlib.sha256(str(path).encode()).hexdigest()[:16]
        if not folded.exists():
            folded.parent.mkdir(parents=True, exist_ok=True)
            try:
                once(
                    folded,
                    lambda: write_merged(folded, load_model(path, load_state(base), folder=base), base),
                )
            except InputError as error:
                raise InputError(
                    "the adapter cannot be folded into the base",
                    where=path,
                    got=error,
                    hint="fold it yourself, by peft's merge_and_unload, and give that model",
                ) from error
        return folded

    def _load(self) -> None:
        modules = {role: load_module(path, device=self.device) for role, path in self.paths.items()}
        reference = list(module_state(modules["protected"]))
        states: dict[str, dict[str, torch.Tensor]] = {
            role: {n: t.clone() for n, t in rename_like(reference, module_state(module))[0].items()}
            for role, module in modules.items()
        }
        self._check(states, modules)
        self.modules = self._shared({name: modules[self._role(name)] for name in self.tasks})
        base = states.pop("base")
        private = self._private(base, states, modules)
        self.base = {name: tensor for name, tensor in base.items() if name not in private}
        if not self.base:
            raise InputError("nothing of the base is left to merge", where=f"{self.config.where}: private")
        self.heads: dict[str, dict[str, torch.Tensor]] = {}
        self.models: dict[str, dict[str, torch.Tensor]] = {}
        for role, state in states.items():
            self.heads[role] = {name: tensor for name, tensor in state.items() if name not in self.base}
            self.models[role] = state
        split(self.base, self.models)  # refuses bodies and vocabularies that differ, before any work
        self.hashes = {
            "base": digest(self.base),
            **{role: digest(state) for role, state in self.models.items()},
        }
        self.settings = {
            task: _settings(modules[self._role(task)], generates=opened.kind in GENERATING)
            for task, opened in self.tasks.items()
        }
        own = _settings(modules["protected"])
        self.unlike = [
            role
            for role in modules
            if (role == "plain" or role.startswith(RELEASE)) and _settings(modules[role]) != own
        ]
        self.distances = {role: distance(self.base, state) for role, state in self.models.items()}
        self.parameters = {
            role: sum(t.numel() for t in state.values()) for role, state in {"base": base, **states}.items()
        }

    def _check(self, states: Mapping[str, State], modules: Mapping[str, torch.nn.Module]) -> None:
        """Refuse what cannot be run in the modules: all models of the protected task in the protected one's."""
        problems = Problems(self.config.where)
        released = {name: list(tensor.shape) for name, tensor in states["protected"].items()}
        for role, state in states.items():
            if role == "plain" or role.startswith(RELEASE):
                shapes = {name: list(tensor.shape) for name, tensor in state.items()}
                unlike = [name for name in released | shapes if released.get(name) != shapes.get(name)]
                if unlike:
                    problems.add(
                        "another model than the protected one: a tensor has another shape",
                        where=f"{role}: {unlike[0]}",
                        expected=released.get(unlike[0], "none"),
                        got=shapes.get(unlike[0], "none"),
                    )
            elif role in self.others and not module_state(modules[role]).keys() <= state.keys():
                problems.add(
                    "of another class than the protected model",
                    where=role,
                    expected=type(modules["protected"]).__name__,
                    got=type(modules[role]).__name__,
                )
        problems.raise_any()

    def _role(self, task: str) -> str:
        return "protected" if task == self.protected else task

    def _shared(self, modules: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
        """One module for all tasks whose models are of one class, shape and configuration."""
        known: dict[Any, torch.nn.Module] = {}
        found = {}
        for task, module in modules.items():
            shapes = tuple((name, tuple(t.shape)) for name, t in module_state(module).items())
            found[task] = known.setdefault((type(module), shapes, _settings(module)), module)
        return found

    def _private(
        self, base: State, states: Mapping[str, State], modules: Mapping[str, torch.nn.Module]
    ) -> set[str]:
        """Names of the base's tensors that are never merged."""
        found = {
            name
            for state in states.values()
            for name, tensor in state.items()
            if name in base and base[name].shape != tensor.shape and not _in_body(name, modules["protected"])
        }
        declared = self.config.fields.private
        if declared != "auto":
            for beginning in declared:
                named = {n for state in states.values() for n in state if n.startswith(beginning)}
                if not named:
                    raise InputError(
                        "no tensor begins with this", where=f"{self.config.where}: private", got=beginning
                    )
                found |= named
        elif any(task.kind in CLASSIFIERS for task in self.tasks.values()):
            found |= {name for name in base if not _in_body(name, modules["protected"])}
        return found

    # --- scoring ---------------------------------------------------------------------------------------------

    def measure(self, subject: Subject, half: str, only: Sequence[str] | None = None) -> Scores:
        """Scores of a merge on the examples of a half, by task.

        Raises:
            InputError: scores that are not finite. RunError: the evaluation fails.
        """
        found = {}
        for name in self.tasks if only is None else only:
            module = self.modules[name]
            if isinstance(subject, Merged):
                fill(module, subject.for_task(name))
            else:
                module = subject[name]
            found[name] = self.tasks[name].score(module, self.index[name][half])
        return found

    def alone(self, role: str) -> Merged:
        """A model by itself: its body under the heads of all tasks."""
        state = self.base if role == "base" else self.models[role]
        shared = {name: state.get(name, tensor) for name, tensor in self.base.items()}
        return Merged(shared, self._heads("plain" if role != "protected" else "protected"))

    def _heads(self, side: Side) -> dict[str, Mapping[str, torch.Tensor]]:
        role = "protected" if side == "protected" else "plain"
        return {self.protected: self.heads[role], **{task: self.heads[task] for task in self.others}}

    # --- thieves ---------------------------------------------------------------------------------------------

    def thief(
        self, side: Side, prepared: str | None = None, starts: Sequence[tuple[Mapping[str, Any], Merged]] = ()
    ) -> Thief:
        """A thief on a side, who holds the protected model as it is or prepared."""
        experts: dict[str, State] = {}
        if side != "without":
            experts[self.protected] = self.models[side] if prepared is None else self.prepare(side, prepared)
        experts |= {task: self.models[task] for task in self.others}
        return Thief(
            self.base, experts, self.protected, self.tasks, self.modules, self._heads(side), self.seed, starts
        )

    def prepare(self, side: Side, name: str) -> dict[str, torch.Tensor]:
        """The protected model of a side after a preparation; the last one is kept.

        Raises:
            InputError: the preparation does not apply.
        """
        if self._prepared is None or self._prepared[0] != (side, name):
            self._prepared = (side, name), prepared(self, side, name)
        return self._prepared[1]


def digest(state: State) -> str:
    """SHA-256 of names, shapes and values of a model."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        found.update(tensor.flatten().numpy().tobytes())
    return found.hexdigest()


def _settings(module: torch.nn.Module, *, generates: bool = False) -> str:
    """SHA-256 of a model's configuration, but for what does not change its answers; of how it generates, if it does."""
    config: Any = getattr(module, "config", None)
    fields = dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    how: Any = getattr(module, "generation_config", None)
    if generates and how is not None:
        fields["generation"] = how.to_dict()
    kept = {name: value for name, value in fields.items() if name not in _ASIDE and name[:1] != "_"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _in_body(name: str, module: torch.nn.Module) -> bool:
    """Whether a tensor belongs to the body of a class that has a head on it; classes without are all body."""
    prefix = base_prefix(module)
    return not prefix or name.startswith(prefix)


def halves(count: int, screen: int, seed: int, where: str | None = None) -> dict[str, list[int]]:
    """Examples in random order, half of them to choose merges on, the others to report; a few to look at first.

    Raises:
        InputError: fewer than FEWEST examples, at `where`.
    """
    if count < FEWEST:
        what = "too few examples to choose on some and report on others"
        hint = "give it more evaluation examples, or a larger limit"
        raise InputError(what, where=where, expected=FEWEST, got=count, hint=hint)
    order = np.random.default_rng([seed, 0x4A1F]).permutation(count)
    validation, test = np.sort(order[: count // 2]), np.sort(order[count // 2 :])
    few = np.sort(order[: min(screen, count // 2)])
    return {"screen": few.tolist(), "validation": validation.tolist(), "test": test.tolist()}


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU where there is one.

    Raises:
        InputError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        placed = torch.zeros(1, device=name)
        placed.cpu()  # a device without memory cannot run anything
        return placed.device
    except (RuntimeError, AssertionError) as error:
        said = str(error).partition("\n")[0]
        raise InputError("the device cannot be used", where=name, got=said) from None


def estimate(config: Config, workers: int) -> tuple[int, int]:
    """Bytes that the bench of all workers takes, and bytes that there are where models are run.

    Every worker, and this process while it prepares, has all models in float32, a mixer's task vectors of them,
    the modules that they run in and two merges.

    Raises:
        InputError: a model that cannot be read, or a device that is not there.
    """
    base = _numbers(config.path(config.fields.base))
    paths = [config.path(written) for _, written in config.models()]
    # An adapter is a whole model once it is folded into the base.
    sizes = [base if is_adapter(path) else _numbers(path) for path in paths]
    largest = max(sizes)
    models = 2 * sum(sizes) + largest * (len(config.tasks) + 4)
    return 4 * models * (workers + (workers > 1)), free_memory(pick_device(config.fields.device))


def _numbers(path: Path) -> int:
    """Parameters of a checkpoint, as its header says."""
    with open_checkpoint(path) as source:
        return sum(prod(info.shape) for info in source.tensors.values())


def pick_workers(config: Config, workers: int | None) -> int:
    """How many workers there are: as asked for, or one a core as far as memory goes; one for a GPU.

    Raises:
        RunError: not enough memory, with the estimate. InputError: the device is not there.
    """
    alone = pick_device(config.fields.device).type != "cpu"
    wanted = workers or (1 if alone else len(os.sched_getaffinity(0)))
    while True:
        needed, free = estimate(config, wanted)
        if needed <= free:
            return wanted
        if workers is not None or wanted == 1:
            raise RunError(
                "not enough memory for this audit",
                expected=f"{needed / 2**30:.1f} GiB for {wanted} workers",
                got=f"{free / 2**30:.1f} GiB free",
                hint="give fewer --workers, or audit on a larger machine",
            )
        wanted -= 1
