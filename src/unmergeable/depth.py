"""Whether all layers of a checkpoint are there, and as many of them without tensors of their own as the config says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .fields import SIZES
from .spec import Spec, bound
from .whole import Shapes


def gaps(spec: Spec, shapes: Shapes, config: Mapping[str, Any]) -> list[str]:
    """Layers that are not there: of every stack all numbers from 0, and as many as the config says somewhere."""
    stacks = {
        slot.tensor.partition("{l}")[0] for site in spec.sites for slot in site.slots if "{l}" in slot.tensor
    }
    if not _says_layers(config):
        return []
    names, counts, found = counted(spec, shapes), _numbers(config), list[str]()
    for stack in sorted(stacks):
        start = re.compile(re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(stack)) + r"(\d+)\.")
        layers, every = (
            {int(at.group(1)) for at in map(start.match, some) if at} for some in (names, shapes)
        )
        # A class may name what it does not read by a number that is a layer of another of its models.
        gone = sorted(set(range(max(layers, default=-1) + 1)) - every)
        layers |= every & set(range(max(layers, default=-1)))
        if gone:
            found.append(
                f"no tensor of {stack}{gone[0]}" + (f" and {len(gone) - 1} more layers" if gone[1:] else "")
            )
        elif layers and len(layers) not in counts:
            found.append(f"{len(layers)} layers of {stack}, a number that the config does not hold")
    return found


def takers(spec: Spec, shapes: Shapes, config: Mapping[str, Any]) -> list[str]:
    """Keys and values that some layers take from others: so many layers as a field says.

    A table that one layer keeps for all of them is no such thing.
    """
    if not _says_layers(config):
        return []
    counts, missing = set(_layers_said(config)), dict[str, int]()
    for site in (site for site in spec.sites if site.kind in ("qk", "vo")):
        layers = {
            slot.tensor: {dims["l"] for _, dims in bound(slot.tensor, shapes)}
            for slot in site.slots
            if "l" in slot.name_dims - {*site.name_dims, site.acts}
        }
        every = set[int]().union(*layers.values())
        missing |= {pattern: len(every - mine) for pattern, mine in layers.items()}
    return [
        f"{number} layers without {pattern}, a number of layers that the config does not hold"
        for pattern, number in missing.items()
        if number and number not in counts
    ]


def counted(spec: Spec, shapes: Shapes) -> list[str]:
    """The names of tensors that the spec's class reads at all."""
    return [name for name in shapes if not spec.drops(name)]


def _says_layers(config: Mapping[str, Any]) -> bool:
    return any(
        SIZES.get(name) == "layers" or (isinstance(value, Mapping) and _says_layers(value))
        for name, value in config.items()
    )


def _layers_said(config: Mapping[str, Any]) -> Iterator[int]:
    """What fields that count layers say."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _layers_said(value)
        elif SIZES.get(name, "").endswith("layers") and isinstance(value, int):
            yield value


def _numbers(config: Any) -> set[int]:
    """Every whole number of a config, and how long its lists are."""
    if isinstance(config, Mapping):
        return set().union(*map(_numbers, config.values()))
    if isinstance(config, list | tuple):
        return {len(config)}.union(*map(_numbers, config))
    return {config} if isinstance(config, int) and not isinstance(config, bool) else set()
