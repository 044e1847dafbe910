"""Which head, group or expert of one model is which of another: the assignment of most alike invariants.

A site that exchanges blocks is solved from the outside in. Where its blocks hold further blocks (query heads
in a group), a pair of blocks is as alike as the best pairing of what they hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np

from ..groups import Floats, Ints, Monomial
from ..match import Instance
from .rows import assign
from .tables import Cells, Layout, Tensors, tables


def pair_blocks(
    layout: Layout, number: int, instance: Instance, own: Tensors, other: Tensors, seed: int
) -> Monomial:
    """The order of blocks that is most like the anchor's: block j of the anchor is block perm[b, j] of `own`."""
    matched = layout.match.sites[number]
    site = matched.site
    batch = tuple(site.batch_dims)
    b, n = prod(matched.batch), matched.acted
    total = np.zeros((b, n, n))
    nested: dict[str, Floats] = {}
    mine = tables(layout, number, instance, own, seed)
    theirs = tables(layout, number, instance, other, seed)
    for x, y in zip(mine, theirs, strict=True):
        if site.acts not in x.dims:
            continue
        size = float(np.linalg.norm(y.values))
        if size == 0.0:
            continue
        inside = next((dim for dim in x.dims if dim not in (*batch, site.acts)), None)
        lead = (*batch, site.acts, *([inside] if inside else []))
        sizes = (*matched.batch, n)
        left, right = (
            _lay(cells, lead, sizes, size) for cells in (y, x)
        )  # anchor first: rows of the assignment
        if inside is None:
            total += left.reshape(b, n, -1) @ right.reshape(b, n, -1).transpose(0, 2, 1)
            continue
        r = left.shape[len(sizes)]
        flat = left.reshape(b, n * r, -1) @ right.reshape(b, n * r, -1).transpose(0, 2, 1)
        alike = flat.reshape(b, n, r, n, r).transpose(0, 1, 3, 2, 4)
        nested[inside] = nested.get(inside, 0.0) + alike
    for alike in nested.values():
        for e, i, j in np.ndindex(b, n, n):
            total[e, i, j] += _best(alike[e, i, j])
    perm: Ints = np.stack([assign(total[e]) for e in range(b)])
    return Monomial(perm, np.ones(perm.shape))


def _best(similarity: Floats) -> float:
    """The largest sum of a pairing."""
    return float(similarity[np.arange(len(similarity)), assign(similarity)].sum())


def _lay(cells: Cells, lead: Iterable[str], sizes: tuple[int, ...], size: float) -> Floats:
    """The dims of `lead` first, repeated over batch dims that the table lacks; all else as features."""
    values, dims = cells.values / size, list(cells.dims)
    wanted = tuple(lead)
    for dim, count in zip(wanted, sizes, strict=False):
        if dim not in dims:
            values, dims = np.broadcast_to(values, (count, *values.shape)), [dim, *dims]
    order = [dims.index(dim) for dim in wanted]
    rest = [k for k in range(len(dims)) if k not in order]
    moved = values.transpose([*order, *rest, len(dims)])
    return moved.reshape(*moved.shape[: len(order)], -1)
