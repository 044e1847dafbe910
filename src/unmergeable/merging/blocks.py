"""Blocks and kinds of tensors, read from their names; and merges that take some of them whole from one model.

`stack.3.attention.query.weight` is in block 3 of `stack` and of the kind `stack.{}.attention.query.weight`.
A stack is a prefix with at least two numbers that have the same names and shapes below them. Everything
outside of stacks is one more block, REST, each tensor a kind of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from ..errors import UsageError

if TYPE_CHECKING:
    from . import State

REST = "rest"
Unit: TypeAlias = tuple[str, str]  # (block, kind)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def block_names(names: Iterable[str] | State) -> dict[str, tuple[str, int]]:
    """For every tensor in a numbered block: its stack and its number."""
    return dict(_block_names(tuple(names)))


@cache
def _block_names(names: tuple[str, ...]) -> tuple[tuple[str, tuple[str, int]], ...]:
    below: dict[str, dict[int, set[str]]] = {}
    cuts = {}
    for name in names:
        match = _NUMBER.search(name)
        if match:
            stack, number, rest = name[: match.start()], int(match.group()), name[match.end() :]
            below.setdefault(stack, {}).setdefault(number, set()).add(rest)
            cuts[name] = stack, number
    stacks = {stack for stack, numbers in below.items() if _alike(list(numbers.values()))}
    return tuple((name, cut) for name, cut in cuts.items() if cut[0] in stacks)


def _alike(below: list[set[str]]) -> bool:
    """Whether at least two numbers, and half of them, hold the same names."""
    most = max(below.count(names) for names in below)
    return most >= 2 and 2 * most >= len(below)


@dataclass(frozen=True)
class Layout:
    """The tensors of a model on a grid of blocks and kinds.

    Attributes:
        blocks: REST first, then the numbered ones in the order of the model.
        kinds: in order of appearance; of numbered blocks with `{}` in place of every number.
        units: by tensor, its block and kind.
    """

    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    units: Mapping[str, Unit]
    tensors: Mapping[Unit, tuple[str, ...]] = field(repr=False)

    def block(self, *blocks: str) -> frozenset[Unit]:
        """All units of these blocks."""
        return frozenset(unit for unit in self.tensors if unit[0] in blocks)

    def kind(self, *kinds: str) -> frozenset[Unit]:
        """All units of these kinds."""
        return frozenset(unit for unit in self.tensors if unit[1] in kinds)

    def names(self, units: Collection[Unit]) -> frozenset[str]:
        """The tensors of these units."""
        return frozenset(name for unit in units for name in self.tensors[unit])


def layout(names: Iterable[str] | State) -> Layout:
    """The grid of blocks and kinds that the names of a model's tensors make."""
    names = list(names)
    cuts = block_names(names)
    order = dict.fromkeys(sorted(set(cuts.values())))
    units: dict[str, Unit] = {}
    for name in names:
        if name in cuts:
            stack, number = cuts[name]
            units[name] = f"{stack}{number}", _NUMBER.sub("{}", name)
        else:
            units[name] = REST, name
    tensors: dict[Unit, list[str]] = {}
    for name, unit in units.items():
        tensors.setdefault(unit, []).append(name)
    blocks = (REST, *(f"{stack}{number}" for stack, number in order))
    kinds = tuple(dict.fromkeys(kind for _, kind in units.values()))
    return Layout(blocks, kinds, units, {unit: tuple(found) for unit, found in tensors.items()})


@dataclass(frozen=True)
class Found:
    """One merge that a search tried: what is taken whole from the protected model, and its score."""

    taken: frozenset[Unit]
    score: float
    options: Mapping[str, float] = field(default_factory=dict)


def seeds(grid: Layout) -> list[frozenset[Unit]]:
    """Where a search starts: nothing, every prefix, suffix and single block, with REST and without, every kind."""
    numbered = grid.blocks[1:]
    found: dict[frozenset[Unit], None] = {frozenset(): None}
    ranges = [
        *(numbered[:stop] for stop in range(len(numbered) + 1)),
        *(numbered[start:] for start in range(1, len(numbered))),
        *((block,) for block in numbered),
    ]
    for blocks in ranges:
        found[grid.block(*blocks)] = None
        found[grid.block(REST, *blocks)] = None
    whole = frozenset(grid.tensors)
    found |= {grid.kind(kind): None for kind in grid.kinds}
    return [taken for taken in found if taken != whole]


def search(
    grid: Layout,
    evaluate: Callable[[frozenset[Unit], Mapping[str, float]], float],
    *,
    settings: Iterable[Mapping[str, float]] = ({},),
    beam: int = 1,
    budget: int = 200,
) -> list[Found]:
    """Search over what to take whole from the protected model: from the best seeds, by adding and removing.

    Args:
        grid: of the shared tensors.
        evaluate: given the units taken and one of `settings`, a score; higher is better.
        settings: coefficients and the like of the rest of the merge, tried with every seed; the best goes on.
        beam: how many candidates are kept in a round; 1 is greedy.
        budget: calls of `evaluate` in all.

    Returns: everything that was tried, best first.

    Raises:
        UsageError: a beam or budget below 1, or no settings.
    """
    choices = [dict(options) for options in settings]
    if beam < 1 or budget < 1 or not choices:
        raise UsageError("a search needs a beam, a budget and settings", got=f"{beam}, {budget}, {choices}")
    tried: dict[tuple[frozenset[Unit], tuple[tuple[str, float], ...]], Found] = {}

    def attempt(taken: frozenset[Unit], options: Mapping[str, float]) -> None:
        key = taken, tuple(sorted(options.items()))
        if key not in tried and len(tried) < budget:
            tried[key] = Found(taken, evaluate(taken, options), options)

    def best(count: int) -> list[Found]:
        return sorted(tried.values(), key=lambda found: -found.score)[:count]

    for taken in seeds(grid):
        for options in choices:
            attempt(taken, options)
    moves = [grid.block(block) for block in grid.blocks] + [grid.kind(kind) for kind in grid.kinds]
    moves = list(dict.fromkeys(moves + [frozenset({unit}) for unit in grid.tensors]))
    expanded: set[tuple[frozenset[Unit], tuple[tuple[str, float], ...]]] = set()
    while len(tried) < budget:
        front = [
            found
            for found in best(beam)
            if (found.taken, tuple(sorted(found.options.items()))) not in expanded
        ]
        if not front:
            break
        for found in front:
            expanded.add((found.taken, tuple(sorted(found.options.items()))))
            for move in moves:
                for taken in (found.taken | move, found.taken - move):
                    if taken != frozenset(grid.tensors):
                        attempt(taken, found.options)
    return best(len(tried))
