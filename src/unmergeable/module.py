"""Lock a torch module in memory, in place: for models that are never written, or are written by others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch

from .checkpoint.numeric import bits_dtype
from .engine import check_range
from .errors import InputError, UsageError
from .execute import apply_plan
from .groups import Element
from .keys import Key, fresh_salt, load_key
from .lock import method_options
from .match import Instance, Match, match_spec
from .methods import Context
from .methods import method as find_method
from .methods.context import CONDITION
from .plan import ConfigLike, SpecLike, UnknownArchitecture, read_config
from .preflight import check_alike
from .transform import Array, TensorPlan, compile_tensor

__all__ = ["LockedModule", "lock_module"]

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class LockedModule:
    """A module that is locked in memory.

    Attributes:
        model: the module.
        key, method, options, salt: with these and the key, the same lock can be drawn again.
    """

    model: torch.nn.Module
    key: str
    method: str
    options: Mapping[str, Any]
    salt: bytes = field(repr=False)
    _match: Match = field(repr=False)
    _elements: Mapping[tuple[int, Instance], Element] = field(repr=False)
    _locked: bool = field(default=True, repr=False)

    @property
    def locked(self) -> bool:
        """Whether the lock is on."""
        return self._locked

    def unlock(self) -> None:
        """Undo the lock in place; weights that were trained meanwhile keep what they learnt.

        Raises:
            UsageError: it is undone already. InputError: the model has other tensors now.
        """
        if not self._locked:
            raise UsageError("the module is not locked any more")
        _transform(_tensors(self.model), self._match, self._elements, undo=True)
        self._locked = False


def lock_module(
    model: torch.nn.Module,
    *,
    key: Key | str,
    method: str = "exact",
    scales: bool = False,
    condition: float = CONDITION,
    config: ConfigLike | None = None,
    spec: SpecLike | None = None,
    options: Mapping[str, Any] | None = None,
    salt: bytes | None = None,
) -> LockedModule:
    """Lock the parameters and buffers of a module in place; its optimiser's state does not move with them.

    Args:
        model: a module whose `config.to_dict()` says what it is, unless `config` does.
        key: the owner's key, or its file.
        method, scales, condition, options, salt: as in `lock`; pruning is for checkpoints.
        spec: takes the place of a shipped or proven one.

    Returns: a handle that undoes it.

    Raises:
        UsageError: options that contradict each other.
        InputError: no spec fits the module, or a tensor cannot be used. The module is as it was then.
        ClaimError: a site could not be moved far enough.
    """
    key = key if isinstance(key, Key) else load_key(key)
    settings = method_options(method, scales=scales, condition=condition, more=options)
    if settings.get("prune_rate"):
        raise UsageError("a module in memory is not pruned: lock its checkpoint instead")
    salt = fresh_salt() if salt is None else salt
    tensors = _tensors(model)
    match = _match(model, tensors, config, spec)
    _check(tensors, match)
    drawn = find_method(method).draw(Context(match, key, salt, _Weights(tensors), None, settings))
    if not drawn.elements:
        raise InputError(f"the method '{method}' acts on no site of this module", where=type(model).__name__)
    if not all(element.exact for element in drawn.elements.values()):
        for _ in _computed(tensors, match, drawn.elements, undo=False):
            pass  # once without writing: a number that does not fit is refused before anything has changed
    _transform(tensors, match, drawn.elements, undo=False)
    return LockedModule(model, key.id, method, settings, salt, match, drawn.elements)


class _Weights:
    """The module's tensors, for methods that look at them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def dtype(self, name: str) -> str:
        return _DTYPES[self._tensors[name].dtype]

    def bits(self, name: str) -> Array:
        return _bits(self._tensors[name])

    def floats(self, name: str) -> Array:
        return np.asarray(self._tensors[name].to("cpu", torch.float64).numpy())


def _is_stock(kind: type) -> bool:
    """Whether a class is transformers' own, by the name under which it is found there."""
    import transformers

    return getattr(transformers, kind.__name__, None) is kind


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the state dict once, under its first name: tied ones share their memory."""
    seen: set[tuple[object, ...]] = set()
    out = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and tensor.device.type != "meta" and place in seen:
            continue
        seen.add(place)
        out[name] = tensor
    return out


def _match(
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    config: ConfigLike | None,
    spec: SpecLike | None,
) -> Match:
    """The spec whose names are those in memory: its own, or its checkpoint's where they agree."""
    where = type(model).__name__
    from .specs import spec_of

    fields = read_config(config)
    if fields is None:
        own = getattr(model, "config", None)
        if own is None or not hasattr(own, "to_dict"):
            raise InputError("the module has no config", where=where, hint="pass config=")
        # As config.json has it: its keys are text.
        fields = json.loads(json.dumps(own.to_dict(), default=str))
    if _is_stock(type(model)):
        # What its checkpoint would say: loaded from one of another class, the config still names that.
        fields["architectures"] = [where]
    elif spec is None:
        raise UnknownArchitecture(
            "the module is of a class that is not one of transformers', and no proof is of that",
            where=f"{type(model).__module__}.{where}",
            hint="give a spec of your own by spec=",
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    everything = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    generating = getattr(model, "generation_config", None)
    generation = {} if generating is None else generating.to_dict()
    misfit: InputError | None = None
    for attempt in (shapes, everything):  # a tied name may be left out of a checkpoint, or not
        try:
            found, canonical = spec_of(spec, fields, attempt, generation, where)
            return match_spec(found, attempt, canonical, where)
        except InputError as error:
            misfit = misfit or error
    assert misfit is not None
    hint = "names or shapes differ from those of its checkpoints: save it and lock the checkpoint"
    raise UnknownArchitecture(misfit.what, where=where, expected=misfit.expected, got=misfit.got, hint=hint)


def _check(tensors: Mapping[str, torch.Tensor], match: Match) -> None:
    for name in match.parts:
        if name not in tensors:
            raise InputError("a tied tensor takes part in a site twice", where=name)
        tensor = tensors[name]
        if tensor.device.type == "meta" or tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            got = f"{tensor.dtype} on {tensor.device}"
            raise InputError("the tensor has no plain floating-point values", where=name, got=got)
    check_alike(match, {name: tensor.dtype for name, tensor in tensors.items()})


def _transform(
    tensors: Mapping[str, torch.Tensor],
    match: Match,
    elements: Mapping[tuple[int, Instance], Element],
    *,
    undo: bool,
) -> None:
    missing = [name for name in match.parts if name not in tensors]
    if missing:
        raise InputError("the module has lost a tensor", where=missing[0])
    with torch.no_grad():
        for group in _computed(tensors, match, elements, undo=undo):
            for name, bits in group.items():
                target = tensors[name]
                signed = bits.view(f"i{bits.dtype.itemsize}")
                target.copy_(torch.from_numpy(signed).view(target.dtype))


def _computed(
    tensors: Mapping[str, torch.Tensor],
    match: Match,
    elements: Mapping[tuple[int, Instance], Element],
    *,
    undo: bool,
) -> Iterator[dict[str, Array]]:
    """New bits in groups that must be written together: tensors that exchange their places."""
    plans = {name: compile_tensor(match, elements, name, undo=undo) for name in match.parts}
    done: set[str] = set()
    for name in plans:
        group: dict[str, Array] = {}
        while name not in done:
            done.add(name)
            group[name] = _apply(tensors, plans[name], name)
            name = plans[name].source
        yield group


def _apply(tensors: Mapping[str, torch.Tensor], plan: TensorPlan, name: str) -> Array:
    source = tensors[plan.source]
    dtype = _DTYPES[source.dtype]
    bits = apply_plan(_bits(source), plan, dtype)
    if not plan.exact:
        check_range(bits, dtype, name)
    return np.ascontiguousarray(bits)


def _bits(tensor: torch.Tensor) -> Array:
    """A copy of the raw bits, in the tensor's shape."""
    plain = tensor.detach().to("cpu", copy=True).contiguous()
    signed = plain.reshape(prod(plain.shape)).view(_BITS[plain.element_size()]).numpy()
    return np.asarray(signed.view(bits_dtype(_DTYPES[tensor.dtype])).reshape(tuple(tensor.shape)))
