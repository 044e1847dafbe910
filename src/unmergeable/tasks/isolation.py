"""Running another package's evaluation as if alone: no network, nothing printed, and no random state of ours."""

from __future__ import annotations

import io
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np

from ..stock import quiet
from .sources import needed

_LOGGERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "fsspec", "filelock")
# Flags that these packages read from the environment once, when they are imported.
_OFFLINE = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
    ("evaluate.config", "HF_EVALUATE_OFFLINE"),
)


@contextmanager
def offline(install: str) -> Iterator[None]:
    """No request to a hub while the block runs; the environment of the process stays as it is.

    Args:
        install: what pip installs by, for a message if a package is missing.
    """
    with ExitStack() as stack:
        for name, flag in _OFFLINE:
            module = needed(name, install)
            if hasattr(module, flag):
                stack.callback(setattr, module, flag, getattr(module, flag))
                setattr(module, flag, True)
        yield


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is logged, warned of or drawn on the terminal while the block runs: errors are raised."""
    with ExitStack() as stack:
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        # Some of its progress bars cannot be turned off.
        stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(quiet())
        yield


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The global generators of Python, numpy and torch begin at a seed, and are as they were afterwards."""
    import torch

    before: Any = random.getstate()
    numbers = np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numbers)
