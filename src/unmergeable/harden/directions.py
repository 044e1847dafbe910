"""What a simulated merge adds to the fine-tune: task vectors of models that the owner has, or made up.

A thief's own fine-tunes are not known. Stand-ins: other fine-tunes of the same base, Gaussian noise with the norm
of every tensor of the task vector, or that task vector with rows and columns in another order and with other signs,
which keeps the singular values of every matrix as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import InputError, UsageError

if TYPE_CHECKING:
    from ..merging import State

KINDS = ("random", "spectrum")
NARROW = (torch.bfloat16, torch.float16)  # dtypes that models are saved in
SAME = 0.01  # of a task vector's norm: what is apart by no more is the same, in whatever dtype it was saved


def check_made(made: Sequence[str]) -> None:
    """Refuse what cannot be made up.

    Raises:
        UsageError: no such direction.
    """
    for one in made:
        if one not in KINDS:
            raise UsageError("no such direction", where="made", expected=" | ".join(KINDS), got=one)


def check_proxy(place: object, vector: State, own: State | None = None, base: State | None = None) -> None:
    """Refuse what stands in for no thief's fine-tune: the base, or the owner's over again.

    Args:
        place: where the proxy is from, for messages.
        vector: what it adds to the base. own: what the fine-tune adds, by some of these names; None if that is not
            known yet. base: by the same names; then its copies in narrower dtypes are known as well.

    Raises:
        InputError: it is one of the two.
    """
    least = 0.0 if own is None else SAME**2 * _square(own.values())
    hint = "leave it out, or give another fine-tune of the base"
    if _square(vector.values()) <= least or (base is not None and _rounded(vector, base)):
        raise InputError("a proxy that adds nothing: it is the base itself", where=place, hint=hint)
    if own is not None and _square(vector[name] - one for name, one in own.items()) <= least:
        raise InputError(
            "a proxy that is the fine-tune itself, of which merges are made", where=place, hint=hint
        )


def _rounded(vector: State, base: State) -> bool:
    """Whether it adds no more than what saving the base in a narrower dtype does."""
    return any(
        all(torch.equal((base[name] + one).to(dtype), base[name].to(dtype)) for name, one in vector.items())
        for dtype in NARROW
    )


def _square(tensors: Iterable[torch.Tensor]) -> float:
    return sum(float(one.square().sum()) for one in tensors)


class Directions:
    """Draws directions.

    Args:
        models: task vectors of the owner's other fine-tunes; may be none.
        made: which of `KINDS` are drawn as well; half of the time, if there are models.
        seed: of all draws.
        device: where task vectors are, and noise is drawn.
    """

    def __init__(
        self, models: Sequence[State], made: Sequence[str], seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.models, self.made = list(models), tuple(made)
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = self.generator
        if torch.device(device).type != "cpu":
            self.noise = torch.Generator(device).manual_seed(seed)

    def draw(self, vector: State) -> Mapping[str, torch.Tensor]:
        """A direction for the task vector as it is now."""
        choice = float(torch.rand((), generator=self.generator))
        if self.models and (choice < 0.5 or not self.made):
            return self.models[self._below(len(self.models))]
        make = {"random": self._random, "spectrum": self._spectrum}[self.made[self._below(len(self.made))]]
        return {name: make(delta) for name, delta in vector.items()}

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def _random(self, delta: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(delta.shape, generator=self.noise, device=self.noise.device).to(delta.device)
        return noise * (delta.norm() / max(delta.numel(), 1) ** 0.5)

    def _spectrum(self, delta: torch.Tensor) -> torch.Tensor:
        for axis in range(min(delta.ndim, 2)):
            size = delta.shape[axis]
            order = torch.randperm(size, generator=self.generator).to(delta.device)
            signs = (torch.randint(2, (size,), generator=self.generator) * 2 - 1).to(delta)
            shape = [size if other == axis else 1 for other in range(delta.ndim)]
            delta = delta.index_select(axis, order) * signs.reshape(shape)
        return delta
