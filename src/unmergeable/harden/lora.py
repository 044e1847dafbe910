"""A LoRA adapter in training: its merges are those of peft and of folded models, and it stays a stock adapter.

Its update of a layer is s · B · A. Sums of updates are what `cat` makes, and merges of models that adapters were folded
into: a coefficient of the update is one of B, row by row as well, and what a thief's own adapters add goes into the
frozen weight below, in place, and out again. `linear`, `ties`, `dare_…` and `magnitude_prune` mix A with A and B with
B, each by the root of its weight: there one adapter's B meets another's A. `svd` and the types that end on it cut the
sum of the updates to the adapter's rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.files import load_json
from ..errors import InputError
from ..merging.vectors import CONFIG, PREFIX, WEIGHTS, lora_scale
from .draws import Draw
from .even import evened
from .exact import exact, wide
from .merged import Weights, _placed
from .mix import Mix, Part, leading, parts

if TYPE_CHECKING:
    from ..merging import State


class LoraWeights(Weights):
    """The adapter of a model; names are those of the layers' weights in the model itself.

    Args:
        module: of peft, or of transformers with an adapter of its own (`add_adapter`): with one active LoRA adapter,
            of linear layers.

    Raises:
        InputError: it has none or several, or adapts anything else.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        from peft.tuners.lora import Linear

        adapter = _active(module)
        self.layers: dict[str, Any] = {}
        for name, layer in inner(module).named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            if not isinstance(layer, Linear) or adapter not in layer.lora_A or layer.use_dora.get(adapter):
                got = type(layer).__name__
                raise InputError("an adapter of other than plain linear layers", where=name, got=got)
            self.layers[f"{name}.weight"] = layer
        if not self.layers:
            raise InputError("no LoRA layers", where=type(module).__name__)
        self.adapter = adapter
        parameters = {}
        for name, layer in self.layers.items():
            parameters[f"{name} A"] = layer.lora_A[adapter].weight
            parameters[f"{name} B"] = layer.lora_B[adapter].weight
        self.parameters = parameters
        self._module, self._statistics, self._kept = module, (), {}

    @property
    def base(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """The frozen weights of the adapted layers, as outputs × inputs."""
        return {
            name: self._oriented(layer, layer.get_base_layer().weight) for name, layer in self.layers.items()
        }

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: weight.shape for name, weight in self.base.items()}

    def deltas(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, layer in self.layers.items():
            rows = layer.lora_B[self.adapter].weight
            with exact(rows):
                product = rows @ layer.lora_A[self.adapter].weight
            yield name, layer.scaling[self.adapter] * product

    def vector(self) -> dict[str, torch.Tensor]:
        """The task vector as it is now, and the factors that it is made of."""
        return {**super().vector(), **{name: one.detach() for name, one in self.parameters.items()}}

    @property
    def adapts(self) -> bool:
        return True

    def fitted(self, vector: State) -> dict[str, torch.Tensor]:
        found = {}
        for name, layer in self.layers.items():
            like = self._oriented(layer, layer.get_base_layer().weight)
            delta = vector.get(name, torch.zeros_like(layer.get_base_layer().weight.data))
            found[name] = self._oriented(layer, delta).to(like.device)
        return found

    def fitted_factors(self, folder: Path) -> dict[str, torch.Tensor]:
        """The factors of another adapter, by the names of `vector()`, as if it had this one's scale.

        Empty if it is of another rank or of other layers: peft does not mix the factors of such two.
        """
        from safetensors.torch import load_file

        tensors, config = load_file(folder / WEIGHTS), load_json(folder / CONFIG)
        found = {}
        for name, layer in self.layers.items():
            module = name.removesuffix(".weight")
            for letter in "AB":
                like = self.parameters[f"{name} {letter}"]
                one = tensors.get(_stored(name, letter))
                if one is None or one.shape != like.shape:
                    return {}
                rank = self.parameters[f"{name} A"].shape[0]
                scale = lora_scale(module, rank, config) / layer.scaling[self.adapter]
                found[f"{name} {letter}"] = abs(scale) ** 0.5 * one.to(like)
        return found

    @contextmanager
    def merged(self, draw: Draw, direction: State) -> Iterator[None]:
        if draw.even:
            draw, direction = evened(draw, direction, super().vector())
        known = all(f"{name} A" in direction for name in self.layers)
        if draw.mix is not None and draw.mix.cut:
            place = self._cut(draw, draw.mix, direction)
        elif draw.mix is not None and known:
            place = self._mixed(draw, draw.mix, direction)
        else:
            place = self._summed(draw, direction)
        with place:
            yield

    @contextmanager
    def _summed(self, draw: Draw, direction: State) -> Iterator[None]:
        """The update times a coefficient, in B, and the direction in the frozen weight below."""
        frozen = {name: layer.get_base_layer().weight for name, layer in self.layers.items()}
        below = {name: weight.data for name, weight in frozen.items()}
        try:
            with self._set_aside():
                with torch.no_grad():
                    for name, layer in self.layers.items():
                        rows = self.parameters[f"{name} B"]
                        rows.data = _placed(draw.own[name], rows) * rows.data
                        if draw.other[name]:
                            added = draw.other[name] * direction[name].to(rows)
                            total = below[name] + self._oriented(layer, added)
                            # An adapter in float32 may be on a base in bfloat16, which passes are run in.
                            frozen[name].data = total.to(below[name])
                yield
                with torch.no_grad():
                    for name in self.layers:
                        rows = self.parameters[f"{name} B"]
                        if rows.grad is not None:
                            rows.grad = rows.grad * _placed(draw.own[name], rows)
        finally:
            for name, weight in frozen.items():
                weight.data = below[name]

    @contextmanager
    def _mixed(self, draw: Draw, mix: Mix, direction: State) -> Iterator[None]:
        """Both factors mixed, each with the root of its weight: B and A of different adapters meet."""
        generator = torch.Generator().manual_seed(mix.seed)
        own: dict[str, Part] = {}
        with self._set_aside():
            with torch.no_grad():
                for key, one in self.parameters.items():
                    name, other = key[:-2], direction[key].to(one)
                    roots = abs(float(draw.own[name])) ** 0.5, abs(draw.other[name]) ** 0.5
                    own[key], rest = parts(one.data, other, roots, mix, generator)
                    # Parts that are elected are in float32, whatever the factors are in.
                    one.data = (own[key] * one.data + rest * other).to(one)
            yield
            with torch.no_grad():
                for key, one in self.parameters.items():
                    if one.grad is not None:
                        one.grad = (one.grad * own[key]).to(one)

    @contextmanager
    def _cut(self, draw: Draw, mix: Mix, direction: State) -> Iterator[None]:
        """The sum of both updates at the adapter's rank: B spans it, and A is what the sum has in there.

        Gradients are those along matrices of this rank: as if what is cut off were small against what is kept.
        """
        generator = torch.Generator().manual_seed(mix.seed)
        own: dict[str, Part] = {}
        with self._set_aside():
            with torch.no_grad():
                for name, update in self.deltas():
                    first, rows = self.parameters[f"{name} A"], self.parameters[f"{name} B"]
                    own_update, weights = wide(update), (float(draw.own[name]), draw.other[name])
                    other = direction[name].to(own_update)
                    part, rest = parts(own_update, other, weights, mix, generator)
                    total = part * own_update + rest * other
                    with exact(total):
                        span = leading(total, len(first), generator)
                        inside = span.T @ total
                    factor = inside / self.layers[name].scaling[self.adapter]
                    rows.data, first.data = span.to(rows), factor.to(first)
                    # As large as the layer, until the backward pass is done: few numbers, so that half the bits do.
                    own[name] = part.half() if isinstance(part, torch.Tensor) else part
            yield
            with torch.no_grad():
                for name in self.layers:
                    first, rows = self.parameters[f"{name} A"], self.parameters[f"{name} B"]
                    if first.grad is None or rows.grad is None:
                        continue
                    # U Uᵀ G + (1 − U Uᵀ) G V Vᵀ, of G, the gradient of the sum; B = U, and V spans the rows of A.
                    span, kept, slope = wide(rows.data), wide(first.data), wide(rows.grad)
                    with exact(span):
                        besides = slope - span @ (span.T @ slope)
                        inside = own[name] * (span @ wide(first.grad) + besides @ torch.linalg.pinv(kept).T)
                        first.grad = (wide(self._kept[f"{name} B"]).T @ inside).to(first)
                        rows.grad = (inside @ wide(self._kept[f"{name} A"]).T).to(rows)

    def round(self, folder: Path) -> None:
        """The factors as an adapter's dtypes will hold them."""
        from safetensors.torch import load_file

        tensors = load_file(folder / WEIGHTS)
        with torch.no_grad():
            for key, one in self.parameters.items():
                one.copy_(one.to(tensors[_stored(*key.rsplit(" ", 1))].dtype))

    def slopes(self) -> dict[str, float]:
        found = {}
        for name in self.layers:
            rows = self.parameters[f"{name} B"]
            found[name] = 0.0 if rows.grad is None else float((rows.grad * self._kept[f"{name} B"]).sum())
        return found

    def _oriented(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        """Outputs × inputs from the layer's own layout, and back."""
        return weight.data.T if layer.fan_in_fan_out else weight.data


def inner(module: torch.nn.Module) -> torch.nn.Module:
    """The model that an adapter is in: peft wraps it, transformers' own `add_adapter` leaves it as it is."""
    found: Any = module
    return found.get_base_model() if hasattr(found, "get_base_model") else module


def _active(module: Any) -> str:
    """The name of the one adapter that is in use."""
    names = module.active_adapters  # a property of peft's models, a method of transformers'
    names = names() if callable(names) else names
    if len(names) != 1:
        got = ", ".join(names) or "none"
        what = "not one active adapter"
        raise InputError(
            what, where=type(module).__name__, expected="one", got=got, hint="choose by set_adapter"
        )
    return str(names[0])


def _stored(name: str, letter: str) -> str:
    """What a factor of a layer's update is called in an adapter's file."""
    return f"{PREFIX}{name.removesuffix('.weight')}.lora_{letter}.weight"
