"""A module at the weights of a simulated merge, for one forward and backward pass, and back.

Weights are changed in place and restored: beside the optimiser's state it costs one more copy of them, whatever
the number of simulated merges. No forward pass is kept while another one runs.
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

    def vector(self) -> dict[str, torch.Tensor]:
        """The task vector as it is now."""
        return {name: one.detach() - self.base[name] for name, one in self.parameters.items()}

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
        """
        kept: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        with torch.no_grad():
            for name, one in self.parameters.items():
                kept[name] = one.data, one.grad
                own, other = (_placed(part[name], one) for part in (draw.own, draw.other))
                origin = self.base[name]
                one.data = origin + own * (one.data - origin) + other * direction[name].to(one)
                one.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for name, one in self.parameters.items():
                    one.data, before = kept[name]
                    found = one.grad
                    if found is not None:
                        found = found * _placed(draw.own[name], one)
                        found = found if before is None else before.add_(found)
                    one.grad = before if found is None else found


def _placed(part: Coefficient, like: torch.Tensor) -> Coefficient:
    return part.to(like) if isinstance(part, torch.Tensor) else part
