"""The order of MLP rows that is least like a reference: the base's rows, or the checkpoint's own.

The paper (PaRaMS, arXiv 2503.07661) takes the permutation P that maximises ‖W_ref − P W‖² over all tensors of
the MLP, an assignment problem: ‖W_ref‖ and ‖P W‖ are fixed, so P minimises Σ_j ⟨ref_j, (P W)_j⟩. It is a
function of the weights alone, and that is no secret: against one's own order the best P is its own inverse,
so whoever solves the same problem on the locked rows has P back (99 % of the rows of really trained layers).

So the key takes part. It deals rows and places into blocks at random, and the assignment is solved in each
block. With blocks of 64 rows 6 to 13 % of the rows can be found again in that way, three quarters of the
distance that the optimum gains are left, and the cost is linear in the number of rows. A block size of 0 is
the paper's optimum, with nothing secret in it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..groups import Floats, Ints, Stream
from ..match import Instance, Match, MatchedSite
from ..spec import Slot
from ..transform import unfold
from .context import Tensors

BLOCK = 64
MIN_BLOCKS = 4  # fewer would give small layers away

Array = NDArray[Any]


def slot_rows(values: Array, slot: Slot, matched: MatchedSite) -> Array:
    """The rows of one tensor that a site acts on, whatever its layout.

    Returns: [b, n, width]: for each instance of the batch, one row a coordinate of the acted dim.
    """
    site, sizes = matched.site, matched.sizes
    values, names = unfold(values, slot, sizes)
    order = [names.index(dim) for dim in (*site.batch_dims, site.acts)]
    rest = [k for k in range(len(names)) if k not in order]
    folded = values.transpose([*order, *rest])
    return folded.reshape(prod(matched.batch), matched.acted, -1)


def site_tensors(match: Match, number: int, instance: Instance) -> Iterator[tuple[str, Slot]]:
    """Tensors of one instance of a site, by their name in the checkpoint; only slots that lie on an axis."""
    dims = match.sites[number].site.name_dims
    acts = match.sites[number].site.acts
    for name, parts in match.parts.items():
        for part in parts:
            here = part.site == number and tuple(part.dims[dim] for dim in dims) == instance
            if here and part.slot.axis_of(acts) is not None:
                yield name, part.slot


def rearrange(
    match: Match,
    number: int,
    instance: Instance,
    tensors: Tensors,
    base: Tensors | None,
    stream: Stream,
    block: int,
) -> Ints:
    """The order of one instance's rows that is least like the reference, block by block.

    Args:
        tensors: the checkpoint.
        base: the reference; None takes the checkpoint itself.
        stream: deals the rows into blocks, and breaks ties.
        block: rows a block; 0 for all in one.

    Returns: int64 [b, n]: row j of the result is row perm[b, j] of the source.

    Raises:
        InputError: the base's shapes differ, or a weight is not finite.
    """
    matched = match.sites[number]
    b, n = prod(matched.batch), matched.acted
    places, rows = stream.permutation(n, b), stream.permutation(n, b)
    cuts = _cuts(n, block)
    grams = [[np.zeros((stop - start, stop - start)) for start, stop in cuts] for _ in range(b)]
    for name, slot in site_tensors(match, number, instance):
        values = tensors.floats(name)
        own = slot_rows(values, slot, matched)
        reference = own if base is None else slot_rows(_base_floats(base, name, values.shape), slot, matched)
        for e in range(b):
            for gram, (start, stop) in zip(grams[e], cuts, strict=True):
                with np.errstate(over="ignore", invalid="ignore"):
                    gram += reference[e][places[e, start:stop]] @ own[e][rows[e, start:stop]].T
    out = np.empty((b, n), dtype=np.int64)
    for e in range(b):
        for gram, (start, stop) in zip(grams[e], cuts, strict=True):
            if not np.isfinite(gram).all():
                raise InputError(
                    "weights that are not finite, or too large to compare",
                    where=matched.label(instance),
                    hint="lock it with --method exact, which moves bits and computes nothing",
                )
            out[e, places[e, start:stop]] = rows[e, start:stop][least_similar(gram)]
    return out


def least_similar(gram: Floats) -> Ints:
    """For each row of a square matrix of inner products the column to put there, for the least sum."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(gram)
    return np.asarray(columns, dtype=np.int64)


def _cuts(n: int, block: int) -> list[tuple[int, int]]:
    count = 1 if block == 0 else min(max(-(-n // block), MIN_BLOCKS), max(n // 2, 1))
    edges = [n * k // count for k in range(count + 1)]
    return list(pairwise(edges))


def _base_floats(base: Tensors, name: str, shape: tuple[int, ...]) -> Array:
    values = base.floats(name)
    if values.shape != shape:
        raise InputError(
            "the base has another shape here",
            where=name,
            expected=list(shape),
            got=list(values.shape),
            hint="give the base that this model was fine-tuned from",
        )
    return values


# --- the record ---------------------------------------------------------------------------------------------


def pack(perm: Ints) -> dict[str, Any]:
    """A batch of permutations [b, n] as JSON: its shape, and base64 of 2 or 4 bytes a number."""
    kind = "<u2" if perm.shape[1] <= 1 << 16 else "<u4"
    return {"shape": list(perm.shape), "rows": base64.b64encode(perm.astype(kind).tobytes()).decode("ascii")}


def unpack(record: Mapping[str, Any], shape: Sequence[int], where: str) -> Ints:
    """What `pack` was given.

    Raises:
        InputError: not permutations of this shape.
    """
    b, n = shape
    kind = "<u2" if n <= 1 << 16 else "<u4"
    try:
        perm = np.frombuffer(base64.b64decode(record["rows"], validate=True), dtype=kind).astype(np.int64)
        good = list(record["shape"]) == [b, n] and len(perm) == b * n
    except (KeyError, TypeError, ValueError, binascii.Error):
        good, perm = False, np.empty(0, dtype=np.int64)
    if not good or not np.array_equal(np.sort(perm.reshape(b, n), axis=1), np.tile(np.arange(n), (b, 1))):
        raise InputError("the record of the rearrangement is damaged", where=where)
    return perm.reshape(b, n)
