"""Wide merges: all models side by side in every block, y = x + Σ wᵢ fᵢ(x). No symmetry hinders them.

The price is size: as many times the blocks as there are models. A few weights are tried, with the base among
the models and without.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..merging.wide import WideModel
from ..stock import module_state
from .thief import Look, Subject, Thief, held_by

# Suite v1: coefficients of the protected model and of each other one; with the base, it takes what is left of 1.
WITH_BASE = ((0.5, 0.3), (0.5, 0.5), (1.0, 0.3), (1.0, 0.6))
# The part of the protected model where there is no base; the others share the rest.
WITHOUT_BASE = (0.3, 0.6)


class Wide:
    """A module of several models' blocks."""

    name = "wide"
    about = "all models side by side, block by block; as large as they are together"
    needs = ("base", "experts")
    access = 1
    budget: ClassVar[dict[str, int]] = {"merges": len(WITH_BASE) + len(WITHOUT_BASE)}
    alone = False

    def explore(self, thief: Thief, look: Look) -> None:
        """Every choice of weights."""
        for dose, others in WITH_BASE:
            options = {"dose": dose, "others": others, "base": True}
            look(options, self.make(thief, options))
        for dose in WITHOUT_BASE:
            options = {"dose": dose, "others": (1 - dose) / len(thief.others), "base": False}
            look(options, self.make(thief, options))

    def make(self, thief: Thief, options: Mapping[str, Any]) -> Subject:
        """A wide module for each task, with its head; blocks are shared between them."""
        models = {task: _module(thief, task, state) for task, state in thief.experts.items()}
        weights = {task: options["dose"] if task == thief.protected else options["others"] for task in models}
        beside = []
        if options["base"]:
            beside = [_module(thief, thief.protected, thief.base)]
            weights["base"] = 1 - sum(weights.values())
        order = list(models)
        found = {
            task: WideModel(
                [*models.values(), *beside],
                list(weights.values()),
                host=order.index(task),
                private=tuple(thief.heads.get(task, ())),
            )
            for task in order
        }
        thief.bill.size = max(thief.bill.size, max(model.size_ratio for model in found.values()))
        return found


def _module(thief: Thief, task: str, state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A module of a task's class with these weights, and the task's head."""
    module = copy.deepcopy(thief.modules[task])
    fill(module, {**thief.heads.get(task, {}), **state})
    return module


def fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Write weights into a module, those that it has.

    Raises:
        InputError: the state lacks some of them.
    """
    with torch.no_grad():
        for name, tensor in module_state(module).items():
            tensor.copy_(held_by(state, name, type(module).__name__))
