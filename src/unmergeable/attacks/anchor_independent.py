"""Anchor, independent: every matrix pulled to the anchor by least squares of its own (arXiv 2606.30360).

For each head and each of query, key, value and output alone: the n × n matrix T with the least ‖T W − W₀‖, W
with its bias as a column; for rows of MLPs each matrix's own assignment, and its own scales where rows may be
scaled. As published, nothing ties the two sides of a product together, so the function is *not* kept: the
attacked model stands somewhat nearer to the anchor and computes something else. It is here because it is what
has been published; `anchor-coupled` is what works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from ..groups import Dense, Element, Floats, Monomial
from ..match import MatchedSite
from ..transform import Step, _step, apply_floats
from . import Case, Declared, Outcome, need_anchor, no_options
from .rows import pair_rows
from .tables import Layout, Place, read_both, slot_rows

ORDERED = ("permutation", "monomial", "positive_monomial")


def run(case: Case, **options: Any) -> Outcome:
    """New values of every tensor that a query-key, value-output or MLP site acts on."""
    no_options("anchor-independent", options)
    anchor = need_anchor(case)
    layout = Layout(case.match)
    steps: dict[str, list[Step]] = {}
    for number, matched in enumerate(case.match.sites):
        if layout.outer(number):
            continue
        for instance in matched.instances:
            for unit in _units(layout.places[number, instance]):
                pairs = [read_both(place.name, case.target, anchor) for place in unit]
                rows = [
                    [slot_rows(values, place.slot, matched) for values in both]
                    for place, both in zip(unit, pairs, strict=True)
                ]
                x, y = (np.concatenate([part[k] for part in rows], axis=2) for k in (0, 1))
                element = _own(matched, x, y)
                for place in unit:
                    steps.setdefault(place.name, []).append(_own_step(place, matched, element))

    def made(name: str) -> Floats | None:
        if name not in steps:
            return None
        return apply_floats(np.asarray(case.target[name], dtype=np.float64), steps[name])

    return Outcome(replace=made, facts={"matrices": sum(map(len, steps.values()))})


def _units(places: Sequence[Place]) -> list[list[Place]]:
    """A weight and its bias together, everything else alone."""
    found: dict[tuple[object, ...], list[Place]] = {}
    for place in places:
        stem, _, kind = place.name.rpartition(".")
        whole = stem if kind in ("weight", "bias") else place.name
        found.setdefault((whole, tuple(place.slot.index.values()), place.slot.power), []).append(place)
    return list(found.values())


def _own(matched: MatchedSite, x: Floats, y: Floats) -> Element:
    """What pulls one matrix's rows x nearest to y, without a thought of its counterpart."""
    group = matched.site.group
    if group in ORDERED:
        perm = pair_rows([(1, x, y)], scaled=False, signed=group == "monomial")
        if group == "permutation":
            return Monomial(perm, np.ones(perm.shape))
        ordered = np.take_along_axis(x, perm[:, :, None], axis=1)
        size = (ordered**2).sum(axis=2)
        scale = (ordered * y).sum(axis=2) / np.where(size > 0, size, 1.0)
        return Monomial(perm, np.where(scale == 0.0, 1.0, scale))
    turned = x.transpose(0, 2, 1)
    matrix = y @ turned @ np.linalg.pinv(x @ turned, hermitian=True)
    return Dense(matrix, matrix)  # a least-squares map need not have an inverse; none is asked for


def _own_step(place: Place, matched: MatchedSite, element: Element) -> Step:
    site = matched.site
    assert element.batch == prod(matched.batch)
    return _step(replace(place.slot, power=1), matched.sizes, site.batch_dims, site.acts, element)


ATTACK = Declared(
    about="pull every matrix to the anchor by least squares of its own, as published; breaks the model",
    needs=("anchor",),
    access=1,
    cost="one least-squares problem a matrix and head; seconds on a CPU",
    keeps_function=False,
    run=run,
)
