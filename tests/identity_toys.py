"""Weights for the small specs, locked and compared in memory."""

from __future__ import annotations

from math import prod

import numpy as np

import toy
from identity_specs import CASES, SIZES
from unmergeable.checkpoint import TensorInfo, to_bits, to_float64
from unmergeable.engine import HALF_ULP
from unmergeable.identities import components
from unmergeable.match import Match, match_spec
from unmergeable.methods import Context, method
from unmergeable.rounding import Finding
from unmergeable.sketch import Noise, sketch_tensor
from unmergeable.transform import apply_bits, apply_floats, compile_tensor

Values = dict[str, np.ndarray]
ITEM = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


class Memory:
    """Tensors in memory that are read like a checkpoint's."""

    def __init__(self, values: Values, dtype: str = "F64") -> None:
        self.bits = {name: to_bits(value, dtype) for name, value in values.items()}
        self.tensors = {
            name: TensorInfo(name, dtype, value.shape, "memory", 0, value.size * ITEM[dtype])
            for name, value in values.items()
        }

    def dtype(self, name: str) -> str:
        return self.tensors[name].dtype

    def floats(self, name: str) -> np.ndarray:
        return to_float64(self.bits[name], self.tensors[name].dtype)

    def readinto(self, name: str, offset: int, out: memoryview) -> None:
        out[:] = self.bits[name].tobytes()[offset : offset + len(out)]


class Tensors:
    """What data-dependent methods read."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def dtype(self, name: str) -> str:
        return self.memory.dtype(name)

    def bits(self, name: str) -> np.ndarray:
        return self.memory.bits[name]

    def floats(self, name: str) -> np.ndarray:
        return self.memory.floats(name)


def made(case: str, seed: int = 0, dtype: str = "F64") -> tuple[Match, Values]:
    spec, shapes = CASES[case]()
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    values = {name: to_float64(to_bits(value, dtype), dtype) for name, value in values.items()}
    return match_spec(spec, shapes, SIZES), values


def locked(
    match: Match, values: Values, name: str, dtype: str = "F64", *, scales: bool = False, salt: int = 0
) -> Values:
    memory = Memory(values, dtype)
    options = {"scales": True} if scales else {}
    context = Context(match, toy.key(), bytes([salt] * 32), Tensors(memory), options=options)
    drawn = method(name).draw(context)
    out = {}
    for tensor in values:
        plan = compile_tensor(match, drawn.elements, tensor)
        if plan.exact:
            bits = apply_bits(memory.bits[plan.source], dtype, plan.steps)
        else:
            bits = to_bits(apply_floats(values[plan.source], plan.steps), dtype)
        out[tensor] = to_float64(bits, dtype)
    return out


def compare(
    match: Match, before: Values, after: Values, dtype: str = "F64", *, dense: bool = False
) -> list[Finding]:
    found = []
    for part in components(match):
        sketches = []
        for values in (before, after):
            memory = Memory({name: values[name] for name in part.names}, dtype)
            sketches.append(
                {
                    name: sketch_tensor(memory, memory.tensors[name], match.kept_axes(name), norms=dense)
                    for name in part.names
                }
            )
        noise = None
        if dense:
            noise = {
                name: Noise(
                    HALF_ULP[dtype], 0.0, before[name].size // prod(sketches[0][name].values.shape[:-1])
                )
                for name in part.names
            }
        found += part.compare(sketches[0], sketches[1], noise)
    return found


def held(findings: list[Finding]) -> bool:
    return all(finding.held for finding in findings)


def swapped(match: Match, values: Values, number: int, slot_number: int) -> Values:
    """The first two heads (experts, rows, …) of a site exchanged in one slot alone."""
    matched = match.sites[number]
    found = matched.site.slots[slot_number]
    out = dict(values)
    axis = found.axis_of(matched.site.acts)
    for name, parts in match.parts.items():
        if not any(part.slot is found for part in parts):
            continue
        if axis is None:
            part = next(part for part in parts if part.slot is found)
            other = {0: 1, 1: 0}.get(part.dims[matched.site.acts], part.dims[matched.site.acts])
            out[name] = values[match.name(found.tensor, {**part.dims, matched.site.acts: other})]
            continue
        view = found.axes[axis].view(matched.sizes)
        grid = np.moveaxis(view.positions(), view.names.index(matched.site.acts), 0)
        order = np.arange(view.total)
        order[grid[0]], order[grid[1]] = grid[1].copy(), grid[0].copy()
        out[name] = np.take(values[name], order, axis=axis)
    return out
