"""Tasks without code: what a model is scored on, and trained on, from data on disk.

`open_task` reads one from the fields of a configuration. A kind's module is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from .task import Task

__all__ = ["KINDS", "open_task"]

# kind -> the module below this package whose `read` opens it, and what it is
KINDS: dict[str, tuple[str, str]] = {
    "image-classification": (".images", "accuracy on labelled images: a folder a class, npz, or a data set"),
    "language-modelling": (".language", "loss or accuracy of the next token: txt, jsonl, npz of ids"),
    "text-classification": (".sequences", "accuracy on labelled texts: csv, jsonl, or a data set"),
    "sequence-to-sequence": (".pairs", "loss or accuracy of answers to texts: csv, jsonl, or a data set"),
    "lm-eval": (".harness", "a task of lm-evaluation-harness"),
    "python": (".function", "a function of your own, module:function"),
}


def open_task(name: str, fields: Mapping[str, Any], *, folder: Path, model: Path) -> Task:
    """Open a task.

    Args:
        name: what it is called; the same as its fine-tune.
        fields: as in a configuration: `kind`, `data` and what the kind takes; see `tasks.fields`.
        folder: what relative paths are relative to.
        model: the task's own fine-tune: its tokenizer, image processor and classes.

    Raises:
        UsageError: no such kind. InputError: data that cannot be read, or does not fit the model.
    """
    kind = fields.get("kind")
    if kind not in KINDS:
        raise UsageError("no such kind of task", where=name, expected=" | ".join(KINDS), got=kind)
    module = import_module(KINDS[kind][0], __name__)
    task: Task = module.read(name, fields, folder=folder, model=model)
    return task
