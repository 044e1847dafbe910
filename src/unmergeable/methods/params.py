"""`params`: MLP rearrangement, multi-head scaling and dropout-based pruning (PaRaMS, arXiv 2503.07661).

MLP rows are put in the order that is least like a reference (`rearrange`), query-key and value-output of
each head are scaled by A, A⁻ᵀ and B, B⁻¹ (`scaling`), and with a `prune_rate` weights of the MLP are dropped
before (`prune`): the only part of any method that changes the function. Heads and experts keep their order,
as in the paper. docs/methods.md says what of the paper's text was at hand, and how the rest is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import numpy as np

from ..errors import ClaimError, InputError, UsageError
from ..groups import Element, Monomial, Stream
from ..match import Instance, MatchedSite
from .context import ATTEMPTS, CONDITION, MIN_MOVE, Context, Drawn, draw_sites, moved
from .prune import plan_pruning
from .rearrange import BLOCK, pack, rearrange, unpack
from .scaling import FORMS, condition_numbers, draw_form

PERMUTING = ("permutation", "monomial", "positive_monomial", "orthogonal", "general_linear")


@dataclass(frozen=True)
class Options:
    """`Context.options` as this method reads them. Defaults never change: unlocking draws by them again.

    Attributes:
        form: of the multi-head scaling, one of FORMS.
        condition: cap on condition numbers; 400 gives the paper's ranges.
        block: rows a block of the rearrangement, 0 for the paper's optimum, which keeps no secret.
        prune_rate, prune_target, prune_rescale: see `prune`.
    """

    form: str
    condition: float
    block: int
    prune_rate: float
    prune_target: str
    prune_rescale: bool | None

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Options:
        """Raises UsageError where a value makes no sense."""
        form = options.get("form", "diagonal")
        if form not in FORMS:
            raise UsageError("no such form of multi-head scaling", expected=" | ".join(FORMS), got=form)
        condition = float(options.get("condition", CONDITION))
        if not isfinite(condition) or condition < 1.0:
            raise UsageError(
                "not a cap on condition numbers", expected="a number of at least 1", got=condition
            )
        block = options.get("rearrange_block", BLOCK)
        if isinstance(block, bool) or not isinstance(block, int) or block < 0:
            raise UsageError(
                "not a number of rows", where="rearrange_block", expected="an integer >= 0", got=block
            )
        return cls(
            form,
            condition,
            block,
            float(options.get("prune_rate", 0.0)),
            str(options.get("prune_target", "weights")),
            options.get("prune_rescale"),
        )


def draw(context: Context) -> Drawn:
    """The rearrangement, the scaling and what is pruned.

    `recorded["rearranged"]` has the orders of the rows by site; with it no tensor is read.

    Raises:
        UsageError: an option that makes no sense. InputError: weights that are needed and not at hand, not
            finite, or unlike the base's in shape. ClaimError: a site that cannot be moved far enough.
    """
    options = Options.read(context.options)
    match = context.match
    prunes = plan_pruning(
        match, context.key, context.salt, options.prune_rate, options.prune_target, options.prune_rescale
    )

    def scale(matched: MatchedSite, stream: Stream, batch: int) -> Element | None:
        site = matched.site
        if site.kind not in ("qk", "vo") and (site.kind != "mlp" or site.group in PERMUTING):
            return None
        return draw_form(options.form, site.group, stream, batch, matched.acted, options.condition)

    elements = draw_sites(context, "params", scale)
    orders: dict[str, dict[str, Any]] = {}
    for number, matched in enumerate(match.sites):
        if matched.site.kind != "mlp" or matched.site.group not in PERMUTING:
            continue
        for instance in matched.instances:
            element = _order(context, number, instance, options.block)
            elements[number, instance] = element
            orders[matched.label(instance)] = pack(element.perm)
    recorded = {"rearranged": orders} if orders else {}
    report = {
        "form": options.form,
        "condition": condition_numbers(match, elements),
        "prune_rate": options.prune_rate,
    }
    return Drawn(elements, recorded, prunes, report)


def _order(context: Context, number: int, instance: Instance, block: int) -> Monomial:
    """The rearrangement of one instance: recorded, or found from the weights."""
    matched = context.match.sites[number]
    label, shape = matched.label(instance), (prod(matched.batch), matched.acted)
    if context.recorded is not None:
        record = context.recorded.get("rearranged", {}).get(label)
        if record is None:
            raise InputError("the record of the rearrangement lacks a site", where=label)
        perm = unpack(record, shape, label)
        return Monomial(perm, np.ones(perm.shape))
    if context.tensors is None:
        raise InputError("the rearrangement depends on the weights, which are not at hand", where=label)
    for attempt in range(ATTEMPTS if block else 1):  # without blocks nothing would change
        stream = context.key.stream(context.salt, f"params|{label}|{attempt}")
        perm = rearrange(context.match, number, instance, context.tensors, context.base, stream, block)
        element = Monomial(perm, np.ones(perm.shape))
        if moved(element) >= MIN_MOVE:
            return element
    raise ClaimError(
        "too few rows to rearrange",
        where=label,
        expected=f"an order that moves weights by {MIN_MOVE:.0%} of their norm",
        got=f"none in {ATTEMPTS if block else 1} draws of {matched.acted} rows",
    )
