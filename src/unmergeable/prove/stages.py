"""Models of several stages, each of a width and a number of heads of its own, as Swin and SegFormer have them.

Their configurations give both as lists, an entry a stage, and their tensors a number of the stage before that of the
layer: `encoder.layers.2.blocks.0.attention…`. A stage has sites of its own; how many stages there are, and how deep
each is, is structure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import gcd
from typing import Any

from unmergeable.fields import SIZES, by_stage

Config = dict[str, Any]

_HEAD_DIM, _TIMES, _WINDOW = (12, 10), (2, 3), 2


def shrink(node: Config, real: Mapping[str, Any], shape: int) -> bool:
    """Resize the lists of a configuration in place; False where it has no heads by stage.

    Numbers of heads keep their proportions, so that heads are as wide in all stages as they are in the real model.
    """
    heads = [name for name, role in _lists(real) if role == "heads"]
    if not heads:
        return False
    for name in heads:
        least = gcd(*real[name])
        node[name] = [_TIMES[shape] * count // least for count in real[name]]
    counts = node[heads[0]]
    lists = [name for name, role in _lists(real) if role == "width"]
    for name in lists:
        node[name] = [count * _HEAD_DIM[shape] for count in counts]
    if not lists:
        # One width, the first stage's, which every further one doubles; the last one's may be written beside it.
        widths = {name: real[name] for name in real if SIZES.get(name) == "width" and type(real[name]) is int}
        for name, width in widths.items():
            node[name] = counts[0] * _HEAD_DIM[shape] * (width // min(widths.values()))
    for name, value in real.items():
        if SIZES.get(name) == "window" and isinstance(value, int):
            node[name] = min(value, _WINDOW)  # of a small image too there is more than one
    return True


def side(config: Mapping[str, Any]) -> int:
    """Of an image in pixels, where the configuration does not say: keys that stages thin out must not be one."""
    return 96 if any(role == "heads" for _, role in _lists(config)) else 32


def patches(node: Mapping[str, Any], otherwise: int) -> int:
    """How many patches a small image has on a side: the last stage, which halved them again and again, has a window."""
    stages = [len(value) for name, value in node.items() if SIZES.get(name) == "heads" and by_stage(value)]
    windows = [
        value for name, value in node.items() if SIZES.get(name) == "window" and isinstance(value, int)
    ]
    return max(windows) * 2 ** (stages[0] - 1) if stages and windows else otherwise


def _lists(real: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Fields that give a size for every stage, with their roles."""
    for name, value in real.items():
        if name in SIZES and by_stage(value):
            yield name, SIZES[name]


def staged(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The stacks of stages, each as what stands before its first number.

    A tensor there has a shape that the stage decides, and further numbers that repeat it within a stage.
    """
    found: dict[tuple[str, ...], dict[str, list[tuple[int, ...]]]] = {}
    for name in names:
        parts = re.split(r"(?:(?<=\.)|^)(\d+)(?=\.)", name, maxsplit=2)
        if len(parts) == 5:
            stack, stage, *layer = parts
            kind = stack, layer[0], layer[2]
            found.setdefault(kind, {}).setdefault(stage, []).append(tuple(shapes[name]))
    return {
        stack
        for (stack, *_), by_stage in found.items()
        if any(len(each) > 1 for each in by_stage.values())
        and all(len(set(each)) == 1 for each in by_stage.values())
        and len({each[0] for each in by_stage.values()}) > 1
    }
