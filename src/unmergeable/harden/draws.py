"""Simulated merges: how much of a fine-tune, and of something else, is in every tensor of what a thief might make.

base + own ∘ (fine-tune − base) + other · direction, with coefficients for the whole model, for every block, or for
every kind of tensor; for rows, own is one a row and other one for all. Merges of whole models leave block
substitution open: what is to resist it has to be trained against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from ..merging.blocks import layout
from .mix import Mix

# A number, or one a row: (rows, 1, …).
Coefficient: TypeAlias = "float | torch.Tensor"

# How often a merge draws coefficients for what.
WHOLE, BLOCKS, KINDS, ROWS = 0.35, 0.3, 0.15, 0.2
NONE, ALL, MOST = 0.35, 0.4, 1.3  # a part's coefficient: 0, 1, else uniform up to MOST
OTHER, FILL, BESIDE = (
    (0.05, 0.6),
    (0.2, 0.8),
    0.25,
)  # of the direction: everywhere, where little is own, elsewhere
JITTER = 0.3
# Adapters: how often they are mixed as peft does it, not added; how often numbers are left out then, and how many are
# kept at least.
MIXED, THINNED, THIN = 0.35, 0.5, 0.2
# To within this of the whole fine-tune, by every coefficient, a merge is no use to a thief, whatever he adds: the task
# is all there, and his own tasks are not. It cannot forget unless the fine-tune does, and asking for it only costs.
NEAR = 0.1
# Of language models: how often singular values are made even, and the coefficient of what comes of it, of a scale of
# logarithms: it does much where it is small. The direction's least part of all coefficients: with less a merge is the
# fine-tune over again, and no use to a thief.
EVEN, SCALE, LEAST = 0.14, (0.05, 1.3), 0.13


@dataclass(frozen=True)
class Draw:
    """Coefficients of one merge.

    Attributes:
        own: of the fine-tune's task vector, by tensor.
        other: of the direction, by tensor; 0 everywhere if nothing is added.
        mix: of adapters, how peft mixes the two; None if it is their sum.
        even: whether the singular values of every matrix's sum are made even, as Iso-C does.
        parts: whether some blocks or kinds of tensors are the fine-tune's, and the rest is not.
    """

    own: Mapping[str, Coefficient]
    other: Mapping[str, float]
    mix: Mix | None = None
    even: bool = False
    parts: bool = False

    @property
    def foreign(self) -> float:
        """The direction's part of all coefficients, 0 to 1."""
        own = sum(float(torch.as_tensor(part).abs().mean()) for part in self.own.values())
        other = sum(map(abs, self.other.values()))
        return other / (own + other) if other else 0.0

    @classmethod
    def whole(cls, names: Iterable[str], own: float, other: float = 0.0) -> Draw:
        """The same coefficients for all tensors."""
        names = tuple(names)
        return cls(dict.fromkeys(names, own), dict.fromkeys(names, other))


class Draws:
    """Random merges of models with these tensors.

    Args:
        shapes: of the tensors that merges share, by name.
        seed: of all draws.
        adapters: whether these are adapters, which peft mixes in ways of its own.
        texts: whether they are of language models: Iso-C is among them, and none is all but the fine-tune itself. For
            images neither was found to help.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], seed: int, adapters: bool = False, texts: bool = False
    ) -> None:
        self.shapes, self.adapters, self.texts = dict(shapes), adapters, texts
        self.grid = layout(self.shapes)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Draw:
        """One merge: neither the fine-tune itself, nor a merge without it."""
        return self._any(self._draw)

    def again(self) -> Draw:
        """One merge of which some blocks or kinds of tensors are the fine-tune's, and the rest is not."""
        while True:
            found = self._any(lambda: self._parts(self._uniform(0, BLOCKS + KINDS)))
            if found.parts:
                return found

    def _any(self, draw: Callable[[], Draw]) -> Draw:
        while True:
            found = draw()
            if not self._itself(found) and any(map(_some, found.own.values())):
                return found

    def _itself(self, found: Draw) -> bool:
        summed = not found.even and found.mix is None
        whole = summed and all(map(_all_near, found.own.values()))
        return whole or (self.texts and found.foreign < LEAST)

    def _draw(self) -> Draw:
        if self.adapters and self._uniform() < MIXED:
            return self._mix()
        if self.texts and self._uniform() < EVEN:
            return self._even()
        choice = self._uniform()
        if choice < WHOLE:
            return self._whole()
        if choice < WHOLE + BLOCKS + KINDS:
            return self._parts(choice - WHOLE)
        return self._rows()

    def _parts(self, choice: float) -> Draw:
        return self._filled(self._blocks() if choice < BLOCKS else self._kinds())

    def _uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def _pick(self) -> float:
        choice = self._uniform()
        return 0.0 if choice < NONE else 1.0 if choice < NONE + ALL else self._uniform(0, MOST)

    def _whole(self) -> Draw:
        """Task arithmetic, a full dose, or a part of the task vector alone."""
        own = self._uniform(0, MOST) if self._uniform() < 0.5 else 1.0
        alone = not self.texts and abs(own - 1) > NEAR and self._uniform() < 0.3
        other = 0.0 if alone else self._uniform(*OTHER)
        spread = JITTER if self._uniform() < 0.5 else 0.0
        noise = 1 + spread * torch.randn(2, len(self.shapes), generator=self.generator)
        return Draw(
            {name: own * factor for name, factor in zip(self.shapes, noise[0].tolist(), strict=True)},
            {name: other * factor for name, factor in zip(self.shapes, noise[1].tolist(), strict=True)},
        )

    def _even(self) -> Draw:
        """Matrices of a sum, vectors of an average."""
        scale = math.exp(self._uniform(*map(math.log, SCALE)))
        parts = {name: scale if len(shape) > 1 else scale / 2 for name, shape in self.shapes.items()}
        return Draw(parts, parts, even=True)

    def _mix(self) -> Draw:
        """Weights of a few tenths to a whole, as people give them to peft."""
        trim, elect, cut = (self._uniform() < 0.5 for _ in range(3))
        # A cut takes what is weaker first: with a little of the direction it leaves the fine-tune over again.
        own, other = self._uniform(0.2, MOST), self._uniform(0.3 if cut else 0.1, 1.0)
        density = self._uniform(THIN, 1) if self._uniform() < THINNED else 1.0
        seed = int(torch.randint(2**31, (), generator=self.generator))
        return replace(Draw.whole(self.shapes, own, other), mix=Mix(density, trim, elect, cut, seed))

    def _blocks(self) -> dict[str, float]:
        """Blocks cut in two, or each with a coefficient of its own."""
        blocks = self.grid.blocks
        if self._uniform() < 0.5:
            cut, first = int(self._uniform(0, len(blocks) + 1)), self._uniform() < 0.5
            found = {block: float((place < cut) == first) for place, block in enumerate(blocks)}
        else:
            found = {block: self._pick() for block in blocks}
        return {name: found[self.grid.units[name][0]] for name in self.shapes}

    def _kinds(self) -> dict[str, float]:
        """Kinds of tensors, in some of the blocks."""
        blocks, kinds = self._blocks(), {kind: self._pick() for kind in self.grid.kinds}
        return {name: own * kinds[self.grid.units[name][1]] for name, own in blocks.items()}

    def _filled(self, own: Mapping[str, float]) -> Draw:
        """The direction where little of the fine-tune is, and a little of it elsewhere, or not."""
        fill, beside = self._uniform(*FILL), self._uniform(0, BESIDE) * (self._uniform() < 0.5)
        other = {name: fill if part < 0.5 else beside for name, part in own.items()}
        return Draw(own, other, parts=any(part < 0.5 for part in own.values()))

    def _rows(self) -> Draw:
        """A coefficient a row, around the tensor's own or of a few values."""
        other, spread = self._uniform(*OTHER), self._uniform(0.1, 0.6)
        coarse = self._uniform() < 0.5
        own: dict[str, Coefficient] = {}
        for name, shape in self.shapes.items():
            if not shape:
                own[name] = self._pick()
                continue
            rows = torch.rand(2, shape[0], generator=self.generator)
            if coarse:
                values = torch.where(
                    rows[0] < NONE, 0.0, torch.where(rows[0] < NONE + ALL, 1.0, MOST * rows[1])
                )
            else:
                middle = self._uniform(0, MOST)
                values = (middle + spread * (2 * rows[0] - 1)).clamp(0, MOST)
            own[name] = values.reshape(-1, *[1] * (len(shape) - 1))
        return Draw(own, dict.fromkeys(self.shapes, other))


def _all_near(part: Coefficient) -> bool:
    return bool((abs(part - 1) < NEAR).all()) if isinstance(part, torch.Tensor) else abs(part - 1) < NEAR


def _some(part: Coefficient) -> bool:
    return bool(part.any()) if isinstance(part, torch.Tensor) else part != 0
