"""`exact`: signed permutations everywhere, by index and sign bit alone.

Inside heads (quarter turns inside RoPE pairs), of MLP rows, heads and experts. With `scales`, times powers of
two wherever every weight of a coordinate can take them without loss in the checkpoint's dtype; coordinates
that cannot are recorded, so that unlocking needs no second look at the data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..groups import SCALE_EXPONENTS, Monomial, Stream, group
from ..match import Instance, MatchedSite
from ..transform import unfold
from .context import Context, Drawn, Tensors, draw_sites

_EXPONENT = {"F64": (52, 11), "F32": (23, 8), "F16": (10, 5), "BF16": (7, 8)}  # mantissa and exponent bits


def draw(context: Context) -> Drawn:
    """Signed permutations of every site's group, with `options["scales"]` times powers of two."""
    scales = bool(context.options.get("scales", False))

    def one(matched: MatchedSite, stream: Stream, batch: int) -> Monomial:
        return group(matched.site.group).draw_exact(stream, batch, matched.acted, scales)

    elements = draw_sites(context, "exact", one)
    if not scales:
        return Drawn(elements)
    if context.recorded is not None:
        left_out = context.recorded["unscaled"]
    elif context.tensors is not None:
        left_out = _unscalable(context, context.tensors)
    else:
        raise InputError("powers of two depend on the weights, which are not at hand")
    taken = stretched = 0
    for (number, instance), element in elements.items():
        assert isinstance(element, Monomial)
        matched = context.match.sites[number]
        stuck = np.zeros(element.scale.shape, dtype=bool)
        stuck.reshape(-1)[np.array(left_out.get(matched.label(instance), []), dtype=np.int64)] = True
        # scale[j] multiplies x[perm[j]], and what is stuck is a coordinate of x
        stuck = np.take_along_axis(stuck, element.perm, axis=1)
        elements[number, instance] = Monomial(
            element.perm, np.where(stuck, np.sign(element.scale), element.scale)
        )
        if group(matched.site.group).scales != "none":
            taken += int((~stuck).sum())
            stretched += stuck.size
    report = {"coordinates that can take powers of two": taken / stretched if stretched else 0.0}
    return Drawn(elements, {"unscaled": left_out}, report=report)


def _unscalable(context: Context, tensors: Tensors) -> dict[str, list[int]]:
    """Coordinates, as flat positions in [b, n], with a weight that would leave the normal numbers."""
    match = context.match
    stuck: dict[tuple[int, Instance], NDArray[np.bool_]] = {}
    for name, parts in match.parts.items():
        scaled = [part for part in parts if _stretches(match.sites[part.site], part.slot.power)]
        if not scaled:
            continue
        tight = _tight(tensors.bits(name), tensors.dtype(name), SCALE_EXPONENTS * _reach(scaled), name)
        for part in scaled:
            matched = match.sites[part.site]
            site, sizes = matched.site, matched.sizes
            instance = tuple(part.dims[dim] for dim in site.name_dims)
            order = (*site.batch_dims, site.acts)
            folded, names = unfold(tight, part.slot, sizes)
            drop = tuple(k for k, dim in enumerate(names) if dim not in order)
            kept = [dim for dim in names if dim in order]
            mask = np.transpose(folded.any(axis=drop), [kept.index(dim) for dim in order])
            found_mask = stuck.setdefault((part.site, instance), np.zeros(mask.shape, dtype=bool))
            found_mask |= mask
    out: dict[str, list[int]] = {}
    for (number, instance), mask in stuck.items():
        matched = match.sites[number]
        rows = mask.reshape(-1, matched.acted)
        if group(matched.site.group).scales == "whole":
            rows = np.repeat(rows.any(axis=1, keepdims=True), matched.acted, axis=1)
        if rows.any():
            out[matched.label(instance)] = np.flatnonzero(rows).tolist()
    return out


def _stretches(matched: MatchedSite, power: int) -> bool:
    return power != 0 and group(matched.site.group).scales != "none"


def _reach(parts: list[Any]) -> int:
    return sum(abs(part.slot.power) for part in parts)


def _tight(bits: NDArray[Any], dtype: str, reach: int, name: str) -> NDArray[np.bool_]:
    """Weights that 2**±reach would take out of the normal numbers; zeros, infinities and NaNs never count."""
    if dtype not in _EXPONENT:
        raise InputError(
            "no powers of two for this dtype", where=name, expected=" | ".join(_EXPONENT), got=dtype
        )
    mantissa, width = _EXPONENT[dtype]
    field = ((bits >> bits.dtype.type(mantissa)) & bits.dtype.type((1 << width) - 1)).astype(np.int64)
    top = (1 << width) - 1
    subnormal = (field == 0) & (bits & bits.dtype.type((1 << mantissa) - 1) != 0)
    normal = (field > 0) & (field < top)
    return subnormal | (normal & ((field <= reach) | (field >= top - reach)))
