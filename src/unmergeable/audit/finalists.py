"""Which merges are worth more than a look: what thieves would choose, and what may turn out to be better.

The looks of a grid are on a few examples. The best of many noisy figures above a floor is often one whose own
tasks were lucky, and lies below the floor on all examples: so merges that keep a distance from the floor are scored
as well, and others that no merge beats in both values.
"""

from __future__ import annotations

from collections.abc import Sequence

from .rows import Look

LEAST = 3  # merges of an attack that are scored on all validation examples, if it has so many
MOST = 8  # and at most; each is a whole evaluation, and some are kept in memory
MARGINS = (0.1, 0.2)  # of his own tasks above a floor


def finalists(looks: Sequence[Look], floors: Sequence[float], least: int = LEAST) -> list[int]:
    """What thieves would choose: the best of both values, the best with each floor, the next best to `least`.

    Of looks that are as good, the one that gives more of the rest, as thieves choose.
    """
    order = _by_joint(looks)
    found = dict.fromkeys([*order[:1], *_best(looks, floors)])
    for number in order:
        if len(found) >= least:
            break
        found[number] = None
    return list(found)


def promising(looks: Sequence[Look], floors: Sequence[float]) -> list[int]:
    """The finalists and, to twice their number and MOST, what may be better on more examples.

    First the best that lie MARGINS above the floors, then whatever no other look beats in both values.
    """
    first = finalists(looks, floors)
    above = [number for margin in MARGINS for number in _best(looks, [floor + margin for floor in floors])]
    found = dict.fromkeys([*first, *above, *_front(looks)])
    return list(found)[: max(len(first), min(MOST, 2 * len(first)))]


def _by_joint(looks: Sequence[Look]) -> list[int]:
    return sorted(range(len(looks)), key=lambda n: (-looks[n].joint, -(looks[n].protected + looks[n].own)))


def _best(looks: Sequence[Look], floors: Sequence[float]) -> list[int]:
    """The look with the largest value of the protected task above each floor."""
    found = []
    for floor in floors:
        within = [number for number, look in enumerate(looks) if look.own >= floor]
        if within:
            found.append(max(within, key=lambda n: (looks[n].protected, looks[n].protected + looks[n].own)))
    return found


def _front(looks: Sequence[Look]) -> list[int]:
    """Looks that no other one beats in both values, the best of both first; of equal ones the first."""
    highest = float("-inf")
    front = []
    for number in sorted(range(len(looks)), key=lambda n: (-looks[n].own, -looks[n].protected)):
        if looks[number].protected > highest:
            highest = looks[number].protected
            front.append(number)
    kept = set(front)
    return [number for number in _by_joint(looks) if number in kept]
