"""Align by canonical forms: the products W_qᵀ W_k and W_v W_o of a head are the same under any lock of it.

Both models are brought to a form that depends on the product alone, and the attacked one back from the form by
the anchor's way into it. With `form="polar"` the two factors are balanced (x xᵀ = z zᵀ, by the geometric mean)
and a Procrustes rotation joins the forms; with `form="svd"` the coordinates are the product's singular
directions, which needs no rotation but mixes up directions of nearly equal weight. Pairs under rotary positions
are balanced in size and turned by their best common angle. Heads must stand in order: align permutations first.
"""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..match import MatchedSite
from . import Case, Declared, Outcome, need_anchor, no_options
from .recover import recover, summary
from .solve import Aim

FORMS = {"polar": Aim.POLAR, "svd": Aim.SVD}


def run(case: Case, *, form: str = "polar", snap: bool = False, **options: Any) -> Outcome:
    """Elements of every query-key and value-output site by canonical forms, one of `FORMS`."""
    no_options("align-canonical", options, ("form", "snap"))
    if form not in FORMS:
        raise UsageError("no such canonical form", expected=" | ".join(FORMS), got=form)

    def choose(matched: MatchedSite) -> Aim | None:
        return FORMS[form] if matched.site.kind in ("qk", "vo") else None

    elements = recover(
        case.match,
        case.target,
        need_anchor(case),
        choose=choose,
        snapped=snap,
        seed=case.seed,
        progress=case.progress,
    )
    return Outcome(elements, facts={"form": form, **summary(case.match, elements)})


ATTACK = Declared(
    about="bring the products of each head to a canonical form, the same in both models",
    needs=("anchor",),
    access=1,
    cost="a few eigendecompositions of n × n a head; a second on a CPU",
    keeps_function=True,
    run=run,
)
