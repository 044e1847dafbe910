"""The order of heads, experts and rows: signatures that tell them apart, tables in another's order."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from .groups import Floats
from .invariants import Cells
from .matching import match_rows


def find_order(
    pairs: Sequence[tuple[Cells, Cells, Sequence[str]]], per: Sequence[str], acts: str
) -> NDArray[np.int64]:
    """[instances, n]: where the positions of the acted dim of the first of each pair lie in the second.

    Args:
        pairs: a table of two checkpoints each, and its dims whose order is not known yet.
        per, acts: of the site that changes the order.
    """
    a, b = [], []
    for source, target, inner in pairs:
        scale = typical(source)
        a.append(signature(source, per, acts, inner, scale))
        b.append(signature(target, per, acts, inner, scale))
    before, after = np.concatenate(a, axis=-1), np.concatenate(b, axis=-1)
    return np.stack([match_rows(x, y) for x, y in zip(before, after, strict=True)])


def typical(cells: Cells) -> Floats:
    """Root mean square of each feature."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.sqrt(np.mean(cells.values**2, axis=tuple(range(cells.values.ndim - 1))))
    return np.where(np.isfinite(scale) & (scale > 0.0), scale, 1.0)


def _arrange(cells: Cells, lead: Sequence[str], last: Sequence[str]) -> tuple[list[str], Floats]:
    rest = [dim for dim in cells.dims if dim not in lead and dim not in last]
    order = [*lead, *rest, *last]
    return rest, np.transpose(cells.values, [*(cells.dims.index(dim) for dim in order), len(cells.dims)])


def signature(cells: Cells, per: Sequence[str], acts: str, inner: Sequence[str], scale: Floats) -> Floats:
    """[instances, n, …]: what tells the positions of the acted dim apart and no order of `inner` changes."""
    inner = [dim for dim in dict.fromkeys(inner) if dim in cells.dims and dim not in per and dim != acts]
    rest, values = _arrange(cells, [*per, acts], inner)
    shape = values.shape
    lead = len(per) + 1
    values = values.reshape(
        prod(shape[: lead - 1]), shape[lead - 1], prod(shape[lead : lead + len(rest)]), -1, shape[-1]
    )
    values = values / scale
    if inner:
        values = np.concatenate([values, values**2, values**3], axis=-1).mean(axis=3, keepdims=True)
    with np.errstate(over="ignore"):
        return np.asarray(np.nan_to_num(values.reshape(*values.shape[:2], -1), posinf=1e100, neginf=-1e100))


def reorder(cells: Cells, per: Sequence[str], acts: str, perm: NDArray[np.int64]) -> Cells:
    lead = [*per, acts]
    order = [*lead, *(dim for dim in cells.dims if dim not in lead)]
    axes = [cells.dims.index(dim) for dim in order]

    def move(array: Floats, further: int) -> Floats:
        moved = np.transpose(array, [*axes, *range(len(axes), len(axes) + further)])
        flat = moved.reshape(*perm.shape, -1)
        taken = np.take_along_axis(flat, perm[:, :, None], axis=1).reshape(moved.shape)
        return np.transpose(taken, [*np.argsort(axes), *range(len(axes), len(axes) + further)])

    return Cells(cells.dims, move(cells.values, 1), move(cells.norms, 0))
