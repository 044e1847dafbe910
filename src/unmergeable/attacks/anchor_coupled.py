"""Anchor, coupled: one element for both sides of every site, brought as near to an anchor as the group allows.

Every proven symmetry is undone at once: heads, groups and experts are found again by products that no lock
changes, rows of MLPs by assignment with their best signed scales, and at each query-key and value-output pair
one matrix A (A⁻ᵀ on the other side) is solved for. The function stays what it was, exactly. The anchor is the
base or *any other fine-tune of it*, which every merger holds.

It is what a lock cannot stop: exact locks come back bit for bit, others to a few per cent of the distance
between fine-tune and base.
"""

from __future__ import annotations

from typing import Any

from . import Case, Declared, Outcome, need_anchor, no_options
from .dense import ITERATIONS
from .recover import recover, summary


def run(case: Case, *, snap: bool = True, **options: Any) -> Outcome:
    """Elements of all sites; `snap` takes those that are all but exact to be exact."""
    no_options("anchor-coupled", options, ("snap",))
    elements = recover(
        case.match, case.target, need_anchor(case), snapped=snap, seed=case.seed, progress=case.progress
    )
    return Outcome(elements, facts=summary(case.match, elements))


ATTACK = Declared(
    about="undo every symmetry by one element a site, towards the base or any other fine-tune",
    needs=("anchor",),
    access=1,
    cost="one assignment an MLP and a set of heads, Gauss-Newton on n × n matrices a head; seconds on a CPU",
    keeps_function=True,
    run=run,
    budget={"examples": 0, "forward_passes": 0, "iterations": ITERATIONS},
)
