"""Align by permutations: rows of MLPs, heads within a group, groups, experts, each by an assignment problem.

As git re-basin (Ainsworth et al., arXiv 2209.04836) matches weights, on the slots of the spec. Heads and
experts are compared by products that changes inside of them leave alone; where rows may also be scaled, they
are compared at the scale that balances their two sides, and with either sign. Only orders are undone.
"""

from __future__ import annotations

from typing import Any

from ..match import MatchedSite
from . import Case, Declared, Outcome, need_anchor, no_options
from .recover import recover, summary
from .solve import Aim


def _choose(matched: MatchedSite) -> Aim | None:
    return Aim.ORDER if matched.site.kind in ("mlp", "heads", "experts") else None


def run(case: Case, **options: Any) -> Outcome:
    """The orders of everything that can be reordered."""
    no_options("align-permutation", options)
    elements = recover(
        case.match, case.target, need_anchor(case), choose=_choose, seed=case.seed, progress=case.progress
    )
    return Outcome(elements, facts=summary(case.match, elements))


ATTACK = Declared(
    about="match MLP rows, heads, groups and experts to the anchor's by assignment",
    needs=("anchor",),
    access=1,
    cost="one assignment problem an MLP and a set of heads; seconds on a CPU",
    keeps_function=True,
    run=run,
)
