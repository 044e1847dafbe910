"""The embedded zoo: one trained base, its fine-tunes, and the test images of every task.

Made by `bench/make_zoo.py`; README.md beside this file says from what and under which licences.
"""

from __future__ import annotations

from .data import BASE, copy_to, facts, images, labels, model_path, pixels, tasks
from .score import accuracies, accuracy, load_model, value

__all__ = [
    "BASE",
    "accuracies",
    "accuracy",
    "copy_to",
    "facts",
    "images",
    "labels",
    "load_model",
    "model_path",
    "pixels",
    "tasks",
    "value",
]
