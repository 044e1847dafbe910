"""A LoRA adapter in training: its merges are merges of what it adds, and it stays a stock adapter.

Its update of a layer is s · B · A. A coefficient of the update is one of B, row by row as well; what a thief's own
adapters add goes into the frozen weight below, in place, and out again. Merges by peft's `svd` and `cat` are sums of
updates, and so are those of adapters that were folded into their base; `linear` has products of one adapter's A with
another one's B beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from .draws import Draw
from .merged import Weights, _placed

if TYPE_CHECKING:
    from ..merging import State


class LoraWeights(Weights):
    """The adapter of a peft model; names are those of the layers' weights in the model itself.

    Args:
        module: a peft model with one active LoRA adapter of linear layers.

    Raises:
        InputError: it has none, or adapts anything else.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        from peft.tuners.lora import Linear

        found: Any = module
        adapter = found.active_adapter
        self.layers: dict[str, Any] = {}
        for name, layer in found.get_base_model().named_modules():
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
        self._kept = {}

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
            product = layer.lora_B[self.adapter].weight @ layer.lora_A[self.adapter].weight
            yield name, layer.scaling[self.adapter] * product

    @contextmanager
    def merged(self, draw: Draw, direction: State) -> Iterator[None]:
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
                            frozen[name].data = below[name] + self._oriented(layer, added)
                yield
                with torch.no_grad():
                    for name in self.layers:
                        rows = self.parameters[f"{name} B"]
                        if rows.grad is not None:
                            rows.grad = rows.grad * _placed(draw.own[name], rows)
        finally:
            for name, weight in frozen.items():
                weight.data = below[name]

    def slopes(self) -> dict[str, float]:
        found = {}
        for name in self.layers:
            rows = self.parameters[f"{name} B"]
            found[name] = 0.0 if rows.grad is None else float((rows.grad * self._kept[f"{name} B"]).sum())
        return found

    def _oriented(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        """Outputs × inputs from the layer's own layout, and back."""
        return weight.data.T if layer.fan_in_fan_out else weight.data
