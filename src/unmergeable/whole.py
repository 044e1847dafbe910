"""Whether a checkpoint is whole: the tensors that no site acts on are there too, and as wide as the config says.

A stock loader draws what is missing at random and refuses what has another shape. So the function of such a
checkpoint is not known, and "the same function" would be said of nothing.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from .arithmetic import evaluate_size
from .errors import InputError
from .fields import SIZES
from .spec import Rest, Spec, name_regex

Shapes = Mapping[str, tuple[int, ...]]
Places = set[tuple[tuple[str, int], ...]]

_TIE = "tie_word_embeddings"
_RENAMED = (
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)


def lacking(
    spec: Spec, shapes: Shapes, parts: Container[str], config: Mapping[str, Any], *, bare: bool
) -> list[str]:
    """The tensors that no site acts on and that are missing.

    Args:
        shapes: every tensor by the spec's name for it.
        parts: the names of those that sites act on.
        config: the canonical config; without one, as for the spec of a manifest, there is nothing to compare with.
        bare: whether it is a base model under its own names: then it may have no head.
    """
    if not config or not spec.rest:
        return []
    rest = {one for name in shapes if name not in parts for one in spellings(name)}
    headless = bare and not any(
        name_regex(pattern).fullmatch(name)
        for pattern in spec.untouched
        if not pattern.startswith(spec.prefix)
        for name in rest
    )
    ties, known = _ties(config), dict[str, Places]()
    every = {one for name in shapes for one in spellings(name)}
    problems = []
    for pattern, one in spec.rest.items():
        regex = name_regex(pattern)
        # Of a pattern of which a site acts on some layers alone, those of all layers.
        mine = [bound for bound in map(regex.fullmatch, every) if bound]
        if one.beside is None or (headless and not pattern.startswith(spec.prefix)):
            continue
        if one.beside not in known:
            known[one.beside] = _places(one.beside, every)
        if not mine and _stands_in(spec, pattern, rest, ties):
            continue
        have = {_place(bound.groupdict()) for bound in mine}
        problems += _gone(pattern, known[one.beside], have)
    return problems


def misshapen(spec: Spec, shapes: Shapes, parts: Container[str], config: Mapping[str, Any]) -> list[str]:
    """The tensors that no site acts on and that have another size than the config says. Arguments as above."""
    if not config:
        return []
    rest = {one: shape for name, shape in shapes.items() if name not in parts for one in spellings(name)}
    problems = []
    for pattern, one in spec.rest.items():
        for name in filter(name_regex(pattern).fullmatch, rest) if one.sizes else ():
            problems += _widths(name, rest[name], one, config)
    return problems


def spellings(name: str) -> set[str]:
    """A tensor's name, and the present one of what old checkpoints call otherwise.

    A norm's parameters were gamma and beta, those of a normed weight weight_g and weight_v: loaders read both.
    """
    present = name
    for old, new in _RENAMED:
        present = re.sub(old, new, present)
    return {name, present}


def in_block(name: str) -> bool:
    """Whether a tensor is in a numbered block: outside of these no symmetry acts."""
    return re.search(r"(^|\.)\d+\.", name) is not None


def _gone(pattern: str, wanted: Places, have: Places) -> list[str]:
    """Places that a tensor of the pattern should have, without one; the last number may be free (an expert's)."""
    gone = [place for place in sorted(wanted) if not any(set(place) <= set(other) for other in have)]
    names = [_fill(pattern, dict(place)) for place in gone]
    more = f" and {len(names) - 1} more like it" if names[1:] else ""
    return [f"missing {names[0]}{more}: loaders would draw it at random"] if names else []


def _fill(pattern: str, dims: Mapping[str, int]) -> str:
    return re.sub(r"\{(\w+)\}", lambda m: str(dims.get(m.group(1), m.group())), pattern)


def _places(start: str, names: Iterable[str]) -> Places:
    if not start:
        return {()}  # always, and only once
    regex = name_regex(start)
    return {_place(bound.groupdict()) for bound in map(regex.match, names) if bound}


def _place(dims: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((dim, int(number)) for dim, number in dims.items()))


def _stands_in(spec: Spec, pattern: str, rest: Container[str], ties: bool) -> bool:
    """Whether a tied twin is there instead."""
    twins = [(one.tied, one.always) for name, one in spec.rest.items() if name == pattern]
    twins += [(name, one.always) for name, one in spec.rest.items() if one.tied == pattern]
    return any(twin and twin in rest and (always or ties) for twin, always in twins)


def _ties(config: Mapping[str, Any]) -> bool:
    """Whether a config ties embeddings, or does not say."""
    said = list(_every(config))
    return not said or any(said)


def _every(config: Mapping[str, Any]) -> Iterable[bool]:
    for name, value in config.items():
        if name == _TIE and isinstance(value, bool):
            yield value
        elif isinstance(value, Mapping):
            yield from _every(value)


def _widths(name: str, shape: tuple[int, ...], one: Rest, config: Mapping[str, Any]) -> list[str]:
    problems = []
    for axis, given in one.sizes.items():
        # As many as layers in the miniatures is chance: no tensor outside of the sites is as wide as there are layers.
        fields = [field.strip() for field in given.split("|") if not _counts_layers(field)]
        if not fields:
            continue
        try:
            wanted = [evaluate_size(field, config, name) for field in fields]
        except InputError:
            continue  # a field that the class works out by itself: what it comes to is not known here
        got = shape[axis] if axis < len(shape) else None
        if got not in wanted:
            said = " | ".join(fields)
            problems.append(f"{name}: axis {axis} is '{said}' = {wanted[0]} by the config, got {got}")
    return problems


def _counts_layers(field: str) -> bool:
    return SIZES.get(field.strip().rpartition(".")[2]) == "layers"
