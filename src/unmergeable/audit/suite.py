"""Attack suite v1: which attacks there are, and in which order an audit runs them. Frozen: a change is v2.

The grids are data beside the attacks: LAMBDAS and FULL_DOSE_GRID in merging/grids.py, TABLE and WEIGHTS in
merging/kit.py, GRIDS in merging/spectral.py, TIES_GRID and PROBE in attacks/merges.py, PREPARATIONS in
attacks/prepare.py, and the constants at the top of attacks/blocks.py, wide.py, coefficients.py, informed.py,
distil.py and repair.py.
"""

from __future__ import annotations

from functools import cache

from ..attacks.blocks import Blocks
from ..attacks.coefficients import Coefficients
from ..attacks.distil import TARGETS, Distil
from ..attacks.informed import Fisher, RegMean
from ..attacks.merges import PROBE_MERGE, off_the_shelf
from ..attacks.prepare import COLLUSIONS, PREPARATIONS
from ..attacks.repair import EACH, Repair, Untrap
from ..attacks.thief import MergeAttack
from ..attacks.wide import Wide
from ..errors import UsageError
from ..merging.learned import GRANULARITIES

SUITE = 1
# Of what leads from rows to figures: which chains are followed, and which rows count. Figures of other rules are not
# comparable. 2: what undoes a lock comes first, and attacks that did not prove themselves count where that shows less
# protection alone.
RULES = 2
# What is run first at level 0, and again after every preparation that helps.
CORE = ("task_arithmetic", "full_dose", "ties")
# Beam of the chains: how many preparations are followed up, and with how many of the best merges of level 0.
BEAM, FOLLOW = 2, 12
# The attack that a level stands on, without which nothing is said about it; a higher level stands on any of its
# own, and on the levels below.
STANDS_ON = {0: "full_dose", 1: "anchor-coupled"}
# Of the levels with data, what is run before the rest of any of them: where time is short, something is known of each.
FIRST = {2: ("coefficients-row-entropy", "distil-soft-1-own"), 3: ("repair-16", "coefficients-row-labels")}


@cache
def merge_attacks() -> dict[str, MergeAttack]:
    """All attacks that end in merges, by name, in the order of level and information."""
    found: list[MergeAttack] = [
        *off_the_shelf(),
        PROBE_MERGE,
        Blocks(),
        Wide(),
        *(Coefficients(one, "entropy") for one in reversed(GRANULARITIES)),
        *(Distil(target, foreign) for foreign in (False, True) for target in TARGETS),
        RegMean(),
        Fisher(),
        *(Coefficients(one, "labels") for one in reversed(GRANULARITIES)),
        Untrap(),
        *(Repair(each) for each in reversed(EACH)),
    ]
    return {attack.name: attack for attack in found}


def merge_attack(name: str) -> MergeAttack:
    """The attack of this name.

    Raises:
        UsageError: the suite has none.
    """
    found = merge_attacks()
    if name not in found:
        raise UsageError("the suite has no such attack", where=f"'{name}'", expected=" | ".join(found))
    return found[name]


def access(name: str) -> int:
    """The level of a name that a configuration may choose."""
    return merge_attack(name).access if name in merge_attacks() else 1


def names() -> list[str]:
    """Everything that a configuration may choose by `attacks:`."""
    merges = [name for name in merge_attacks() if name != PROBE_MERGE.name]  # comes with every preparation
    return [*merges, *(one.name for one in PREPARATIONS), *COLLUSIONS]
