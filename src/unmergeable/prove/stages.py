"""Models of several stages, each of a width and a number of heads of its own, as Swin and SegFormer have them.

Their configurations give both as lists, an entry a stage, and their tensors a number of the stage before that of the
layer: `encoder.layers.2.blocks.0.attention…`. A stage has sites of its own; how many stages there are, and how deep
each is, is structure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from unmergeable.fields import SIZES, by_stage, proportions

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
        node[name] = [_TIMES[shape] * count for count in proportions(real[name])]
    counts = node[heads[0]]
    lists = [name for name, role in _lists(real) if role == "width"]
    for name in lists:
        node[name] = [count * _HEAD_DIM[shape] for count in counts]
    if not lists:
        # One width, the first stage's, which every further one doubles; the last one's may be written beside it.
        widths = _numbers(real, "width")
        for name, width in widths.items():
            node[name] = counts[0] * _HEAD_DIM[shape] * (width // min(widths.values()))
    for name, value in _numbers(real, "window").items():
        node[name] = min(value, _WINDOW)  # of a small image too there is more than one
    return True


def side(config: Mapping[str, Any]) -> int:
    """Of an image in pixels, where the configuration does not say: keys that stages thin out must not be one."""
    return 96 if any(role == "heads" for _, role in _lists(config)) else 32


def patches(node: Mapping[str, Any], otherwise: int) -> int:
    """How many patches a small image has on a side: the last stage, which halved them again and again, has a window."""
    stages = [len(node[name]) for name, role in _lists(node) if role == "heads"]
    windows = _numbers(node, "window").values()
    return max(windows) * 2 ** (stages[0] - 1) if stages and windows else otherwise


def _lists(real: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Fields that give a size for every stage, with their roles."""
    for name, value in real.items():
        if name in SIZES and by_stage(value):
            yield name, SIZES[name]


def _numbers(config: Mapping[str, Any], role: str) -> dict[str, int]:
    """Fields of one role that give one number for all stages."""
    return {name: value for name, value in config.items() if SIZES.get(name) == role and type(value) is int}


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
        for (stack, *_), each_stage in found.items()
        if any(len(each) > 1 for each in each_stage.values())
        and all(len(set(each)) == 1 for each in each_stage.values())
        and len({each[0] for each in each_stage.values()}) > 1
    }
