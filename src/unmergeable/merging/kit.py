"""mergekit's twenty methods, in process, on any models that we can load.

mergekit itself takes a misspelt option silently, guesses architectures that it does not know, and leaves the
method's name out of its errors; here options are checked against `TABLE` first and names never reach it.
The calls are those of its own `merge_state_dicts` (0.1.5 or later), bit-equal to its command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, UsageError
from . import Merged
from .tensors import possible, split

if TYPE_CHECKING:
    from . import State

MINIMUM = "0.1.5"
PORTION = 1 << 29  # bytes of float32 copies that are handed to mergekit at a time
REQUIRED = object()  # the default of an option that has none
ORIGIN = "base"  # the name that the base goes by in mergekit


@dataclass(frozen=True)
class Method:
    """What one method takes.

    Attributes:
        base: "required"; "optional" (its meaning changes); "pair": the first of two models takes its place,
            or the base and one model; "none".
        options: by name, the default; `REQUIRED` has none.
        each: the options that may be given by model, as a mapping.
        least, most: how many models it takes, the base not counted.
        grid: what an audit tries: options, crossed with WEIGHTS where `weight` is among them.
        random: whether it draws.
    """

    base: str
    options: Mapping[str, Any] = field(default_factory=dict)
    each: frozenset[str] = frozenset()
    least: int = 1
    most: int | None = None
    grid: tuple[Mapping[str, Any], ...] = ({},)
    random: bool = False


def _arithmetic(normalize: bool, rescale: bool, grid: tuple[Mapping[str, Any], ...], **more: Any) -> Method:
    options = {
        "weight": REQUIRED, "density": 1.0, "lambda": 1.0,
        "normalize": normalize, "rescale": rescale, "int8_mask": False,
    } | {name: value for name, value in more.items() if name != "random"}  # fmt: skip
    each = frozenset({"weight", "density", "gamma", "epsilon"} & options.keys())
    return Method("required", options, each, grid=grid, random=bool(more.get("random")))


_WEIGHT = frozenset({"weight"})
_DENSITIES = tuple({"density": density} for density in (0.2, 0.5, 0.8))
# Coefficients of (the protected model, each of the others), by the weights that a method adds up.
WEIGHTS = ((0.3, 0.3), (0.5, 0.5), (0.7, 0.7), (1.0, 0.3), (0.7, 0.2), (1.0, 1.0))
_TS = tuple({"t": t} for t in (0.2, 0.35, 0.5, 0.65, 0.8))

TABLE: dict[str, Method] = {
    "passthrough": Method("none", {"scale": None}, frozenset({"scale"}), most=1),
    "linear": Method("none", {"weight": REQUIRED, "normalize": True}, _WEIGHT),
    "slerp": Method("pair", {"t": REQUIRED}, least=1, most=2, grid=_TS),
    "nuslerp": Method(
        "optional", {"weight": REQUIRED, "nuslerp_row_wise": False, "nuslerp_flatten": True},
        _WEIGHT, least=2, most=2, grid=({}, {"nuslerp_flatten": False}),
    ),
    "multislerp": Method("optional", {"weight": REQUIRED, "normalize_weights": True, "eps": 1e-8}, _WEIGHT),
    "karcher": Method("none", {"max_iter": 10, "tol": 1e-5}),
    "model_stock": Method(
        "required", {"filter_wise": False}, least=2, grid=({}, {"filter_wise": True}),
    ),
    "arcee_fusion": Method("pair", least=1, most=2),
    "nearswap": Method(
        "pair", {"t": REQUIRED}, least=1, most=2, grid=tuple({"t": t} for t in (0.001, 0.003, 0.01, 0.03)),
    ),
    "sce": Method(
        "required", {"int8_mask": False, "select_topk": 1.0},
        grid=tuple({"select_topk": part} for part in (0.1, 0.5, 1.0)),
    ),
    "ram": Method("required", {"epsilon": 1e-5}, grid=({}, {"epsilon": 1e-3})),
    "ramplus_tl": Method(
        "required", {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, grid=({}, {"r": 0.5, "alpha": 1.0}),
    ),
    "task_arithmetic": _arithmetic(False, False, ({},)),
    "ties": _arithmetic(
        True, False, tuple({"density": d, "normalize": n} for d in (0.2, 0.5) for n in (True, False)),
    ),
    "dare_ties": _arithmetic(False, True, _DENSITIES, random=True),
    "dare_linear": _arithmetic(False, True, _DENSITIES, random=True),
    "breadcrumbs": _arithmetic(False, False, ({"density": 0.9}, {"density": 0.5, "gamma": 0.05}), gamma=0.01),
    "breadcrumbs_ties": _arithmetic(
        False, False, ({"density": 0.9}, {"density": 0.5, "gamma": 0.05}), gamma=0.01,
    ),
    "della": _arithmetic(True, True, _DENSITIES, epsilon=0.15, random=True),
    "della_linear": _arithmetic(False, True, _DENSITIES, epsilon=0.15, random=True),
}  # fmt: skip


def grid(name: str, protected: str, others: tuple[str, ...]) -> list[dict[str, Any]]:
    """The options that suite v1 tries for a method, with the weights of every model spelt out.

    Raises:
        UsageError: no such method.
    """
    method = _method(name)
    if "weight" not in method.options:
        return [dict(options) for options in method.grid]
    return [
        {**options, "weight": {protected: one, **dict.fromkeys(others, other)}}
        for options, (one, other) in product(method.grid, WEIGHTS)
    ]


def kit(
    name: str,
    base: State,
    experts: Mapping[str, State],
    *,
    with_base: bool = True,
    **options: Any,
) -> Merged:
    """Merge by one of mergekit's methods, in float32, tensor by tensor of what the models share.

    Set torch's seed first (`merge` does): several methods draw.

    Args:
        name: a key of `TABLE`.
        base: what the models were fine-tuned from; methods that have no base take names and dtypes from it.
        experts: the models. Where a method takes two in their order ("pair"), the first is its base; with one
            model alone the base is.
        with_base: False leaves the base out where it is optional.
        options: those of the method; weights and densities as one number or by model.

    Raises:
        UsageError: unknown or missing options, a wrong number of models.
        InputError: models that do not fit together, a value that mergekit refuses, or no mergekit.
    """
    method = _method(name)
    options = _checked(name, method, experts, options)
    parts = split(base, experts)
    # Tensors in groups that the same models have: a private tensor of one does not keep the others from it.
    groups: dict[tuple[tuple[str, ...], bool], list[str]] = {}
    for tensor, models in parts.shared.items():
        single = "epsilon" in method.each and base[tensor].numel() == 1
        groups.setdefault((models, single), []).append(tensor)
    shared: dict[str, torch.Tensor] = dict(base)
    for (models, single), names in groups.items():
        if models != tuple(experts) and not method.least <= len(models):
            continue  # too few of the models have them: they stay as the base has them
        # A single number has no rank among others: nothing of it is dropped.
        settings = {**options, "density": 1.0} if single else options
        for some in _portions(names, base, len(models) + 1):
            inputs = {model: _floats(experts[model], some, base, method) for model in models}
            origin = _floats(base, some, base, method)
            merged = _run(name, method, inputs, origin, settings, with_base)
            for tensor, value in merged.items():
                shared[tensor] = possible(tensor, value).reshape(base[tensor].shape).to(base[tensor].dtype)
    return Merged(shared, parts.private)


def _portions(names: list[str], base: State, models: int) -> Iterator[list[str]]:
    """Names in their order, as many at a time as all models' float32 copies stay within PORTION bytes."""
    some: list[str] = []
    size = 0
    for name in names:
        needed = 4 * models * base[name].numel()
        if some and size + needed > PORTION:
            yield some
            some, size = [], 0
        some.append(name)
        size += needed
    if some:
        yield some


def _floats(state: State, names: list[str], base: State, method: Method) -> dict[str, torch.Tensor]:
    """Tensors in float32, in a shape that mergekit can merge."""
    found = {name: state[name].to(base[name].device, torch.float32) for name in names}
    if "epsilon" not in method.each:
        return found
    return {name: _rankable(tensor) for name, tensor in found.items()}


def _rankable(tensor: torch.Tensor) -> torch.Tensor:
    """mergekit's DELLA ranks along the second axis, and divides by zero where that has length 1."""
    if tensor.ndim < 2:
        return tensor.reshape(-1)
    if tensor.shape[1] > 1:
        return tensor
    return tensor.flatten(1) if tensor[0].numel() > 1 else tensor.reshape(-1)


def _run(
    name: str,
    method: Method,
    models: dict[str, dict[str, torch.Tensor]],
    base: dict[str, torch.Tensor],
    options: Mapping[str, Any],
    with_base: bool,
) -> dict[str, torch.Tensor]:
    inputs: dict[str, dict[str, torch.Tensor]] = dict(models)
    origin: str | None = None
    if method.base == "pair" and len(models) == 2:
        origin = next(iter(models))
    elif method.base in ("required", "pair") or (method.base == "optional" and with_base):
        inputs = {_origin(models): base, **models}
        origin = _origin(models)
    parameters = {
        option: {model: value[model] for model in models} if isinstance(value, Mapping) else value
        for option, value in options.items()
    }
    merge_state_dicts = _mergekit()
    try:
        with torch.no_grad():
            merged: dict[str, torch.Tensor] = merge_state_dicts(
                inputs, name, parameters=parameters, base=origin
            )
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError("mergekit refuses to merge", where=name, got=str(error)[:500]) from error
    return merged


def _origin(models: Mapping[str, object]) -> str:
    """A name for the base that no model has."""
    name = ORIGIN
    while name in models:
        name += "_"
    return name


def _method(name: str) -> Method:
    if name not in TABLE:
        raise UsageError("mergekit has no such method", where=f"'{name}'", expected=" | ".join(TABLE))
    return TABLE[name]


def _checked(
    name: str, method: Method, models: Mapping[str, object], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options as they are, when all of them make sense; mergekit knows its own defaults."""
    if unknown := [option for option in options if option not in method.options]:
        known = ", ".join(method.options) or "no options"
        raise UsageError(
            "options that the method does not have", where=name, expected=known, got=", ".join(unknown)
        )
    required = [option for option, default in method.options.items() if default is REQUIRED]
    if missing := [option for option in required if option not in options]:
        raise UsageError("the method needs an option", where=name, expected=", ".join(missing))
    if len(models) < method.least or len(models) > (method.most or len(models)):
        most = method.most if method.most is not None else "any number"
        expected = (
            f"{method.least} models" if method.least == method.most else f"{method.least} to {most} models"
        )
        raise UsageError("a wrong number of models", where=name, expected=expected, got=len(models))
    for option, value in options.items():
        if isinstance(value, Mapping) and option not in method.each:
            raise UsageError("this option is one for all models", where=f"{name}: {option}")
        if isinstance(value, Mapping) and value.keys() != models.keys():
            got, expected = ", ".join(value), ", ".join(models)
            raise UsageError(
                "values and models differ", where=f"{name}: {option}", expected=expected, got=got
            )
    return dict(options)


def _mergekit() -> Any:
    """mergekit's function. Imported here: it takes seconds, and nobody needs it who does not merge by it."""
    try:
        from mergekit.merge_methods import merge_state_dicts
    except ImportError as error:
        raise InputError(
            "mergekit cannot be imported",
            expected=f"mergekit >= {MINIMUM}",
            got=error,
            hint="pip install 'unmergeable[merge]'",
        ) from error
    return merge_state_dicts
