"""What tensors a model class has: names folded to patterns, and each pattern's shape in several miniatures.

Several shapes of one class tell sizes apart that coincide in one: an axis is described by all of its sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..arithmetic import lookup
from ..fields import PER_LAYER
from ..spec import bound, fill
from .stages import staged

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pattern:
    """Tensors of one kind: `name` has `{l}` and `{e}` for numbers; `axes[k]` holds its size in every miniature."""

    name: str
    axes: tuple[tuple[int, ...], ...]
    count: int

    @property
    def module(self) -> str:
        """The module that holds the tensor, for a parameter such as `weight`."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def fold(names: Iterable[str], shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """Names by pattern. The first number of a name is `{l}`; a later one is `{e}` if it repeats a tensor.

    A later number that never repeats one (`mlp.0`, `mlp.2`, or one sub-layer of a block) is part of the name, and so
    is that of a stage, for each is as wide as it likes.
    """
    wild: dict[str, list[str]] = {}
    names = list(names)
    stages = staged(names, shapes)
    for name in names:
        wild.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "#", name), []).append(name)
    out: dict[str, list[str]] = {}
    for members in wild.values():
        numbers = [_numbers(name) for name in members]
        depth = len(numbers[0])
        repeats = [
            k > 0 and len({n[k] for n in numbers}) > 1 and len({shapes[name] for name in members}) == 1
            for k in range(depth)
        ]
        if depth > 1 and any(map(members[0].startswith, stages)):
            repeats[:2] = False, _repeats_within(members, numbers, shapes)
        elif depth:
            repeats[0] = True
        for name in members:
            out.setdefault(_wildcards(name, repeats), []).append(name)
    return out


def _repeats_within(
    members: Sequence[str], numbers: Sequence[Sequence[int]], shapes: Mapping[str, Shape]
) -> bool:
    """Whether second numbers tell tensors of one shape apart, wherever all other numbers are the same."""
    found: dict[tuple[int, ...], set[Shape]] = {}
    for name, (first, _, *rest) in zip(members, numbers, strict=True):
        found.setdefault((first, *rest), set()).add(shapes[name])
    return len({second for _, second, *_ in numbers}) > 1 and all(len(each) == 1 for each in found.values())


def take_stock(miniatures: Sequence[Mapping[str, Shape]]) -> list[Pattern]:
    """The patterns of miniatures of one class, in the order of the first one's tensors.

    Patterns that one of them lacks, or whose tensors differ in shape, are left out: nothing is proposed for
    them.
    """
    folded = [fold(shapes, shapes) for shapes in miniatures]
    patterns = []
    for name, members in folded[0].items():
        if not all(name in others for others in folded):
            continue
        found = [{shapes[m] for m in others[name]} for shapes, others in zip(miniatures, folded, strict=True)]
        if any(len(shapes) != 1 for shapes in found):
            continue
        single = [shapes.pop() for shapes in found]
        if len({len(shape) for shape in single}) == 1:
            patterns.append(Pattern(name, tuple(zip(*single, strict=True)), len(members)))
    return patterns


def take_uneven(miniatures: Sequence[Mapping[str, Shape]]) -> list[Pattern]:
    """The patterns of which layers of one stack differ in shape, that `take_stock` leaves out.

    Their axes have a size for every kind of layer of every miniature: tensors that agree in it do so in every layer.
    A pattern that some kind of layer lacks is left out here too.
    """
    folded = [fold(shapes, shapes) for shapes in miniatures]
    stacks: dict[str, list[str]] = {}
    for name in folded[0]:
        uneven = any(
            len({shapes[member] for member in found.get(name, ())}) > 1
            for shapes, found in zip(miniatures, folded, strict=True)
        )
        if uneven and name.count("{") == 1 and "{l}" in name and all(name in found for found in folded):
            stacks.setdefault(name.partition("{l}")[0], []).append(name)
    patterns = []
    for names in stacks.values():
        columns: list[tuple[Shape | None, ...]] = []
        for shapes in miniatures:
            kinds: dict[tuple[Shape | None, ...], None] = {}
            for layer in sorted({member for name in names for member in _layers(name, shapes)}):
                kinds[tuple(shapes.get(fill(name, {"l": layer})) for name in names)] = None
            columns += kinds
        for name, single in zip(names, zip(*columns, strict=True), strict=True):
            whole = [shape for shape in single if shape is not None]
            if len(whole) == len(single) and len({len(shape) for shape in whole}) == 1:
                count = sum(1 for _ in _layers(name, miniatures[0]))
                patterns.append(Pattern(name, tuple(zip(*whole, strict=True)), count))
    return patterns


def take_kinds(
    miniatures: Sequence[Mapping[str, Shape]], configs: Sequence[Mapping[str, Any]], uneven: Sequence[Pattern]
) -> dict[str, list[Pattern]]:
    """Of stacks with layers of several shapes the patterns of every kind of layer, as `Site.only` names the kind.

    A kind is an entry of a list with one a layer.

    Args:
        miniatures: shapes by name. configs: theirs. uneven: of `take_uneven`.
    """
    found: dict[str, list[Pattern]] = {}
    for stack in dict.fromkeys(pattern.name.partition("{l}")[0] for pattern in uneven):
        layers = [{name: _layer(stack, name) for name in each} for each in miniatures]
        depths = [1 + max(number for number in each.values() if number is not None) for each in layers]
        for path in _lists(configs[0]):
            lists = [lookup(config, path) for config in configs]
            whole = all(isinstance(one, list) and len(one) == n for one, n in zip(lists, depths, strict=True))
            for entry in sorted(set.intersection(*(set(map(str, one)) for one in lists))) if whole else ():
                shapes = [
                    {
                        name: each[name]
                        for name, n in numbers.items()
                        if n is not None and str(kinds[n]) == entry
                    }
                    for each, numbers, kinds in zip(miniatures, layers, lists, strict=True)
                ]
                found.setdefault(f"{path}={entry}", []).extend(take_stock(shapes))
    return found


def _lists(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Where a config has lists with one entry a layer."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _lists(value, f"{path}{name}.")
        elif name in PER_LAYER and isinstance(value, list):
            yield path + name


def _layer(stack: str, name: str) -> int | None:
    """The number behind the beginning of a name; None for names that do not begin so."""
    number = name.removeprefix(stack).partition(".")[0]
    return int(number) if name.startswith(stack) and number.isdecimal() else None


def _layers(name: str, shapes: Mapping[str, Shape]) -> Iterator[int]:
    """The numbers that a pattern's `{l}` has."""
    return (dims["l"] for _, dims in bound(name, shapes))


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _wildcards(name: str, repeats: list[bool]) -> str:
    parts, seen = [], 0
    letters = iter("leuvw")
    for part in name.split("."):
        if part.isdigit():
            parts.append("{" + next(letters) + "}" if repeats[seen] else part)
            seen += 1
        else:
            parts.append(part)
    return ".".join(parts)
