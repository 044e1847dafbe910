"""The tensors of models that are to be merged: loading them, and which of them they share.

A tensor that the base lacks, or has in another shape, is private to its task: it cannot be merged and stays
with that task's expert (the head of a classifier). A numbered block or a table of embeddings is never
private: where these differ, the models have different bodies or vocabularies and are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.problems import Problems
from ..errors import InputError, UsageError
from . import Merged
from .blocks import block_names

if TYPE_CHECKING:
    from ..checkpoint.header import TensorInfo
    from . import State

# safetensors dtype -> torch's, and the integer type of numpy that holds its bits
_DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "F64": (torch.float64, "i8"), "F32": (torch.float32, "i4"), "F16": (torch.float16, "i2"),
    "BF16": (torch.bfloat16, "i2"), "I64": (torch.int64, "i8"), "I32": (torch.int32, "i4"),
    "I16": (torch.int16, "i2"), "I8": (torch.int8, "i1"), "U8": (torch.uint8, "u1"), "BOOL": (torch.bool, "u1"),
}  # fmt: skip
_TABLE = re.compile(r"(^|[._])(wte|wpe|[a-z]*emb(ed(ding)?s?)?[a-z]*)([._]|$)")
# A fine-tune keeps most of its base; less than this part of the base's numbers is another model.
_LEAST_SHARED = 0.5


@dataclass(frozen=True)
class Parts:
    """What models have in common.

    Attributes:
        shared: by name of a floating-point tensor of the base, the models that have it in its shape.
        kept: tensors of the base that no model can be merged into: not floating-point, empty, or nobody's.
        private: by model, its tensors that the base lacks or has in another shape.
    """

    shared: dict[str, tuple[str, ...]]
    kept: tuple[str, ...]
    private: dict[str, dict[str, torch.Tensor]]

    @property
    def common(self) -> list[str]:
        """The shared tensors that every model has."""
        return [name for name, models in self.shared.items() if len(models) == len(self.private)]


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of an open checkpoint, in its stored dtype, on the CPU.

    Raises:
        InputError: no such tensor, or a dtype that torch cannot compute with.
    """
    return from_bits(checkpoint.read(name), checkpoint.tensors[name])


def from_bits(bits: np.ndarray, info: TensorInfo) -> torch.Tensor:
    """Raw bits of a safetensors dtype as a torch tensor of the same shape; they share their memory."""
    if info.dtype not in _DTYPES:
        raise InputError(
            "a tensor of this dtype cannot be merged",
            where=info.name,
            expected=" | ".join(_DTYPES),
            got=info.dtype,
        )
    dtype, code = _DTYPES[info.dtype]
    return torch.from_numpy(bits.reshape(-1).view(code)).view(dtype).reshape(info.shape)


def load_state(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by the names on disk.

    Args:
        path: a folder as save_pretrained writes it, or a .safetensors file.
        device: where they are put.
        dtype: of the floating-point ones; as stored if None.

    Raises:
        InputError: not a whole, plain, unquantized checkpoint.
        RunError: reading failed.
    """
    with open_checkpoint(path) as checkpoint:
        state = {name: read_tensor(checkpoint, name) for name in checkpoint.tensors}
        checkpoint.check_unchanged()
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in state.items()
    }


def rename_like(base: Iterable[str], model: State) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A model under the base's names, where they differ by a leading component: `encoder.x`, `model.encoder.x`.

    Such pairs come from saving a model with its head and without. Names that only the model has stay.

    Returns: the tensors, and the names that were changed: new to old.
    """
    known = set(base)
    prefixes = {name.split(".", 1)[0] + "." for name in known if "." in name}
    own = {name.split(".", 1)[0] + "." for name in model if "." in name}

    def renaming(add: str, strip: str) -> dict[str, str]:
        pairs = {name: add + name.removeprefix(strip) for name in model if name.startswith(strip)}
        return {new: old for old, new in pairs.items() if new in known}

    candidates = [
        ("", ""),
        *((prefix, "") for prefix in sorted(prefixes)),
        *(("", one) for one in sorted(own)),
    ]
    found = max((renaming(*candidate) for candidate in candidates), key=len)
    renamed = {new: old for new, old in found.items() if new != old and new not in model}
    back = {old: new for new, old in renamed.items()}
    return {back.get(name, name): tensor for name, tensor in model.items()}, renamed


def split(base: State, models: Mapping[str, State]) -> Parts:
    """Which tensors models share with their base, and which are private to each.

    Args:
        base: the model that they were fine-tuned from, or whichever is taken as the reference.
        models: state dicts by name.

    Raises:
        UsageError: no models.
        InputError: different bodies or vocabularies, all differences at once; or hardly a tensor in common.
    """
    if not models:
        raise UsageError("nothing to merge", hint="name at least one expert")
    body = {name for name in base if _TABLE.search(name)} | set(block_names(base))
    problems = Problems("the models do not fit together")
    for name, model in models.items():
        _compare(problems, name, base, model, body)
    problems.raise_any()
    shared = {
        tensor: tuple(name for name, model in models.items() if _fits(model.get(tensor), origin))
        for tensor, origin in base.items()
        if origin.is_floating_point() and origin.numel()
    }
    private = {
        name: {
            key: tensor for key, tensor in model.items() if key not in base or base[key].shape != tensor.shape
        }
        for name, model in models.items()
    }
    kept = tuple(name for name in base if not shared.get(name))
    return Parts({name: who for name, who in shared.items() if who}, kept, private)


def _fits(tensor: torch.Tensor | None, origin: torch.Tensor) -> bool:
    return tensor is not None and tensor.shape == origin.shape and tensor.is_floating_point()


def _compare(problems: Problems, name: str, base: State, model: State, body: set[str]) -> None:
    """Note what makes a model another one than a fine-tune of the base."""
    held = sum(tensor.numel() for key, tensor in base.items() if key in model)
    if held < _LEAST_SHARED * sum(tensor.numel() for tensor in base.values()):
        lacking = sorted(base.keys() - model.keys())
        problems.add(
            "an expert lacks tensors of the base",
            where=name,
            got=", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if lacking[5:] else ""),
            hint="fine-tunes of one base have its names; it may be another architecture",
        )
        return
    for key in sorted(body):
        if key not in model:
            problems.add("a tensor of the body is missing", where=f"{name}: {key}")
        elif model[key].shape != base[key].shape:
            problems.add(
                "vocabularies or bodies of different sizes",
                where=f"{name}: {key}",
                expected=f"{list(base[key].shape)}, as the base",
                got=list(model[key].shape),
            )
    stacks = {stack for stack, _ in block_names(base).values()}
    more = [key for key, (stack, _) in block_names(model).items() if stack in stacks and key not in base]
    if more:
        problems.add("the body has tensors that the base lacks", where=name, got=", ".join(sorted(more)[:5]))


def merge_deltas(
    base: State,
    models: Mapping[str, State],
    mix: Callable[[str, dict[str, torch.Tensor]], torch.Tensor],
) -> Merged:
    """Mix the task vectors of every tensor, over the models that share it, in float32.

    Args:
        base: the model that they were fine-tuned from.
        models: state dicts by name.
        mix: given a tensor's name and the float32 differences to the base by model, the merged difference.

    Returns: the merge in the base's dtypes.

    Raises:
        as `split`.
    """
    parts = split(base, models)
    shared: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, origin in base.items():
            if name not in parts.shared:
                shared[name] = origin
                continue
            start = origin.float()
            deltas = {
                model: models[model][name].to(origin.device, torch.float32) - start
                for model in parts.shared[name]
            }
            shared[name] = possible(name, start + mix(name, deltas)).to(origin.dtype)
    return Merged(shared, parts.private)


def possible(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A merged tensor as a model can have it: a sum may leave less than no variance, and norms take its root."""
    return tensor.clamp(min=0) if name.endswith("running_var") else tensor


def without_padding(values: torch.Tensor, masks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Values (n, positions, width) at the positions that count, (so many, width); as they are where no mask fits.

    Args:
        masks: of positions that count, booleans (n, positions).
    """
    kept = next((mask for mask in masks if mask.shape == values.shape[:-1]), None)
    return values if kept is None else values[kept.to(values.device)]


def largest_entries(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Where the entries of largest magnitude are, so many of them and one at least: booleans of the tensor's shape."""
    found = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    found[tensor.abs().flatten().topk(max(1, count)).indices] = True
    return found.view(tensor.shape)


def distance(base: State, model: State) -> float:
    """How far a model is from a base over the tensors that they share: ‖model − base‖ / ‖base‖.

    A fine-tune of the base is near (0.06 to 0.16 in the models of bench/lineage.py); 1.4 is as far as an
    unrelated model of the same size, and as far as a locked one.
    """
    far = near = 0.0
    for name, origin in base.items():
        tensor = model.get(name)
        if origin.is_floating_point() and tensor is not None and tensor.shape == origin.shape:
            start = origin.double()
            far += float((tensor.to(origin.device, torch.float64) - start).square().sum())
            near += float(start.square().sum())
    return float((far / near) ** 0.5) if near else float("inf")
