"""Dropout-based pruning (PaRaMS, arXiv 2503.07661): the one part of a lock that changes the function.

Each weight of the MLP matrices is dropped with probability p, by lots of the key, before any element acts:

    target "weights"   w ← 0, or w / (1 − p) where it is kept and `rescale` is on
    target "update"    w ← w₀, or w₀ + (w − w₀) / (1 − p): DARE's rule on the difference from the base w₀

`rescale` is off for weights and on for the update unless it is given. The lots depend on the key, the salt
and the tensor's name alone, in chunks of rows, so any range of rows can be had by itself: 16 bits of key
stream a weight, dropped where they are below round(p · 2¹⁶).

`PrunedSource` shows a checkpoint as it is after pruning; whoever reads it needs no further knowledge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.header import TensorInfo
from ..checkpoint.numeric import bits_dtype, is_float, to_bits, to_float64
from ..errors import InputError, UsageError
from ..match import Match
from .context import StreamSource

TARGETS = ("weights", "update")
LOTS = 1 << 16
CHUNK = 1 << 16  # weights that share a stream, in whole rows

Array = NDArray[Any]
Mask = NDArray[np.bool_]


class Source(Protocol):
    """What is pruned: a checkpoint, or something that is read like one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def read(self, name: str) -> Array: ...
    def read_rows(self, name: str, start: int, stop: int) -> Array: ...
    def readinto(self, name: str, offset: int, out: memoryview) -> None: ...


@dataclass(frozen=True)
class Prune:
    """How one source tensor is thinned out.

    Attributes:
        name: of the tensor in the checkpoint.
        rate: probability of a weight to be dropped.
        target: one of TARGETS.
        rescale: whether what is kept grows by 1 / (1 − rate).
        axis, inside: which positions of one axis belong to the MLP; an axis of None for all.
        batch_axes: leading axes that only count experts, so that a table of biases is not taken for a matrix.
    """

    key: StreamSource
    salt: bytes
    name: str
    rate: float
    target: str
    rescale: bool
    axis: int | None = None
    inside: Mask | None = None
    batch_axes: int = 0

    @property
    def needs_base(self) -> bool:
        return self.target == "update"

    def acts_on(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape is a matrix: biases are left alone."""
        return len(shape) - self.batch_axes >= 2

    def dropped(self, shape: tuple[int, ...], start: int, stop: int) -> Mask:
        """Which weights of rows [start, stop) are dropped: bool [stop - start, …]."""
        width = prod(shape[1:])
        rows = max(1, CHUNK // max(width, 1))
        out = np.empty((stop - start, width), dtype=bool)
        threshold = np.uint16(round(self.rate * LOTS))
        for chunk in range(start // rows, -(-stop // rows)):
            first, last = chunk * rows, min((chunk + 1) * rows, shape[0])
            count = (last - first) * width
            stream = self.key.stream(self.salt, f"params|prune|{self.name}|{chunk}")
            words = stream.words(-(-count // 4)).astype("<u8", copy=False)
            lots = words.view("<u2")[:count].reshape(-1, width)
            low, high = max(first, start), min(last, stop)
            np.less(lots[low - first : high - first], threshold, out=out[low - start : high - start])
        mask = out.reshape(stop - start, *shape[1:])
        inside = self._inside(len(shape), start, stop)
        return mask if inside is None else mask & inside

    def changed(self, shape: tuple[int, ...], start: int, stop: int) -> Mask:
        """Which weights of rows [start, stop) do not stay as they are: with `rescale`, all of the MLP's."""
        if not self.rescale:
            return self.dropped(shape, start, stop)
        mask = np.ones((stop - start, *shape[1:]), dtype=bool)
        inside = self._inside(len(shape), start, stop)
        return mask if inside is None else mask & inside

    def apply(
        self, bits: Array, dtype: str, shape: tuple[int, ...], start: int, base: Array | None = None
    ) -> Array:
        """Rows of the tensor after pruning.

        Args:
            bits: raw bits of rows start, start + 1, … in the layout of the source.
            shape: of the whole tensor.
            base: the base's values of these rows, float32 or float64, if `needs_base`.

        Returns: raw bits, a fresh array.

        Raises:
            InputError: a dtype without arithmetic, or a weight that becomes too large for it.
        """
        if not is_float(dtype):
            raise InputError("this dtype cannot be pruned", where=self.name, got=dtype)
        drop = self.dropped(shape, start, start + len(bits))
        out = bits.copy()
        if self.rescale:
            values = to_float64(bits, dtype)
            origin = np.zeros_like(values) if base is None else base.astype(np.float64)
            kept = to_bits(origin + (values - origin) / (1.0 - self.rate), dtype)
            grown = self.changed(shape, start, start + len(bits))
            if not np.array_equal(np.isfinite(to_float64(kept, dtype))[grown], np.isfinite(values)[grown]):
                hint = "prune less, or do not rescale"
                raise InputError("a weight grows beyond what its dtype holds", where=self.name, hint=hint)
            out[grown] = kept[grown]
        if base is None:
            out[drop] = 0
        else:
            out[drop] = to_bits(base, dtype)[drop]
        return out

    def _inside(self, ndim: int, start: int, stop: int) -> Mask | None:
        if self.axis is None or self.inside is None:
            return None
        along = [1] * ndim
        along[self.axis] = -1
        part = self.inside[start:stop] if self.axis == 0 else self.inside
        return part.reshape(along)


def plan_pruning(
    match: Match, key: StreamSource, salt: bytes, rate: float, target: str, rescale: bool | None
) -> dict[str, Prune]:
    """What to prune, by source tensor: every tensor whose rows or columns an MLP site acts on.

    Raises:
        UsageError: a rate outside of [0, 1) or too small for 16 bits, or no such target.
    """
    if target not in TARGETS:
        raise UsageError("no such target of pruning", expected=" | ".join(TARGETS), got=target)
    if not 0.0 <= rate < 1.0 or (rate > 0.0 and not 0 < round(rate * LOTS) < LOTS):
        raise UsageError("not a rate of pruning", expected="0, or 0.00001 to 0.99999", got=rate)
    if rate == 0.0:
        return {}
    grow = target == "update" if rescale is None else bool(rescale)
    out: dict[str, Prune] = {}
    for name, parts in match.parts.items():
        slots = [(part.slot, match.sites[part.site]) for part in parts]
        slots = [(slot, matched) for slot, matched in slots if matched.site.kind == "mlp"]
        slots = [(slot, matched) for slot, matched in slots if slot.axis_of(matched.site.acts) is not None]
        if not slots:
            continue
        axes = {slot.axis_of(matched.site.acts) for slot, matched in slots}
        axis, inside = None, None
        if len(axes) == 1:
            axis = axes.pop()
            assert axis is not None
            views = [slot.axes[axis].view(matched.sizes) for slot, matched in slots]
            inside = np.zeros(views[0].total, dtype=bool)
            for view in views:
                inside[view.positions().reshape(-1)] = True
            if inside.all():
                axis, inside = None, None
        slot, matched = slots[0]
        batch_axes = sum(set(index.dims) <= set(matched.site.batch_dims) for index in slot.axes.values())
        out[name] = Prune(key, salt, name, rate, target, grow, axis, inside, batch_axes)
    return out


class PrunedSource:
    """A checkpoint as it is after pruning, to be read in its place. Safe between threads if it is.

    Args:
        source: the checkpoint.
        prunes: as `plan_pruning` or `Drawn.prune` give them.
        base: a checkpoint with the base's tensors under the same names, for the target "update".

    Raises:
        UsageError: a base is needed and not given; InputError: it lacks a tensor, or has it in another shape.
    """

    def __init__(self, source: Source, prunes: Mapping[str, Prune], base: Source | None = None) -> None:
        self._source, self._base = source, base
        self._prunes = {name: p for name, p in prunes.items() if p.acts_on(source.tensors[name].shape)}
        for name, prune in self._prunes.items():
            if not prune.needs_base:
                continue
            if base is None:
                hint = "give --base, or prune the weights"
                raise UsageError("pruning the update needs the base", hint=hint)
            shape = source.tensors[name].shape
            if name not in base.tensors or base.tensors[name].shape != shape:
                got = list(base.tensors[name].shape) if name in base.tensors else "nothing"
                raise InputError("the base has not this tensor", where=name, expected=list(shape), got=got)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    def read(self, name: str) -> Array:
        """The whole tensor, raw bits."""
        bits = self._source.read(name)
        return bits if name not in self._prunes else self._pruned(name, bits, 0)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop), raw bits."""
        bits = self._source.read_rows(name, start, stop)
        return bits if name not in self._prunes else self._pruned(name, bits, start)

    def readinto(self, name: str, offset: int, out: memoryview) -> None:
        """Bytes of the tensor from `offset` on."""
        if name not in self._prunes:
            self._source.readinto(name, offset, out)
            return
        info = self.tensors[name]
        row = prod(info.shape[1:]) * bits_dtype(info.dtype).itemsize
        start, stop = offset // row, -(-(offset + len(out)) // row)
        data = np.ascontiguousarray(self.read_rows(name, start, stop)).reshape(-1).view(np.uint8)
        out[:] = data[offset - start * row :][: len(out)].data

    def _pruned(self, name: str, bits: Array, start: int) -> Array:
        info, prune = self.tensors[name], self._prunes[name]
        values = None
        if prune.needs_base:
            assert self._base is not None
            found = self._base.read_rows(name, start, start + len(bits))
            values = to_float64(found, self._base.tensors[name].dtype)
        return prune.apply(bits, info.dtype, info.shape, start, values)
