"""Block substitution: blocks and kinds of tensors whole from the protected model, the rest from the others.

What survives in a few blocks of a model that resists merging as a whole is found by a search over what to take:
every prefix, suffix and single block, every kind of tensor; then adding and removing blocks, kinds and single
tensors one by one, where that helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from ..merging import Merged
from ..merging.blocks import Layout, Unit, layout, seeds
from .thief import Look, Thief

# Suite v1: the coefficient of the others where nothing is taken; how many of the best that the search begins with
# are changed; and merges that this may take. Those that it begins with are more, the more blocks a model has.
WEIGHTS = (0.5, 0.8)
BEAM, MOVES = 2, 80

Taken = frozenset[Unit]


class Blocks:
    """The search; options are what is taken, by block, and the others' coefficient elsewhere."""

    name = "substitute-blocks"
    about = "blocks and kinds of tensors whole from the protected model, the others merged in the rest"
    needs = ("base", "experts")
    access = 1
    budget: ClassVar[dict[str, int]] = {"moves": MOVES}
    alone = False

    def explore(self, thief: Thief, look: Look) -> None:
        """Search for the best worse of both values."""
        grid = layout(thief.mixer.parts.shared)

        def evaluate(taken: Taken, others: float) -> float:
            chosen = {"taken": named(grid, taken), "others": others}
            return min(look(chosen, self.make(thief, chosen)))

        climb(grid, evaluate)

    def make(self, thief: Thief, options: Mapping[str, Any]) -> Merged:
        """The mixer's buffer, until the next merge."""
        taken = {
            unit
            for unit in layout(thief.mixer.parts.shared).tensors
            if options["taken"].get(unit[0]) == ALL or unit[1] in options["taken"].get(unit[0], ())
        }
        others = dict.fromkeys(thief.others, options["others"])
        return thief.whole(thief.mixer.substitute(thief.protected, taken, others))


ALL = "all"


def named(grid: Layout, taken: Taken) -> dict[str, list[str] | str]:
    """What is taken, ready for JSON: by block its kinds of tensors, or ALL."""
    found: dict[str, list[str] | str] = {}
    for block in grid.blocks:
        kinds = [kind for kind in grid.kinds if (block, kind) in taken]
        if kinds:
            found[block] = ALL if frozenset((block, kind) for kind in kinds) == grid.block(block) else kinds
    return found


def climb(grid: Layout, evaluate: Callable[[Taken, float], float]) -> None:
    """Try all seeds with all weights, then change the best ones, keeping at once every change that helps.

    Of the BEAM best first whole blocks and kinds are added and removed, again and again until nothing helps; of
    what is best by then single tensors.

    Args:
        grid: of the shared tensors.
        evaluate: of what is taken and the others' coefficient, higher is better.
    """
    whole = frozenset(grid.tensors)
    tried = {(taken, weight): evaluate(taken, weight) for taken in seeds(grid) for weight in WEIGHTS}
    most = len(tried) + MOVES

    def best(count: int) -> list[tuple[Taken, float]]:
        return sorted(tried, key=lambda one: -tried[one])[:count]

    def change(start: tuple[Taken, float], moves: Iterable[Taken]) -> None:
        (taken, weight), moves, helped = start, list(moves), True
        while helped:
            helped = False
            for move in moves:
                for other in (taken | move, taken - move):
                    if other == whole or (other, weight) in tried or len(tried) >= most:
                        continue
                    tried[other, weight] = evaluate(other, weight)
                    if tried[other, weight] > tried[taken, weight]:
                        taken, helped = other, True

    for start in best(BEAM):
        change(start, [*map(grid.block, grid.blocks), *map(grid.kind, grid.kinds)])
    change(best(1)[0], (frozenset({unit}) for unit in grid.tensors))
