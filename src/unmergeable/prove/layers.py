"""Layers of a miniature: at least one of each kind, at least two of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmergeable.fields import LAYER_INDICES, OVERRIDES, PER_LAYER, PERIODS, SIZES, overrides

Config = dict[str, Any]

_MAX_LAYERS = 16


def shrink(node: Config, real: Config, by_role: Mapping[str, list[str]], shape: int) -> None:
    """Give a configuration few layers, and its lists and numbers of layers what fits them.

    Args:
        node: what is made small; its other sizes are small already.
        real: as it was.
        by_role: the names of its sizes by their role.
        shape: 0 or 1.
    """
    names = by_role.get("layers", [])
    if not names:
        return
    depth = real[names[0]]
    lists = {
        key: value
        for key, value in real.items()
        if isinstance(value, list) and len(value) == depth and (key in PER_LAYER or _repeats(value))
    }
    dense = [real[key] for key in by_role.get("dense_layers", [])]
    last = [depth - real[key] for key in by_role.get("last_layers", [])]
    others = overrides(real, depth)
    chosen = {
        key: value
        for key, value in real.items()
        if key in LAYER_INDICES and isinstance(value, list) and value
    }
    periods = [
        value
        for key, value in real.items()
        if key in PERIODS and isinstance(value, int) and value > 1 and not ("sliding" in key and lists)
    ]

    def kind(layer: int) -> str:
        return repr(
            [value[layer] for value in lists.values()]
            + [layer < first for first in dense]
            + [layer >= first for first in last]
            + [sorted(others[layer].items()) if others else None]
            + [layer in value for value in chosen.values()]
            + [(layer + 1) % period == 0 for period in periods]
        )

    kinds: dict[str, list[int]] = {}
    for layer in range(depth):
        kinds.setdefault(kind(layer), []).append(layer)
    if periods:
        # the class computes the kind from the layer's number: keep a prefix
        keep = list(range(min(depth, max(2, *(2 * p for p in periods)), _MAX_LAYERS)))
    else:
        each = 2 + shape if len(kinds) == 1 else 2
        keep = sorted(layer for layers in kinds.values() for layer in layers[:each])
        if len(kinds) > 4:
            keep = sorted(layers[0] for layers in kinds.values())[:_MAX_LAYERS]
    for key in lists:
        node[key] = [real[key][layer] for layer in keep]
    for key in chosen:
        node[key] = [i for i, layer in enumerate(keep) if layer in real[key]]
    for key in by_role.get("dense_layers", []):
        node[key] = sum(layer < real[key] for layer in keep)
    for key in by_role.get("last_layers", []):
        node[key] = sum(layer >= depth - real[key] for layer in keep)
    if others:
        small = [{k: other(k, v, node, real) for k, v in others[layer].items()} for layer in keep]
        node[OVERRIDES] = {str(layer): values for layer, values in enumerate(small) if values}
    for name in names:
        # a second stack of another depth gets the plain number
        node[name] = len(keep) if real[name] == depth else 2 + shape
    for name in by_role.get("extra_layers", []):
        node[name] = min(real[name], len(keep))


def _repeats(value: list[Any]) -> bool:
    """Whether a list is to be read as one entry a layer: strings, flags, numbers or nothing, of few kinds."""
    plain = all(entry is None or isinstance(entry, str | bool | int | float) for entry in value)
    return len(value) > 2 and plain and len({repr(entry) for entry in value}) <= _MAX_LAYERS


def other(name: str, value: Any, node: Config, real: Config) -> Any:
    """A size that some layers have in place of the model's: another small one."""
    if name not in SIZES or not isinstance(node.get(name), int) or isinstance(value, bool):
        return value
    if value == real.get(name):
        return node[name]
    return _groups(value, node[name], node) if SIZES[name] == "kv_heads" else 2 * node[name]


def _groups(value: int, usual: int, node: Config) -> int:
    """Another number of groups that the heads come in, 1 if it is 1."""
    heads = next((node[name] for name in node if SIZES.get(name) == "heads"), usual)
    found = [number for number in range(2, heads) if heads % number == 0 and number != usual]
    return found[0] if found and value > 1 else 1
