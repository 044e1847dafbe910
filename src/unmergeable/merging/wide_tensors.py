"""A wide merge as the tensors of one wider model: heads and MLP rows of all models one behind the other.

Which rows of a tensor belong to which head is read from the spec's table. Which layers are linear, which of
them write to the residual stream and whose output the others read is found by running the model, and so is
what the stored weight of a norm means. What differs between the models and cannot stand side by side is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from ..match import Match
from ..spec import Site
from ..stock import module_state

State = Mapping[str, torch.Tensor]

HINT = "as a module it has no such limits: unmergeable.merging.wide.WideModel"
# In float64 what is the same differs by less, relative to the largest number; nothing else comes near.
_SAME = 1e-9
_PROBES = 8
_SHOWN = 20


class Float64(TorchFunctionMode):
    """While entered, casts to float32 go to float64: models make them inside of norms, softmax and rotations."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


# --- rows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of a wide tensor along one axis: places in the models' rows put one behind the other.

    The place behind the last one stands for zeros: a head that no model has.
    """

    axis: int
    places: torch.Tensor

    def gather(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The wide tensor from the models' own."""
        shape = list(values[0].shape)
        shape[self.axis] = 1
        return torch.cat([*values, values[0].new_zeros(shape)], self.axis).index_select(
            self.axis, self.places
        )


@dataclass(frozen=True)
class Wider:
    """A spec laid over a model, and how far it grows.

    Attributes:
        match: of one of the models.
        count: models side by side.
        factor: key-value heads of the wide model over those of one; with more than `count`, some stay empty.
    """

    match: Match
    count: int
    factor: Fraction

    @cached_property
    def _groups(self) -> frozenset[str]:
        """The dim of key-value heads, with which queries, values and outputs stay together."""
        sites = [matched.site for matched in self.match.sites]
        return frozenset(dim for site in sites if site.kind == "vo" for dim in site.batch_dims)

    def growing(self, site: Site) -> frozenset[str]:
        """The dims of a site that grow."""
        return frozenset({site.acts}) if site.kind == "mlp" else self._groups & set(site.sizes)

    def sizes(self, number: int) -> dict[str, int]:
        """The sizes of a site of the wide model."""
        matched = self.match.sites[number]
        grow = self.growing(matched.site)
        factor = self.count if matched.site.kind == "mlp" else self.factor
        return {dim: int(size * factor) if dim in grow else size for dim, size in matched.sizes.items()}

    def rows(self, name: str) -> Rows | None:
        """Where the rows of a wide tensor come from; None for a tensor that does not grow.

        Raises:
            InputError: the table does not say it for all of them, or in two ways.
        """
        found: tuple[int, np.ndarray] | None = None
        for part in self.match.parts.get(name, ()):
            own, wide = self.match.sites[part.site].sizes, self.sizes(part.site)
            grow = self.growing(self.match.sites[part.site].site)
            for axis, index in part.slot.axes.items():
                first = [dim for dim in index.dims if dim in grow]
                if not first:
                    continue
                source, target = index.view(own), index.view(wide)
                order = (*first, *(dim for dim in index.dims if dim not in first))
                if found is None:
                    found = axis, np.full(target.total, -1)
                if len(first) > 1 or found[0] != axis or len(found[1]) != target.total:
                    raise InputError("a tensor would grow in two ways", where=name, got=index.text)
                each, places = source.positions(order), target.positions(order)
                number = np.arange(len(places)) // len(each)
                values = each[np.arange(len(places)) % len(each)]
                values = values + number.reshape(-1, *[1] * (values.ndim - 1)) * source.total
                values[number >= self.count] = self.count * source.total
                known = found[1][places]
                if not np.array_equal(known[known >= 0], values[known >= 0]):
                    raise InputError("a tensor would grow in two ways", where=name, got=index.text)
                found[1][places] = values
        if found is None:
            return None
        if (found[1] < 0).any():
            raise InputError("rows of a tensor belong to no head and to all of them", where=name)
        return Rows(found[0], torch.from_numpy(found[1]))


# --- layers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A linear layer. `axis`: of its weight, which takes inputs; `source`: the module of vectors that it reads."""

    axis: int
    source: str | None


def linear_layers(model: nn.Module, inside: tuple[str, ...], arguments: dict[str, Any]) -> dict[str, Layer]:
    """The linear layers of a model's blocks by name, found by running it in float64.

    Args:
        model: in evaluation mode.
        inside: how the names of what is in blocks begin.
        arguments: of one forward.
    """
    kept: list[torch.Tensor] = []  # alive as long as their addresses mean something
    sources: dict[tuple[int, int], str] = {}
    found: dict[str, Layer] = {}

    def hook(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            return
        if all(parameter.ndim == 1 for parameter in layer.parameters()):
            kept.append(output)
            sources[output.data_ptr(), output.numel()] = name
        elif inputs and isinstance(inputs[0], torch.Tensor) and name not in found:
            axis = _input_axis(layer, inputs[0], output)
            if axis is not None:
                kept.append(inputs[0])
                found[name] = Layer(axis, sources.get((inputs[0].data_ptr(), inputs[0].numel())))

    def watch(name: str) -> Any:
        return lambda layer, inputs, output: hook(name, layer, inputs, output)

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if name.startswith(inside) and any(True for _ in module.parameters())
    ]
    try:
        with torch.no_grad(), Float64():
            model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _input_axis(layer: nn.Module, x: torch.Tensor, output: torch.Tensor) -> int | None:
    """The axis of a layer's weight that takes its inputs; None if it is not x times its weight plus its bias."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or weight.ndim != 2 or not x.is_floating_point() or not x.numel():
        return None
    row, want = x.reshape(-1, x.shape[-1])[:_PROBES], output.reshape(-1, output.shape[-1])[:_PROBES]
    for axis, matrix in ((1, weight.T), (0, weight)):
        if matrix.shape == (row.shape[-1], want.shape[-1]):
            got = row @ matrix + (0 if bias is None else bias)
            if _same(got, want):
                return axis
    return None


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return float((one - two).abs().max()) <= _SAME * max(float(two.abs().max()), 1e-300)


# --- norms --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """What the stored vectors of a norm mean: its output is n(x) · γ + β, γ = `constant` + its weight.

    Attributes:
        weight, bias: names of its parameters; no bias: None.
        constant: 0, or 1 where the stored weight is the difference to 1.
    """

    weight: str
    bias: str | None
    constant: float

    @property
    def neutral(self) -> float:
        """The weight for which γ is 1."""
        return 1 - self.constant

    def gamma(self, layer: nn.Module) -> torch.Tensor:
        """γ of a layer."""
        return self.constant + layer.get_parameter(self.weight).detach()

    def beta(self, layer: nn.Module) -> torch.Tensor | None:
        """β of a layer; None where it is zero."""
        beta = None if self.bias is None else layer.get_parameter(self.bias).detach()
        return beta if beta is not None and bool(beta.any()) else None


def read_norm(layer: nn.Module) -> Norm | None:
    """What the vectors of a module mean, found by running it; None if it is no norm with one or two of them."""
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    vectors = dict(layer.named_parameters())
    if not names or len(vectors) != len(names) or any(vector.ndim != 1 for vector in vectors.values()):
        return None
    width = len(vectors[names[0]])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBES, width, generator=generator, dtype=torch.float64)

    def run(**given: float) -> torch.Tensor:
        values = {name: torch.full_like(vectors[name], given.get(name, 0.0)) for name in names}
        output: torch.Tensor = functional_call(layer, values, (x,))
        return output

    with torch.no_grad(), Float64():
        zero = run()
        adding = [name for name in names if _same(run(**{name: 1.0}) - zero, torch.ones_like(x))]
        scaling = [name for name in names if name not in adding]
        if len(scaling) != 1 or len(adding) > 1:
            return None
        normed = run(**{scaling[0]: 1.0}) - zero
        constant = next((number for number in (0.0, 1.0) if _same(zero, number * normed)), None)
        if constant is None:
            return None
        norm = Norm(scaling[0], adding[0] if adding else None, constant)
        beta = norm.beta(layer)
        want = norm.gamma(layer) * normed
        return norm if _same(layer(x), want if beta is None else want + beta) else None


# --- tensors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """The tensors of wide blocks by name, in float64, and the norms that were folded into what they feed."""

    tensors: dict[str, torch.Tensor]
    folded: tuple[str, ...]


def wide_blocks(
    models: Sequence[nn.Module],
    weights: Sequence[float],
    wider: Wider,
    layers: Mapping[str, Layer],
    inside: tuple[str, ...],
) -> Blocks:
    """The blocks of all models side by side.

    Args:
        models: of one class, in float64.
        weights: wᵢ, which multiply what each model writes to the residual stream.
        wider: how far they grow.
        layers: the linear layers of the blocks.
        inside: how the names of what is in blocks begin.

    Raises:
        InputError: what differs between the models and cannot stand side by side, all at once.
    """
    problems: dict[str, str] = {}
    states = [module_state(model) for model in models]
    names = [name for name in states[0] if name.startswith(inside)]
    rows = {name: wider.rows(name) for name in names}
    writers = set()
    for module, layer in layers.items():
        grown = rows.get(f"{module}.weight")
        if grown is not None and grown.axis == layer.axis:
            writers.add(module)
    readers = {module for module in layers if rows.get(f"{module}.weight") is not None} - writers
    norms = {
        source: norm
        for source in sorted({layer.source for layer in layers.values() if layer.source is not None})
        if (norm := _foldable(source, models, layers, readers, problems)) is not None
    }

    def folded(name: str, model: nn.Module, state: State) -> torch.Tensor:
        """A tensor of a layer that reads a norm, with the norm's γ and β in it."""
        module, _, leaf = name.rpartition(".")
        layer = layers[module]
        norm = norms.get(layer.source or "")
        if norm is None:
            return state[name]
        source = model.get_submodule(layer.source or "")
        weight = state[f"{module}.weight"]
        if leaf == "weight":
            gamma = norm.gamma(source)
            return weight * (gamma if layer.axis == 1 else gamma[:, None])
        beta = norm.beta(source)
        return state[name] if beta is None else state[name] + (weight if layer.axis == 1 else weight.T) @ beta

    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        grown, values = rows[name], [state[name] for state in states]
        if grown is not None and module in readers:
            values = [folded(name, model, state) for model, state in zip(models, states, strict=True)]
        if module in writers:  # its bias too, which is added once
            values = [weight * value for weight, value in zip(weights, values, strict=True)]
        if grown is not None:
            tensors[name] = grown.gather(values)
        elif module in writers:
            tensors[name] = torch.stack(values).sum(0)
        elif module in norms:
            constant = norms[module].neutral if leaf == norms[module].weight else 0.0
            tensors[name] = torch.full_like(values[0], constant)
        elif all(torch.equal(value, values[0]) for value in values):
            tensors[name] = values[0]
        elif module not in problems:
            problems[name] = "it differs between the models, and there is one for all heads and rows"
    if problems:
        lines = [f"{name}: {reason}" for name, reason in problems.items()]
        more = [f"and {len(lines) - _SHOWN} more"] if lines[_SHOWN:] else []
        raise InputError(
            "the models cannot stand side by side in one checkpoint:\n  "
            + "\n  ".join(lines[:_SHOWN] + more),
            where=type(models[0]).__name__,
            hint=HINT,
        )
    return Blocks(tensors, tuple(norms))


def _foldable(
    name: str,
    models: Sequence[nn.Module],
    layers: Mapping[str, Layer],
    readers: set[str],
    problems: dict[str, str],
) -> Norm | None:
    """A norm that differs between the models, where the layers behind it can take it up."""
    found = [model.get_submodule(name) for model in models]
    values = [dict(layer.named_parameters()) for layer in found]
    if all(torch.equal(value, values[0][key]) for own in values for key, value in own.items()):
        return None
    behind = [module for module, layer in layers.items() if layer.source == name]
    shared = [module for module in behind if module not in readers]
    deaf = [module for module in behind if models[0].get_submodule(module)._parameters.get("bias") is None]
    norms = {read_norm(layer) for layer in found}
    norm = norms.pop()
    if shared:
        problems[name] = f"a norm that differs between the models feeds a layer that they share, {shared[0]}"
    elif norm is None or norms:
        problems[name] = "it differs between the models, and what its vectors do is not known"
    elif deaf and any(norm.beta(layer) is not None for layer in found):
        problems[name] = f"a norm's bias differs between the models, and {deaf[0]} has none to take it up"
    else:
        return norm
    return None
