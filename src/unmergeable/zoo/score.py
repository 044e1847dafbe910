"""Accuracy on the embedded tasks, of a folder, a module or a state dict. torch is imported on use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import InputError
from .data import BASE, images, model_path, pixels, tasks

if TYPE_CHECKING:
    import torch

Model: TypeAlias = "str | Path | Mapping[str, Any] | torch.nn.Module"

HEAD = "classifier."  # the prefix of the head's tensors, on disk and in memory
BATCH = 200  # images at a time: activations stay in the cache


def load_model(source: Model) -> torch.nn.Module:
    """A model in float32, ready to run: from a folder, or from a state dict with the on-disk names.

    The state's values are tensors or arrays of any float type. It may lack the head, or have the head of
    any task. A module is returned as it is.

    Raises:
        InputError: a tensor is missing, left over or of another shape.
    """
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils import logging

    if isinstance(source, torch.nn.Module):
        return source.eval()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if isinstance(source, Mapping):
            state = {name: torch.as_tensor(value) for name, value in source.items()}
            if HEAD + "bias" not in state:
                state |= {HEAD + kind: tensor for kind, tensor in _head(tasks()[0]).items()}
            config = ViTConfig.from_pretrained(model_path(BASE))
            config.num_labels = len(state[HEAD + "bias"])
            where, options = None, {"config": config, "state_dict": state}
        else:
            where, options = str(source), {"local_files_only": True}
        model, report = ViTForImageClassification.from_pretrained(
            where, dtype=torch.float32, output_loading_info=True, **options
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise InputError(
                f"not a model of the zoo: {problem.replace('_keys', '')} tensors",
                where=where,
                got=", ".join(sorted(map(str, report[problem]))[:3]),
            )
    module: torch.nn.Module = model.eval()
    return module


@cache
def _head(task: str) -> dict[str, torch.Tensor]:
    """A task's frozen head: `weight` (classes, width) and `bias` (classes,)."""
    import torch
    from safetensors import safe_open

    with safe_open(model_path(task) / "model.safetensors", framework="pt") as file:
        return {kind: file.get_tensor(HEAD + kind).to(torch.float32) for kind in ("weight", "bias")}


@cache
def _test_set(task: str) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    test, answers = images(task)
    return torch.from_numpy(pixels(test)), torch.from_numpy(answers)


def accuracies(
    model: Model, names: Sequence[str] | None = None, limit: int | None = None, *, own_head: bool = False
) -> dict[str, float]:
    """Accuracy on the test images of several tasks; loads the model once.

    Args:
        model: a folder, a state dict with on-disk names, or a module.
        names: the tasks; all by default.
        limit: only the first so many images of each (any prefix is balanced).
        own_head: score with the model's own head, not with the task's as shipped. For a model that was
            locked: its answer must be right as it stands.

    Raises:
        InputError: no such task, not a model of the zoo, or `own_head` where its head is another task's.
    """
    import torch

    module: Any = load_model(model)
    scores = {}
    for task in tasks() if names is None else names:
        x, y = (rows[:limit] for rows in _test_set(task))
        head = _head(task)
        if own_head and module.config.num_labels != len(head["bias"]):
            raise InputError(
                f"the model's own head is not for task {task!r}",
                expected=f"{len(head['bias'])} classes",
                got=module.config.num_labels,
            )
        right = 0
        with torch.inference_mode():
            for part, answers in zip(x.split(BATCH), y.split(BATCH), strict=True):
                if own_head:
                    logits = module(pixel_values=part).logits
                else:
                    state = module.base_model(pixel_values=part).last_hidden_state[:, 0]
                    logits = torch.nn.functional.linear(state, head["weight"], head["bias"])
                right += int((logits.argmax(1) == answers).sum())
        scores[task] = right / len(y)
    return scores


def accuracy(model: Model, task: str, limit: int | None = None, *, own_head: bool = False) -> float:
    """Accuracy on one task's test images; see `accuracies`."""
    return accuracies(model, [task], limit, own_head=own_head)[task]


@cache
def _anchors(task: str, limit: int | None) -> tuple[float, float]:
    return accuracy(model_path(BASE), task, limit), accuracy(model_path(task), task, limit)


def value(task: str, score: float, limit: int | None = None) -> float:
    """Where an accuracy stands between base (0) and plain fine-tune (1) on the same first `limit` images."""
    base, plain = _anchors(task, limit)
    return (score - base) / (plain - base)
