"""Merges off the shelf as attacks: every merge method with the grid of options that suite v1 tries.

Grids of coefficients are filled in memory; methods that take a model and its partner get the thief's own models
merged into one partner first, where he has several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, UsageError
from ..merging import METHODS, Merged, merge_method
from ..merging import kit as mergekit
from ..merging.grids import FULL_DOSE_GRID, LAMBDAS
from ..merging.spectral import GRIDS
from .thief import Look, Thief, all_of

if TYPE_CHECKING:
    from ..merging import State

Options = Mapping[str, Any]

# Suite v1. TIES of ours takes the mean of what agrees: larger weights than for sums.
TIES_GRID = tuple({"weight": w, "density": d} for d in (0.2, 0.5) for w in (0.5, 1.0, 1.5, 2.0))
# A few points of the full-dose grid: enough to see whether a preparation helped.
PROBE = tuple((a, b) for a in (0.5, 0.7, 1.0) for b in (0.2, 0.45, 0.6))
# The weight that a thief's own models get when they are merged into one partner.
PARTNER = 0.5
_PREFIX = "mergekit:"


@dataclass(frozen=True)
class Coefficients:
    """A grid of coefficients, filled in memory: base + a · protected + b · every other."""

    name: str
    about: str
    points: tuple[tuple[float, float], ...]
    alone: bool
    needs: tuple[str, ...] = ("base", "experts")
    access: int = 0

    @property
    def budget(self) -> dict[str, int]:
        """The size of the grid."""
        return {"merges": len(self.points)}

    def explore(self, thief: Thief, look: Look) -> None:
        """Every point of the grid."""
        seen = set()
        for dose, others in self.points:
            options = self._options(thief, dose, others)
            if tuple(options.items()) not in seen:
                seen.add(tuple(options.items()))
                look(options, self.make(thief, options))

    def _options(self, thief: Thief, dose: float, others: float) -> dict[str, float]:
        return {"dose": dose, "others": others} if thief.has else {"others": others}

    def make(self, thief: Thief, options: Options) -> Merged:
        """The mixer's buffer, until the next merge."""
        weights = dict.fromkeys(thief.experts, float(options["others"]))
        if thief.has:
            weights[thief.protected] = options["dose"]
        return thief.whole(thief.mixer.mix(weights))


@dataclass(frozen=True)
class Method:
    """A merge method of `merging.METHODS` over a grid of its options.

    Attributes:
        grid: the options for the protected task, if the thief has its model, and the names of the others.
        most: models that the method takes; where a thief has more, the last ones are merged into one partner
            first.
    """

    name: str
    about: str
    grid: Callable[[str | None, tuple[str, ...]], list[dict[str, Any]]]
    alone: bool = True
    most: int | None = None
    needs: tuple[str, ...] = ("base", "experts")
    access: int = 0

    @property
    def budget(self) -> dict[str, int]:
        """The size of the grid, which is the same for any number of models."""
        return {"merges": len(self.grid("protected", ("own",)))}

    def explore(self, thief: Thief, look: Look) -> None:
        """Every point of the grid.

        Raises:
            InputError: the method takes another number of models, or no point of the grid can be merged.
        """
        names = self._experts(thief)
        others = tuple(name for name in names if name != thief.protected)
        grid = self.grid(thief.protected if thief.protected in names else None, others)
        all_of(partial(self._one, thief, look, options) for options in grid)

    def _one(self, thief: Thief, look: Look, options: Options) -> None:
        look(options, self.make(thief, options))

    def make(self, thief: Thief, options: Options) -> Merged:
        """The merge, in the base's dtypes.

        Raises:
            InputError: as `explore`; a decomposition that does not converge.
        """
        experts = self._experts(thief)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(thief.seed)
            try:
                merged = merge_method(self.name)(thief.base, experts, **options)
            except UsageError as error:
                raise InputError(
                    error.what, where=self.name, expected=error.expected, got=error.got
                ) from None
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise InputError("a decomposition does not converge", where=self.name, got=error) from error
        return thief.whole(merged)

    def _experts(self, thief: Thief) -> dict[str, State]:
        """The thief's models, as many as the method takes, the protected one first where he has it."""
        experts = dict(thief.experts)
        if self.most is None or len(experts) <= self.most:
            return experts
        if self.most == 1 and thief.has:
            return {thief.protected: experts[thief.protected]}
        kept = [thief.protected] if thief.has else []
        kept += [task for task in experts if task not in kept]
        held = {task: experts[task] for task in kept[: self.most - 1]}
        rest = {task: experts[task] for task in kept[self.most - 1 :]}
        partner = "partner"
        while partner in thief.tasks:
            partner += "_"
        merge = partial(merge_method("task_arithmetic"), thief.base, rest, weight=PARTNER)
        return {**held, partner: thief.once(("partner", *rest), merge).shared}


def _fixed(name: str, options: tuple[Options, ...], *, protected: bool) -> Method:
    """A method of ours with a grid of plain options."""

    def grid(task: str | None, others: tuple[str, ...]) -> list[dict[str, Any]]:
        return [{**one, "protected": task} if protected else dict(one) for one in options]

    return Method(name, METHODS[name], grid, alone=not protected)


def _kit(name: str) -> Method:
    method = mergekit.TABLE[name]

    def grid(task: str | None, others: tuple[str, ...]) -> list[dict[str, Any]]:
        found = mergekit.grid(name, task or "", others)
        if task is None:
            for options in found:
                if isinstance(options.get("weight"), dict):
                    options["weight"].pop("")
        # What differed in the weight of a model that he does not have is the same merge.
        return list({repr(options): options for options in found}.values())

    return Method(_PREFIX + name, METHODS[_PREFIX + name], grid, most=method.most)


def off_the_shelf() -> list[Coefficients | Method]:
    """Level 0 of suite v1, the most informative first."""
    first: list[Coefficients | Method] = [
        Coefficients(
            "task_arithmetic", METHODS["task_arithmetic"], tuple((one, one) for one in LAMBDAS), alone=True
        ),
        Coefficients("full_dose", METHODS["full_dose"], FULL_DOSE_GRID, alone=False),
        _fixed("ties", TIES_GRID, protected=False),
    ]
    masks = ("tall_mask", "svd_truncated", "top_k", "projected")
    ours = [_fixed(name, grid, protected=name in masks) for name, grid in GRIDS.items()]
    return [*first, *ours, *(_kit(name) for name in mergekit.TABLE)]


PROBE_MERGE = Coefficients("probe", "a few points of the full-dose grid", PROBE, alone=False)
