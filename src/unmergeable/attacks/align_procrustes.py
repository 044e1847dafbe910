"""Align by rotations: the orthogonal Procrustes problem (Kabsch) for query-key and value-output of each head.

MergeLock's own test of whether its locks can be undone (arXiv 2509.01548): the best orthogonal matrix between
the attacked model's heads and the anchor's, one for both sides, and only what the site's group has of those:
rotations of pairs under rotary positions, signs. It undoes rotations and signed orders of coordinates, not
scales nor general matrices, and knows nothing of the order of heads: align permutations first.
"""

from __future__ import annotations

from typing import Any

from ..match import MatchedSite
from . import Case, Declared, Outcome, need_anchor, no_options
from .recover import recover, summary
from .solve import Aim


def _choose(matched: MatchedSite) -> Aim | None:
    return Aim.LENGTHS if matched.site.kind in ("qk", "vo") else None


def run(case: Case, *, snap: bool = False, **options: Any) -> Outcome:
    """Rotations of every head; `snap` takes those that are all but signed orders to be just that."""
    no_options("align-procrustes", options, ("snap",))
    elements = recover(
        case.match,
        case.target,
        need_anchor(case),
        choose=_choose,
        snapped=snap,
        seed=case.seed,
        progress=case.progress,
    )
    return Outcome(elements, facts=summary(case.match, elements))


ATTACK = Declared(
    about="rotate query-key and value-output of each head to the anchor's (Procrustes, Kabsch)",
    needs=("anchor",),
    access=1,
    cost="one singular value decomposition of n × n a head; a second on a CPU",
    keeps_function=True,
    run=run,
)
