"""A module at the weights of a simulated merge, for one forward and backward pass, and back.

Weights are changed in place and restored: what it costs beside the optimiser's state are copies of weights, as many
for ten merges as for one. No forward pass is kept while another one runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .draws import Coefficient, Draw

if TYPE_CHECKING:
    from ..merging import State


class Weights:
    """The weights of a fine-tune that merges share, and those of its base.

    Args:
        parameters: by name; trained in place.
        base: by the same names.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], base: State) -> None:
        self.parameters = dict(parameters)
        self.base = {
            name: base[name].detach().to(parameter.device, parameter.dtype)
            for name, parameter in self.parameters.items()
        }
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """What coefficients are drawn for, by name; one a row is one along the first axis."""
        return {name: one.shape for name, one in self.parameters.items()}

    def deltas(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The task vector, tensor by tensor, differentiable."""
        for name, one in self.parameters.items():
            yield name, one - self.base[name]

    def vector(self) -> dict[str, torch.Tensor]:
        """The task vector as it is now."""
        with torch.no_grad():
            return dict(self.deltas())

    def copy(self) -> dict[str, torch.Tensor]:
        """The weights as they are now, on the CPU."""
        return {name: one.detach().cpu().clone() for name, one in self.parameters.items()}

    def load(self, state: State) -> None:
        """Write weights back."""
        with torch.no_grad():
            for name, one in self.parameters.items():
                one.copy_(state[name])

    @contextmanager
    def merged(self, draw: Draw, direction: State) -> Iterator[None]:
        """Inside, the module has the weights of a merge; gradients that are found there are the fine-tune's after.

        They are added to those that were there: d/dθ of f(base + own ∘ (θ − base) + …) is own ∘ ∇f.

        Args:
            draw: coefficients. direction: by name; what is added, where its coefficient is not 0.
        """
        with self._set_aside():
            with torch.no_grad():
                for name, one in self.parameters.items():
                    origin, own = self.base[name], _placed(draw.own[name], one)
                    one.data = origin + own * (one.data - origin) + _part(draw, direction, name, one)
            yield
            with torch.no_grad():
                for name, one in self.parameters.items():
                    if one.grad is not None:
                        one.grad = one.grad * _placed(draw.own[name], one)

    def slopes(self) -> dict[str, float]:
        """Inside of `merged`, after a backward pass: the derivative by every tensor's own coefficient."""
        return {
            name: 0.0 if one.grad is None else float((one.grad * (self._kept[name] - self.base[name])).sum())
            for name, one in self.parameters.items()
        }

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Weights and gradients come back as they were; gradients that are there at the end are added to them."""
        self._kept = {name: one.data for name, one in self.parameters.items()}
        gradients = {name: one.grad for name, one in self.parameters.items()}
        for one in self.parameters.values():
            one.grad = None
        failed = True
        try:
            yield
            failed = False
        finally:
            with torch.no_grad():
                for name, one in self.parameters.items():
                    before, found = gradients[name], None if failed else one.grad
                    one.data = self._kept[name]
                    one.grad = before if found is None else found if before is None else before.add_(found)
            self._kept = {}


def _placed(part: Coefficient, like: torch.Tensor) -> Coefficient:
    return part.to(like) if isinstance(part, torch.Tensor) else part


def _part(draw: Draw, direction: State, name: str, like: torch.Tensor) -> torch.Tensor | float:
    """What is added of the direction."""
    return draw.other[name] * direction[name].to(like) if draw.other[name] else 0.0
