"""A module at the weights of a simulated merge, for one forward and backward pass, and back.

Weights are changed in place and restored: what it costs beside the optimiser's state are copies of weights, as many
for ten merges as for one. No forward pass is kept while another one runs.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..merging.tensors import possible
from .draws import Coefficient, Draw
from .even import evened

if TYPE_CHECKING:
    from ..merging import State


class Weights:
    """The weights of a fine-tune that merges share, and those of its base.

    Args:
        module: the fine-tune. base: by the names of the module's tensors.
        parameters: names of those that are trained, in place. statistics: names of what a norm has seen
            (`running_mean`, …), which merges share as well, and training leaves as it is.
    """

    def __init__(
        self, module: torch.nn.Module, base: State, parameters: Iterable[str], statistics: Iterable[str] = ()
    ) -> None:
        named = dict(module.named_parameters())
        self.parameters = {name: named[name] for name in parameters}
        self._module, self._statistics = module, tuple(statistics)
        # Copies: a model's own tensors, given as its base, would be trained with it.
        self.base = {
            name: base[name].detach().to(one.device, one.dtype, copy=True)
            for name, one in self.tensors.items()
        }
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that merges share, by name. A module that moves has other buffers afterwards."""
        return {**self.parameters, **{name: self._module.get_buffer(name) for name in self._statistics}}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """What coefficients are drawn for, by name; one a row is one along the first axis."""
        return {name: one.shape for name, one in self.tensors.items()}

    def deltas(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The task vector, tensor by tensor, differentiable."""
        for name, one in self.tensors.items():
            yield name, one - self.base[name]

    def vector(self) -> dict[str, torch.Tensor]:
        """The task vector as it is now."""
        with torch.no_grad():
            return dict(self.deltas())

    def snapshot(self) -> dict[str, torch.Tensor]:
        """The task vector as it is now, in tensors of its own, by the names of `shapes`."""
        found = self.vector()
        return {name: found[name].clone() for name in self.shapes}

    def _follow_device(self) -> None:
        """A Trainer puts its model elsewhere after this was made of it."""
        for name, one in self.tensors.items():
            self.base[name] = self.base[name].to(one.device)

    @property
    def adapts(self) -> bool:
        """Whether the weights are an adapter's."""
        return False

    def fitted(self, vector: State) -> dict[str, torch.Tensor]:
        """What a further fine-tune adds to the base, by the names and shapes of `vector()`; 0 where it adds nothing."""
        return {
            name: vector[name].to(one.device) if name in vector else torch.zeros_like(one)
            for name, one in self.tensors.items()
        }

    def copy(self) -> dict[str, torch.Tensor]:
        """The weights as they are now, on the CPU."""
        return {name: one.detach().cpu().clone() for name, one in self.parameters.items()}

    def load(self, state: State) -> None:
        """Write weights back."""
        with torch.no_grad():
            for name, one in self.parameters.items():
                one.copy_(state[name])

    @contextmanager
    def replaced(self, state: State) -> Iterator[None]:
        """Inside, the module has other weights, by the names of `parameters`; for passes without gradients."""
        with self._set_aside():
            for name, one in self.parameters.items():
                one.data = state[name].to(one)
            yield

    @contextmanager
    def merged(self, draw: Draw, direction: State) -> Iterator[None]:
        """Inside, the module has the weights of a merge; gradients that are found there are the fine-tune's after.

        They are added to those that were there: d/dθ of f(base + own ∘ (θ − base) + …) is own ∘ ∇f.

        Args:
            draw: coefficients. direction: by name; what is added, where its coefficient is not 0.
        """
        self._follow_device()
        if draw.even:
            draw, direction = evened(draw, direction, self.vector())
        shared = self.tensors
        names, tensors = list(shared), list(shared.values())
        own = [_placed(draw.own[name], one) for name, one in shared.items()]
        with self._set_aside():
            with torch.no_grad():
                origins = [self.base[name] for name in names]
                # One call for all tensors: on a GPU a call costs more than the arithmetic of a small tensor.
                merged = torch._foreach_sub([one.data for one in tensors], origins)
                _scale(merged, own)
                torch._foreach_add_(merged, origins)
                _add(merged, [(draw.other[n], direction[n]) if draw.other[n] else None for n in names])
                for name, one, weight in zip(names, tensors, merged, strict=True):
                    one.data = possible(name, weight)
            yield
            with torch.no_grad():
                found = [(one.grad, part) for one, part in zip(tensors, own, strict=True)]
                held = [(gradient, part) for gradient, part in found if gradient is not None]
                if held:
                    _scale([gradient for gradient, _ in held], [part for _, part in held])

    def slopes(self) -> dict[str, float]:
        """Inside of `merged`, after a backward pass: the derivative by every tensor's own coefficient."""
        return {
            name: 0.0 if one.grad is None else float((one.grad * (self._kept[name] - self.base[name])).sum())
            for name, one in self.tensors.items()
        }

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Weights and gradients come back as they were; gradients that are there at the end are added to them."""
        # What autocast has cast of the weights is of those that were there: neither of these, nor of what was before.
        torch.clear_autocast_cache()
        tensors = self.tensors
        self._kept = {name: one.data for name, one in tensors.items()}
        gradients = {name: one.grad for name, one in tensors.items()}
        for one in tensors.values():
            one.grad = None
        failed = True
        try:
            yield
            failed = False
        finally:
            with torch.no_grad():
                sums, added = [], []
                for name, one in tensors.items():
                    before, found = gradients[name], None if failed else one.grad
                    one.data = self._kept[name]
                    one.grad = found if before is None else before
                    if found is not None and before is not None:
                        sums.append(before)
                        added.append(found)
                if sums:
                    torch._foreach_add_(sums, added)
            self._kept = {}
            torch.clear_autocast_cache()


def statistics(module: torch.nn.Module, shared: Container[str]) -> list[str]:
    """Of the tensors that merges share, the numbers that are no parameters."""
    return [name for name, one in module.named_buffers() if name in shared and one.is_floating_point()]


@contextmanager
def modes_kept(module: torch.nn.Module) -> Iterator[None]:
    """Training or evaluation, whatever each part of a module is in, it is in afterwards."""
    modes = {one: one.training for one in module.modules()}
    try:
        yield
    finally:
        for one, mode in modes.items():
            one.training = mode


def freeze_statistics(module: torch.nn.Module) -> None:
    """Norms that follow what they see stop doing so: what merges do to them is not the fine-tune's."""
    for one in module.modules():
        if getattr(one, "running_mean", None) is not None:
            one.eval()


def _placed(part: Coefficient, like: torch.Tensor) -> Coefficient:
    return part.to(like) if isinstance(part, torch.Tensor) else part


def _scale(tensors: Sequence[torch.Tensor], parts: Sequence[Coefficient]) -> None:
    """Each by its coefficient, in place."""
    numbers = [part for part in parts if not isinstance(part, torch.Tensor)]
    if len(numbers) == len(parts):
        torch._foreach_mul_(list(tensors), numbers)
        return
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.mul_(part)


def _add(tensors: Sequence[torch.Tensor], parts: Sequence[tuple[float, torch.Tensor] | None]) -> None:
    """To each, so much of a direction, in place; nothing where there is None."""
    found = [(one, part) for one, part in zip(tensors, parts, strict=True) if part is not None]
    if found:
        added = torch._foreach_mul([part[1].to(one) for one, part in found], [part[0] for _, part in found])
        torch._foreach_add_([one for one, _ in found], added)
