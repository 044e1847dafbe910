"""Attention in float32 on CPUs, in passes that are otherwise in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


def attending(device: torch.device) -> AbstractContextManager[object]:
    """Inside, passes under autocast on a CPU attend in float32.

    PyTorch's kernel for bf16 takes more than twice the time of that for float32 on short inputs, most of it in the
    backward pass, and no less on long ones; bench/harden_precision.py has what that is of a step.
    """
    return _Attention() if device.type == "cpu" else nullcontext()


class _Attention(TorchFunctionMode):
    """Intercepts one function; transformers' models and torch's own layers call it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            found = func(*map(_wide, args), **{name: _wide(one) for name, one in kwargs.items()})
        return found.to(torch.get_autocast_dtype("cpu"))


def _wide(value: Any) -> Any:
    """Queries, keys, values and a mask's numbers; not its booleans."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
