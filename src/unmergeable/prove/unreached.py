"""Weights that no input of the proof reaches: what acts on one, or stands beside one, is not proven.

A class may read the keys of its attention by a second query that only another kind of input brings, such as
entities beside words. Then a change of keys and of the first query alone passes every trial, and is wrong. So
does another order of heads where long inputs choose keys for every head, or where a method of the class reads
attention maps by the heads' numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod

import numpy as np

from ..arithmetic import evaluate_size
from ..spec import AS_FOUND, Refusal, Site, name_regex
from .inventory import fold
from .oracle import Oracle
from .trial import GUARD

Values = tuple[int, ...]  # one size in every miniature
Axes = Mapping[str, tuple[Values, ...]]

_ATTENTION = frozenset(["qk", "vo", "heads"])


def drop_beside_unreached(
    oracles: Sequence[Oracle], sites: Sequence[Site]
) -> tuple[tuple[Site, ...], tuple[Refusal, ...]]:
    """The sites without those that a weight which no input reaches may belong to.

    That is a weight that the site acts on, for an attention any weight of its module, for others one of their
    width in theirs, and for an order of heads one with an entry a head anywhere.

    Biases are no such weights: that of the keys moves no softmax, and every other has a weight beside it.
    """
    axes = _axes(oracles)
    known: dict[str, bool] = {}

    def asleep(pattern: str) -> bool:
        if pattern not in known:
            known[pattern] = all(_is_asleep(oracle, pattern) for oracle in oracles)
        return known[pattern]

    kept, refused = [], []
    for site in sites:
        own = {slot.tensor for slot in site.slots if not _is_bias(slot.tensor, axes)}
        maybe = own | _beside(site, axes, oracles)
        beside = next((pattern for pattern in axes if pattern in maybe and asleep(pattern)), None)
        if beside is None:
            kept.append(site)
        else:
            part = "which it acts on" if beside in own else "which may take part"
            refused.append(Refusal(site.name, f"no input of the proof reaches {beside}, {part}"))
    return tuple(kept), tuple(refused)


def _beside(site: Site, axes: Axes, oracles: Sequence[Oracle]) -> set[str]:
    """Patterns that may belong to a site: by their place in an attention, else by their sizes."""
    scope, widths, heads = _scope(site), _widths(site, axes, oracles), _head_counts(site, axes, oracles)
    found = set()
    for pattern, sizes in axes.items():
        inside = pattern.startswith(scope) and not _is_bias(pattern, axes)
        # kernels have small axes by nature: a table of heads is no kernel
        if (len(sizes) <= 2 and heads & set(sizes)) or (
            inside and (site.kind in _ATTENTION or widths & set(sizes))
        ):
            found.add(pattern)
    return found


def _is_bias(pattern: str, axes: Axes) -> bool:
    leaf = pattern.rpartition(".")[2]
    return leaf == "bias" or (leaf.endswith("bias") and len(axes.get(pattern, ())) == 1)


def _is_asleep(oracle: Oracle, pattern: str) -> bool:
    """Whether other numbers in a pattern's tensors of some layer leave the output as it is."""
    layers: dict[str, list[str]] = {}
    for name, array in oracle.tensors.items():
        bound = name_regex(pattern).fullmatch(name) if array.size else None
        if bound is not None:
            layers.setdefault(bound.groupdict().get("l", ""), []).append(name)
    return not layers or any(_moves_nothing(oracle, names) for names in layers.values())


def _moves_nothing(oracle: Oracle, names: Iterable[str]) -> bool:
    rng = np.random.default_rng(3)
    changes = {}
    for name in names:
        array = oracle.tensors[name]
        changes[name] = array + (0.1 + 0.5 * np.abs(array).mean()) * rng.standard_normal(array.shape)
    return oracle.error(changes, limit=GUARD) < GUARD


def _axes(oracles: Sequence[Oracle]) -> dict[str, tuple[Values, ...]]:
    """{pattern: its axes, each as its size in every miniature}; a miniature without it has those of the first."""
    first = {name: array.shape for name, array in oracles[0].tensors.items()}
    found = {}
    for pattern, names in fold(first, first).items():
        regex, shapes = name_regex(pattern), [first[names[0]]]
        for oracle in oracles[1:]:
            name = next(filter(regex.fullmatch, oracle.tensors), None)
            same = name is not None and oracle.tensors[name].ndim == len(shapes[0])
            shapes.append(oracle.tensors[name].shape if name is not None and same else shapes[0])
        found[pattern] = tuple(zip(*shapes, strict=True))
    return found


def _scope(site: Site) -> str:
    """The module that holds all tensors of a site, as the beginning of their names."""
    modules = [re.split(r"(?<=\.)", slot.tensor)[:-1] for slot in site.slots]
    common = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return "".join(common)


def _widths(site: Site, axes: Axes, oracles: Sequence[Oracle]) -> set[Values]:
    """The sizes of the axes that the site's elements act on, and of what they permute or mix."""
    found = set()
    for slot in site.slots:
        axis = slot.axis_of(site.acts)
        if axis is not None and slot.tensor in axes:
            found.add(axes[slot.tensor][axis])
    if AS_FOUND in site.sizes.values():
        return found
    pairs = ["a"] if site.acts == "c" else []  # all pairs of a head beside the two of a pair
    return found | {_product(site, [site.acts, *pairs], oracles)}


def _head_counts(site: Site, axes: Axes, oracles: Sequence[Oracle]) -> set[Values]:
    """How many heads there are, in a layer and in all, where a site changes their order."""
    if site.kind != "heads":
        return set()
    count = _product(site, ["g", "r"], oracles)
    layers = tuple(
        len({name for name in oracle.tensors if name_regex(site.slots[0].tensor).fullmatch(name)})
        for oracle in oracles
    )
    every = tuple(n * each for n, each in zip(count, layers, strict=True))
    return {count, every} if min(count) > 1 else set()


def _product(site: Site, dims: Iterable[str], oracles: Sequence[Oracle]) -> Values:
    texts = [site.sizes[dim] for dim in dims if dim in site.sizes]
    return tuple(
        prod(evaluate_size(text, oracle.miniature.config, site.name) for text in texts) for oracle in oracles
    )
