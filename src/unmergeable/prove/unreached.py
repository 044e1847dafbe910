"""Weights that no input of the proof reaches: what stands beside one of them is not proven.

A class may read the keys of its attention by a second query that only another kind of input brings, such as
entities beside words. Then a change of keys and of the first query alone passes every trial, and is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from ..spec import Refusal, Site, name_regex
from .inventory import fold
from .oracle import Oracle
from .trial import GUARD

Widths = frozenset[int]


def drop_beside_unreached(
    oracles: Sequence[Oracle], sites: Sequence[Site]
) -> tuple[tuple[Site, ...], tuple[Refusal, ...]]:
    """The sites without those that have a weight of their width in their module which no input reaches.

    Biases are no such weights: that of the keys moves no softmax, and every other has a weight beside it.
    """
    shapes = {name: array.shape for name, array in oracles[0].tensors.items()}
    acted = {name for site in sites for name in _tensors(site, shapes)}
    asleep = {
        pattern: names
        for pattern, names in fold(shapes, shapes).items()
        if acted.isdisjoint(names)
        and pattern.rpartition(".")[2] != "bias"
        and all(_is_asleep(oracle, pattern) for oracle in oracles)
    }
    kept, refused = [], []
    for site in sites:
        scope, widths = _scope(site), _widths(site, shapes)
        beside = next(
            (
                pattern
                for pattern, names in asleep.items()
                if pattern.startswith(scope) and widths & set(shapes[names[0]])
            ),
            None,
        )
        if beside is None:
            kept.append(site)
        else:
            refused.append(Refusal(site.name, f"no input of the proof reaches {beside}, which may take part"))
    return tuple(kept), tuple(refused)


def _is_asleep(oracle: Oracle, pattern: str) -> bool:
    """Whether other numbers in all tensors of a pattern leave the output as it is."""
    rng = np.random.default_rng(3)
    changes = {
        name: array + (0.1 + 0.5 * np.abs(array).mean()) * rng.standard_normal(array.shape)
        for name, array in oracle.tensors.items()
        if array.size and name_regex(pattern).fullmatch(name)
    }
    return oracle.error(changes) < GUARD if changes else True


def _tensors(site: Site, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    regexes = [name_regex(slot.tensor) for slot in site.slots]
    return [name for name in shapes if any(regex.fullmatch(name) for regex in regexes)]


def _scope(site: Site) -> str:
    """The module that holds all tensors of a site, as the beginning of their names."""
    modules = [re.split(r"(?<=\.)", slot.tensor)[:-1] for slot in site.slots]
    common = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return "".join(common)


def _widths(site: Site, shapes: Mapping[str, tuple[int, ...]]) -> Widths:
    """The sizes of the axes that the site's elements act on."""
    found = set()
    for slot in site.slots:
        axis = slot.axis_of(site.acts)
        name = next(iter(filter(name_regex(slot.tensor).fullmatch, shapes)), None)
        if axis is not None and name is not None:
            found.add(shapes[name][axis])
    return frozenset(found)
