"""Block substitution: blocks and kinds of tensors whole from the protected model, the rest from the others.

What survives in a few blocks of a model that resists merging as a whole is found by a search over what to take:
every prefix, suffix and single block, every kind of tensor, then adding and removing the most useful.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..merging import Merged
from ..merging.blocks import Layout, Unit, layout, search
from .thief import Look, Thief

# Suite v1: the coefficient of the others where nothing is taken, candidates kept in a round, merges in all.
WEIGHTS = (0.5, 0.8)
BEAM, BUDGET = 2, 160


class Blocks:
    """The search; options are what is taken, by block, and the others' coefficient elsewhere."""

    name = "substitute-blocks"
    about = "blocks and kinds of tensors whole from the protected model, the others merged in the rest"
    needs = ("base", "experts")
    access = 1
    alone = False

    def explore(self, thief: Thief, look: Look) -> None:
        """Search for the best worse of both values."""
        grid = layout(thief.mixer.parts.shared)

        def evaluate(taken: frozenset[Unit], options: Mapping[str, float]) -> float:
            chosen = {"taken": named(grid, taken), **options}
            return min(look(chosen, self.make(thief, chosen)))

        settings = [{"others": weight} for weight in WEIGHTS]
        search(grid, evaluate, settings=settings, beam=BEAM, budget=BUDGET)

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


def named(grid: Layout, taken: frozenset[Unit]) -> dict[str, list[str] | str]:
    """What is taken, ready for JSON: by block its kinds of tensors, or ALL."""
    found: dict[str, list[str] | str] = {}
    for block in grid.blocks:
        kinds = [kind for kind in grid.kinds if (block, kind) in taken]
        if kinds:
            found[block] = ALL if frozenset((block, kind) for kind in kinds) == grid.block(block) else kinds
    return found
