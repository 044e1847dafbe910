"""Task vectors: what fine-tuning added to a base, of full models and of LoRA adapters as peft saves them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checkpoint import bits_dtype, read_header
from ..checkpoint.files import load_json, open_regular, read_into
from ..checkpoint.problems import Problems
from ..errors import InputError
from ..stock import saved_names
from .tensors import from_bits, load_state, rename_like, split

if TYPE_CHECKING:
    from . import State

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Ways to begin an adapter that take its first update off the base.
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PAIRS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}
_MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True)
class TaskVector:
    """What is added to a base, in float32.

    Attributes:
        deltas: by tensor of the base, what is added to it.
        replaced: tensors that take the place of the base's, or are new: a head of its own, saved modules.
    """

    deltas: State
    replaced: State = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """The Euclidean norm of all that is added."""
        return float(sum(delta.double().square().sum() for delta in self.deltas.values())) ** 0.5


def task_vector(base: State, model: State) -> TaskVector:
    """A full model minus its base; what the base does not have, or in another shape, is in `replaced`.

    Raises:
        InputError: the model is not a fine-tune of the base by its names and shapes.
    """
    parts = split(base, {"model": model})
    deltas = {
        name: model[name].to(base[name].device, torch.float32) - base[name].float() for name in parts.shared
    }
    return TaskVector(deltas, parts.private["model"])


def apply_vector(base: State, vector: TaskVector, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """base + scale · vector in the base's dtypes, with the tensors that it replaces.

    Raises:
        InputError: the vector is of another base.
    """
    problems = Problems("the task vector does not fit the base")
    for name, delta in vector.deltas.items():
        if name not in base:
            problems.add("the base lacks a tensor", where=name)
        elif base[name].shape != delta.shape:
            problems.add(
                "a tensor has another shape",
                where=name,
                expected=list(base[name].shape),
                got=list(delta.shape),
            )
    problems.raise_any()
    out = dict(base)
    for name, delta in vector.deltas.items():
        origin = base[name]
        out[name] = (origin.float() + scale * delta.to(origin.device)).to(origin.dtype)
    # Tied tensors: a state dict in memory has them twice, an adapter is of one of them.
    places = {_place(base[name]): name for name in vector.deltas}
    for name, tensor in base.items():
        if name not in vector.deltas and _place(tensor) in places:
            out[name] = out[places[_place(tensor)]]
    return {**out, **vector.replaced}


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Where a tensor lies in memory; an empty one, or one without memory, lies nowhere."""
    if tensor.device.type == "meta" or not tensor.numel():
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter and no model."""
    return os.path.isfile(Path(path, CONFIG))


def load_model(
    path: str | os.PathLike[str],
    base: State | None = None,
    *,
    device: torch.device | str = "cpu",
    folder: str | os.PathLike[str] | None = None,
) -> dict[str, torch.Tensor]:
    """A model to merge: a checkpoint, under the base's names, or an adapter applied to the base.

    Args:
        path: of either. base: its tensors. device: where they are put. folder: as for `load_adapter`.

    Raises:
        InputError: not a checkpoint or adapter; an adapter without a base, or of another one.
    """
    if is_adapter(path):
        if base is None:
            raise InputError("an adapter needs its base", where=path, hint="give --base")
        return apply_vector(base, load_adapter(path, base, folder))
    state = load_state(path, device=device)
    return state if base is None else rename_like(base, state)[0]


def load_adapter(
    path: str | os.PathLike[str], base: State, folder: str | os.PathLike[str] | None = None
) -> TaskVector:
    """The task vector of a LoRA adapter: scale · B · A for every module that it targets.

    Ranks are read from the tensors; alpha from the configuration and its patterns, per module, over r or, with
    use_rslora, over √r. Linear layers in either layout, embeddings, convolutions, DoRA, trained biases and
    modules saved whole.

    Args:
        path: a folder with adapter_config.json and adapter_model.safetensors.
        base: the model that it was trained on: names, shapes, and values for DoRA.
        folder: the base's, whose class may call its tensors otherwise in memory than in its files.

    Raises:
        InputError: another kind of adapter, or modules that the base does not have, all of them at once.
    """
    config = load_json(Path(path) / CONFIG)
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise InputError("only LoRA adapters have a task vector here", where=path, expected="LORA", got=kind)
    tensors = {name.removeprefix(PREFIX): value for name, value in _read(Path(path) / WEIGHTS).items()}
    _check_added(config, tensors, path)
    names = _Names(base, folder)
    problems = Problems(path)
    deltas: dict[str, torch.Tensor] = {}
    replaced: dict[str, torch.Tensor] = {}
    for name in sorted(tensors):
        with problems.collect():
            end = next((end for end in _PAIRS if name.endswith(end)), None)
            if end is not None:
                module = name.removesuffix(end)
                target = names.resolve(f"{module}.weight")
                deltas[target] = _delta(module, end, tensors, config, base[target])
            elif not name.endswith((*_PAIRS.values(), _MAGNITUDE)):
                _other(name, tensors[name], names, replaced)
    problems.raise_any()
    if not deltas:
        raise InputError("the adapter holds no LoRA matrices", where=path)
    return TaskVector(deltas, replaced)


def check_adapter(path: str | os.PathLike[str]) -> None:
    """Refuse an adapter that is not what it adds to its base, before anything is opened.

    Raises:
        InputError: no weights, a file that is broken, or as `load_adapter` says of such adapters.
    """
    _check_added(load_json(Path(path) / CONFIG), _read(Path(path) / WEIGHTS), path)


def _check_added(config: Mapping[str, Any], names: Iterable[str], path: object) -> None:
    """Refuse adapters that are not what they add to the base.

    Raises:
        InputError: of an initialisation that changes the base itself, of some tokens alone, or at some tokens alone.
    """
    started = config.get("init_lora_weights")
    if isinstance(started, str) and started.startswith(REBASED):
        raise InputError(
            "the adapter changes its base as well: what it adds is not what it is worth", where=path,
            got=f"init_lora_weights {started!r}",
            hint="convert it, by peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )  # fmt: skip
    if config.get("alora_invocation_tokens"):
        raise InputError(
            "the adapter acts after some tokens alone", where=path, got="alora_invocation_tokens"
        )
    rows = next((name for name in names if "token_adapter" in name or "trainable_tokens" in name), None)
    if rows is not None:
        raise InputError("the adapter trains the embeddings of some tokens alone", where=path, got=rows)


def _other(name: str, tensor: torch.Tensor, names: _Names, replaced: dict[str, torch.Tensor]) -> None:
    """A bias that was trained too, or a tensor of a module that was saved whole."""
    if "lora_" in name:
        raise InputError("a part of LoRA that is not known here", where=name)
    name = re.sub(r"\.(base_layer|modules_to_save(\.[^.]+)?)(?=\.)", "", name)
    with suppress(InputError):  # not the base's: new with this adapter, the head of its task
        name = names.resolve(name)
    replaced[name] = tensor


class _Names:
    """The base's names for those of an adapter."""

    def __init__(self, base: State, folder: str | os.PathLike[str] | None) -> None:
        self._base, self._folder = base, folder

    def resolve(self, name: str) -> str:
        """The same, or the only one that ends in it or that it ends in; else by what its class calls it in memory.

        Raises:
            InputError: there is none, or not one alone.
        """
        near = _near(name, self._base)
        if not near:
            near = [saved for held in _near(name, self._held) if (saved := self._held[held]) in self._base]
        if len(near) != 1:
            got = ", ".join(near[:3]) or None
            hint = "is this the adapter's base?"
            raise InputError("the base has no such tensor", where=name, got=got, hint=hint)
        return near[0]

    @cached_property
    def _held(self) -> Mapping[str, str]:
        return {} if self._folder is None else saved_names(self._folder)


def _near(name: str, known: Mapping[str, object]) -> list[str]:
    if name in known:
        return [name]
    return [one for one in known if one.endswith("." + name) or name.endswith("." + one)]


def lora_scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / √r; a pattern for alpha is a regular expression behind any prefix."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = float(config.get("lora_alpha", rank))
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _delta(
    module: str,
    end: str,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    origin: torch.Tensor,
) -> torch.Tensor:
    """What one pair of matrices adds to the tensor `origin`, in its shape, float32."""
    other = module + _PAIRS[end]
    if other not in tensors:
        raise InputError("one of two LoRA matrices is missing", where=other)
    a, b = tensors[module + end].float(), tensors[other].float()
    rank = a.shape[0]
    # Convolutions: A is a convolution to `rank` channels, B one of size 1.
    product = torch.einsum("or,r...->o...", b.reshape(b.shape[0], rank), a)
    embedding = end == ".lora_embedding_A"
    square = origin.ndim == 2 and origin.shape[0] == origin.shape[1]
    flag = bool(config.get("fan_in_fan_out"))
    transposed = embedding or (flag if square else product.ndim == 2 and product.shape != origin.shape)
    delta = lora_scale(module, rank, config) * (product.T if transposed else product)
    if delta.shape != origin.shape:
        raise InputError(
            "the adapter has another shape than the base",
            where=module,
            expected=list(origin.shape),
            got=list(delta.shape),
        )
    magnitude = tensors.get(module + _MAGNITUDE)
    if magnitude is None:
        return delta.to(origin.device)
    if delta.ndim != 2 or embedding:
        raise InputError("DoRA is known here for linear layers alone", where=module)
    whole = origin.float().cpu() + delta
    norms = whole.norm(dim=0 if transposed else 1)
    factor = magnitude.float().flatten() / norms
    return (whole * (factor if transposed else factor[:, None]) - origin.float().cpu()).to(origin.device)


def _read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file; `open_checkpoint` refuses adapters, which are no models."""
    if not path.exists():
        hint = "save it with save_pretrained, which writes safetensors"
        raise InputError("the adapter has no weights", where=path.parent, expected=path.name, hint=hint)
    fd = open_regular(path)
    try:
        out = {}
        for info in read_header(fd, path.name, path).tensors:
            bits = np.empty(info.shape, bits_dtype(info.dtype))
            if bits.nbytes:
                read_into(fd, bits.reshape(-1).view(np.uint8).data, info.start, path)
            out[info.name] = from_bits(bits, info)
        return out
    finally:
        os.close(fd)


def cosines(vectors: Iterable[TaskVector]) -> list[list[float]]:
    """Cosines between task vectors, over the tensors that each pair shares."""
    found = list(vectors)

    def inner(one: TaskVector, two: TaskVector) -> float:
        shared = one.deltas.keys() & two.deltas.keys()
        return sum(
            float((one.deltas[n].double() * two.deltas[n].double()).sum())
            for n in shared
            if one.deltas[n].shape == two.deltas[n].shape
        )

    norms = [vector.norm or 1.0 for vector in found]
    return [
        [inner(one, two) / (norms[i] * norms[j]) for j, two in enumerate(found)]
        for i, one in enumerate(found)
    ]
