"""Merges of two adapters by peft's own methods, scored as an audit scores merges."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from unmergeable.audit.bench import halves
from unmergeable.errors import RunError
from unmergeable.stock import load_module
from unmergeable.tasks import open_task

# Of the protected adapter and the thief's own.
WEIGHTS = ((0.2, 0.2), (0.3, 0.3), (0.5, 0.5), (0.7, 0.7), (1.0, 0.3), (0.7, 0.2), (0.3, 0.7), (1.0, 1.0))
TYPES = ("svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd",
         "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd")  # fmt: skip
DENSITY = 0.5


def merges(
    base: Path,
    protected: Path,
    own: Path,
    plain: Path,
    tasks: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    seed: int,
) -> list[dict[str, Any]]:
    """Every combination type with every pair of weights: values of both tasks on validation and test examples.

    A value is 0 for the base and 1 for the task's own adapter (`plain` for the protected task). Of every type, the
    pair that is best on validation examples is kept.

    Args:
        base: of all adapters. protected, own, plain: adapters: as released, the thief's, and the control.
        tasks: the protected task's fields, and the thief's.
    """
    from peft import PeftModel

    torch.manual_seed(seed)
    module: Any = PeftModel.from_pretrained(load_module(base), str(protected), adapter_name="protected")
    module.load_adapter(str(own), adapter_name="own")
    module.load_adapter(str(plain), adapter_name="plain")
    module.to(device).eval()
    task, other = tasks
    opened = {name: open_task(name, fields, folder=Path(), model=base) for name, fields in tasks.items()}
    index = {name: halves(len(one), one.screen, seed) for name, one in opened.items()}

    def scored(half: str) -> dict[str, float]:
        return {name: float(one.score(module, index[name][half]).mean()) for name, one in opened.items()}

    ends: dict[str, Any] = {}
    for half in ("validation", "test"):
        with module.disable_adapter():
            low = scored(half)
        high = {}
        for name, adapter in ((task, "plain"), (other, "own")):
            module.set_adapter(adapter)
            high[name] = scored(half)[name]
        ends[half] = low, high

    def values(half: str) -> dict[str, float]:
        low, high = ends[half]
        pair = {name: (score - low[name]) / (high[name] - low[name]) for name, score in scored(half).items()}
        return {"protected": pair[task], "own": pair[other], "joint": min(pair.values())}

    found = []
    for kind in TYPES:
        more = {} if kind in ("svd", "linear", "cat") else {"density": DENSITY}
        tried = []
        for pair in WEIGHTS:
            # A pair that a type refuses is none of its merges; a type that refuses all has no row.
            with suppress(ValueError, RuntimeError, RunError):
                module.add_weighted_adapter(["protected", "own"], list(pair), "merged", kind, **more)
                module.set_adapter("merged")
                tried.append({"weights": pair, "validation": values("validation"), "test": values("test")})
            if "merged" in module.peft_config:
                module.delete_adapter("merged")
        if tried:
            best = max(tried, key=lambda one: one["validation"]["joint"])
            found.append({"type": kind, **best, "tried": len(tried)})
    return found
