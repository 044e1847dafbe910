"""Which lock lies between two models: every site solved, from the outermost order of blocks inwards.

`recover` works on tensors in memory or read as they are needed, through the match alone. What it returns are
elements in the form of a lock's own: undoing them is the attack, and where a lock was drawn with exact
elements they are the lock's, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..groups import Element, Floats
from ..match import Instance, Match, MatchedSite
from ..transform import apply_floats, compile_tensor
from .pairing import pair_blocks
from .solve import Aim, snap, solve
from .tables import Layout, Tensors

Choose = Callable[[MatchedSite], Aim | None]
Progress = Callable[[int, int, str], None]


class Undone(Mapping[str, Floats]):
    """Tensors with the elements found so far undone, computed when they are read."""

    def __init__(
        self, match: Match, tensors: Tensors, elements: Mapping[tuple[int, Instance], Element]
    ) -> None:
        self._match, self._tensors, self._elements = match, tensors, elements

    def __getitem__(self, name: str) -> Floats:
        plan = compile_tensor(self._match, self._elements, name, undo=True)
        return apply_floats(np.asarray(self._tensors[plan.source], dtype=np.float64), plan.steps)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def recover(
    match: Match,
    locked: Tensors,
    anchor: Tensors,
    *,
    choose: Choose | None = None,
    snapped: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[tuple[int, Instance], Element]:
    """Elements that, undone, bring a locked model as near to an anchor as its symmetries allow.

    Args:
        match: the spec laid over the locked model.
        locked: its tensors by name; float arrays.
        anchor: the base, or any other fine-tune of it, by the same names.
        choose: how much of a site's group to use; None leaves the site alone. Default: all of every site.
        snapped: take elements that are all but signed permutations and powers of two to be just that.
        seed: of the random directions by which heads and experts are told apart.
        progress: called with instances done, instances in all, and a label.

    Raises:
        InputError: the anchor lacks a tensor of a site or has it in another shape; weights that are not finite.
    """
    layout = Layout(match)
    found: dict[tuple[int, Instance], Element] = {}
    current = Undone(match, locked, found)
    total = sum(len(matched.instances) for matched in match.sites)
    done = 0
    for number in reversed(range(len(match.sites))):
        matched = match.sites[number]
        aim = Aim.FULL if choose is None else choose(matched)
        for instance in matched.instances:
            done += 1
            if aim is None or matched.trivial:
                continue
            if progress is not None:
                progress(done, total, matched.label(instance))
            element = _solve_one(layout, number, instance, current, anchor, aim, seed)
            if element is not None:
                found[number, instance] = (snap(element) if snapped else element).inverse()
    return found


def _solve_one(
    layout: Layout, number: int, instance: Instance, current: Tensors, anchor: Tensors, aim: Aim, seed: int
) -> Element | None:
    matched = layout.match.sites[number]
    if layout.outer(number):
        layout.check(number, instance, current, anchor)
        return pair_blocks(layout, number, instance, current, anchor, seed)
    return solve(matched.site.group, layout.rows(number, instance, current, anchor), aim)


def undo(match: Match, elements: Mapping[tuple[int, Instance], Element], tensors: Tensors) -> dict[str, Any]:
    """All tensors with the elements undone, float64; tensors that no element touches as they are."""
    view = Undone(match, tensors, elements)
    return {name: view[name] if name in match.parts else tensors[name] for name in tensors}


def summary(match: Match, elements: Mapping[tuple[int, Instance], Element]) -> dict[str, Any]:
    """What was found, by kind of site: how many instances, how many exact, how many not the identity at all."""
    found: dict[str, dict[str, int]] = {}
    for (number, _), element in elements.items():
        entry = found.setdefault(match.sites[number].site.kind, {"instances": 0, "exact": 0, "moved": 0})
        entry["instances"] += 1
        entry["exact"] += element.exact
        entry["moved"] += element.moved() > 1e-9
    return {"sites": found}
