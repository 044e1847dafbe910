"""What stock loaders need besides the sites: they are asked, one pattern of names after another.

A checkpoint that lacks such a tensor loads all the same, with random numbers in its place: it is no model, and
nothing about its function can be kept. Where the tensor has to stand (in every layer, in every layer of its kind)
is read off all miniatures.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..spec import Rest, name_regex
from .inventory import take_stock
from .sizes import Sizes

TIE = "tie_word_embeddings"


def find_rest(
    family: Sequence[Any], layout: str, untouched: Iterable[str], sites: Iterable[str], ignored: Iterable[str]
) -> dict[str, Rest]:
    """What is known of every untouched pattern of a layout of names.

    Args:
        family: the miniatures of one class.
        sites: the patterns of tensors that sites act on.
        ignored: regular expressions of names that loaders drop.
    """
    patterns, dropped = list(untouched), [re.compile(text) for text in ignored]
    stored = [list(member.layouts()[layout]) for member in family]
    needed, tied = _asked(family[0], layout, patterns)
    spare = _spare(family[0], layout, patterns)
    widths = _widths(family, layout)
    out = {}
    for name in patterns:
        if any(regex.search(name) for regex in dropped):
            continue
        beside = _beside(name, [*sites, *patterns], stored) if name in needed else None
        if name in spare and beside is not None:
            beside = f"{name.rpartition('.')[0]}."  # all of the module or nothing
        twin, always = tied.get(name, ("", False))
        out[name] = Rest(beside, twin, always, widths.get(name) or widths.get(twin) or {})
    return out


def _asked(member: Any, layout: str, patterns: Sequence[str]) -> tuple[set[str], dict[str, tuple[str, bool]]]:
    """Patterns that loaders miss in a model that ties nothing, and {pattern: (that of its twin, always tied)}."""
    free, tying = _with_flag(member, False), _with_flag(member, True)
    names, kept = _stored(free, layout), _ties(free)
    ties = {**_ties(member.model), **_ties(tying), **kept}
    also = set(_stored(tying, layout))
    strays, unseen = (
        [n for n in names if n not in also and n not in ties],
        [n for n in ties if n not in names],
    )
    if len(strays) == len(unseen) == 1:  # one and the same, under its names on disk and in memory
        ties[strays[0]] = ties[unseen[0]]
    pattern_of = {
        name: pattern
        for pattern in patterns
        for name in {*ties, *ties.values()}
        if name_regex(pattern).fullmatch(name)
    }
    tied = {
        pattern_of[name]: (pattern_of[twin], name in kept)
        for name, twin in ties.items()
        if name in pattern_of and twin in pattern_of
    }
    usual, needed = _missing(free, names, ()), set()
    for pattern in patterns:
        mine = [name for name in names if name_regex(pattern).fullmatch(name)]
        # what a tying model does not store, and no tie explains, has another name in memory: nothing is known of it
        explained = pattern in tied or also.issuperset(mine)
        if mine and explained and _missing(free, names, mine) - usual:
            needed.add(pattern)
    return needed, tied


def _with_flag(member: Any, tie: bool) -> Any:
    """The miniature with its embeddings tied or not, as the flag says; itself where there is no such model."""
    from .miniature import _instantiate

    try:
        return _instantiate(type(member.model), _with_tie(copy.deepcopy(member.given), tie), "eager")
    except Exception:  # a class may refuse any value in any way
        return member.model


def _with_tie(config: dict[str, Any], tie: bool) -> dict[str, Any]:
    for value in config.values():
        if isinstance(value, dict) and (TIE in value or "hidden_size" in value or "vocab_size" in value):
            _with_tie(value, tie)
    config[TIE] = tie
    return config


def _ties(model: Any) -> dict[str, str]:
    found = getattr(model, "all_tied_weights_keys", None)
    return dict(found) if isinstance(found, Mapping) else {}


def _stored(model: Any, layout: str) -> dict[str, Any]:
    from .miniature import _saved

    return _saved(model, original=layout == "disk")[0]


def _missing(model: Any, stored: Mapping[str, Any], without: Iterable[str]) -> set[str]:
    """What a loader reports as missing from a checkpoint without some tensors."""
    import torch

    gone = set(without)
    state = {name: tensor.clone() for name, tensor in stored.items() if name not in gone}
    try:
        _, report = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict=state,
            dtype=torch.float64,
            output_loading_info=True,
        )
    except Exception:  # a converter may fail without its tensor, in any way: it needed it
        return {"everything"}
    return {str(name) for name in report["missing_keys"]}


def _spare(member: Any, layout: str, patterns: Sequence[str]) -> set[str]:
    """Patterns that a class leaves out on request (`add_pooling_layer=False`): checkpoints without them are usual."""
    cls = type(member.model)
    options = [
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is True
    ]
    usual, out = set(member.layouts()[layout]), set()
    for option in options:
        try:
            small = cls._from_config(copy.deepcopy(member.model.config), **{option: False})
            gone = usual - set(_stored(small, layout))
        except Exception:  # whatever the option is, it leaves nothing out
            continue
        out |= {pattern for pattern in patterns if any(map(name_regex(pattern).fullmatch, gone))}
    return out


def _beside(name: str, patterns: Sequence[str], stored: Sequence[Sequence[str]]) -> str:
    """The beginning of names that stand in the very layers in which this pattern does; "" for anywhere."""
    if "{" not in name:
        return ""
    mine = [_places(name, names) for names in stored]
    head, _, tail = name.rpartition("}")
    parts = tail.split(".")  # the first one is empty: the number ends with a dot
    starts = [f"{head}}}" + ".".join(parts[: k + 1]) + "." for k in range(len(parts) - 1)]
    block = starts[1] if len(starts) > 1 else starts[0] if starts else name
    siblings = [other for other in patterns if other != name and other.startswith(block)]
    for start in [*starts[:-1], *siblings, *starts[-1:]]:
        if [_places(start, names) for names in stored] == mine:
            return start
    return ""


def _places(start: str, names: Iterable[str]) -> set[tuple[tuple[str, int], ...]]:
    """The numbers in the names that begin like this."""
    found = map(name_regex(start).match, names)
    return {tuple(sorted((dim, int(n)) for dim, n in bound.groupdict().items())) for bound in found if bound}


def _widths(family: Sequence[Any], layout: str) -> dict[str, dict[int, str]]:
    """{pattern: {axis: the fields that give its size in every miniature}}; only where sizes differ between them."""
    sizes = Sizes([member.config for member in family])
    stored = [{name: tuple(t.shape) for name, t in member.layouts()[layout].items()} for member in family]
    out: dict[str, dict[int, str]] = {}
    for pattern in take_stock(stored):
        for axis, values in enumerate(pattern.axes):
            fields = [path for path, given in sizes.fields.items() if given == values]
            if len(set(values)) > 1 and fields:
                out.setdefault(pattern.name, {})[axis] = " | ".join(sorted(fields))
    return out
