"""Where and how passes are run: accelerate's device and precision, memory for activations, and its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import UsageError

PRECISIONS = ("auto", "fp32", "bf16")


@contextmanager
def accelerating(device: str, precision: str) -> Iterator[Accelerator]:
    """Where, and in which precision: by itself, bf16 on a GPU that has it, float32 elsewhere.

    accelerate has one state a process: what is made here is gone afterwards, anybody else's is left as it is.

    Raises:
        UsageError: the process uses accelerate already, otherwise than this.
    """
    from accelerate.state import AcceleratorState, PartialState

    from ..audit.bench import pick_device

    placed = pick_device(device)
    able = placed.type == "cuda" and torch.cuda.is_bf16_supported()
    mixed = "bf16" if precision == "bf16" or (precision == "auto" and able) else "no"
    ours, alone = not AcceleratorState._shared_state, not PartialState._shared_state
    # accelerate takes the process's GPU, whichever was asked for.
    chosen = torch.cuda.device(placed) if placed.type == "cuda" else nullcontext()
    try:
        made = Accelerator(cpu=placed.type == "cpu", mixed_precision=mixed)
    except ValueError as error:
        raise UsageError(
            "this process uses accelerate already, with other settings",
            where="device, precision",
            got=error,
            hint="harden in a process of its own, or by `Hardening` in a loop of yours",
        ) from error
    try:
        with chosen:
            yield made
    finally:
        if ours:
            AcceleratorState._reset_state(reset_partial_state=alone)


def checkpoint_activations(module: torch.nn.Module) -> None:
    """Keep no activations but those between blocks: less memory, a forward pass more.

    Raises:
        UsageError: the class does not know how.
    """
    found: Any = module
    if not getattr(found, "supports_gradient_checkpointing", False):
        got = type(module).__name__
        raise UsageError("a model without gradient checkpointing", where="checkpointing", got=got)
    # Weights are swapped in place between passes: what is computed again must be so before they are.
    found.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
