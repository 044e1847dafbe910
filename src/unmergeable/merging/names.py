"""Names in files that are no tensors of their own: tied tensors that are stored twice, and what no class reads.

A file that holds both names of a tie, as every pickle does, beside one that holds one of them, would have its second
name left as it was in a merge: loaders open that, and take the head for one of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..stock import class_tensors
from .tensors import rename_like
from .vectors import is_adapter

if TYPE_CHECKING:
    from . import State


def ties(path: str | os.PathLike[str], names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names of one and the same tensor in a checkpoint's class; those that are among `names` as they are there."""
    return [group for group in _groups(path, names) if len(group) > 1]


def leftovers(path: str | os.PathLike[str], names: Iterable[str]) -> frozenset[str]:
    """Those of `names` that a checkpoint's class does not have: buffers of earlier versions, which it computes now.

    None where nothing is known of the class.
    """
    held = list(names)
    known = {name for group in _groups(path, held) for name in group}
    return frozenset(held) - known if known else frozenset()


def _groups(path: str | os.PathLike[str], names: Iterable[str]) -> list[tuple[str, ...]]:
    groups = class_tensors(path)
    every = {name: torch.empty(0) for group in groups for name in group}
    _, renamed = rename_like(names, every)
    new = {old: new for new, old in renamed.items()}
    return [tuple(new.get(name, name) for name in group) for group in groups]


def once(
    groups: Sequence[tuple[str, ...]], states: Mapping[str, State]
) -> tuple[dict[str, State], dict[str, tuple[str, ...]]]:
    """Models with every tied tensor under one name.

    Where one of them has different numbers under two names, the tie was undone: then all of them have both names.

    Args:
        groups: as `ties` gives them. states: by model.

    Returns: the models; and by the one name, all names of its tensor.
    """
    found = {model: dict(state) for model, state in states.items()}
    single: dict[str, tuple[str, ...]] = {}
    for group in groups:
        held = [state for state in found.values() if any(name in state for name in group)]
        if len({name for state in held for name in group if name in state}) < 2:
            continue  # everybody has it once, by one name
        tied = all(_same([state[name] for name in group if name in state]) for state in held)
        for state in held:
            tensor = next(state[name] for name in group if name in state)
            for name in group:
                if tied:
                    state.pop(name, None)
                else:
                    state.setdefault(name, tensor)
            if tied:
                state[group[0]] = tensor
        if tied:
            single[group[0]] = group
    return dict(found), single


def today(
    reference: str | os.PathLike[str],
    origin: State,
    names: Mapping[str, str | os.PathLike[str]],
    states: Mapping[str, State],
) -> tuple[dict[str, torch.Tensor], dict[str, State]]:
    """Models without the buffers of earlier versions that not all of them have: their classes compute them."""
    lacking = {name for name in origin if any(name not in state for state in states.values())}
    stale = lacking & leftovers(reference, origin) if lacking else frozenset()
    kept = {name: tensor for name, tensor in origin.items() if name not in stale}
    found: dict[str, State] = {}
    for model, state in states.items():
        more = state.keys() - kept.keys()
        old = more & leftovers(names[model], state) if more and not is_adapter(names[model]) else set()
        found[model] = {name: tensor for name, tensor in state.items() if name not in old | stale}
    return kept, found


def as_stored(
    merged: State, tied: Mapping[str, tuple[str, ...]], stored: Sequence[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A merge with the names that its template's file has, and what of it is left out, in words."""
    every = [*merged, *(name for group in tied.values() for name in group)]
    held = rename_like(every, {name: torch.empty(0) for name in stored})[0].keys()
    found = dict(merged)
    for name, group in tied.items():
        tensor = found.pop(name, None)
        if tensor is not None:
            found |= dict.fromkeys([one for one in group if one in held] or [name], tensor)
    more = sorted(found.keys() - held)
    notes = (
        [f"{len(more)} tensors are not in the template and were left out: {more[0]} for one"] if more else []
    )
    return {name: tensor for name, tensor in found.items() if name in held}, notes


def _same(tensors: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(tensors[0], one) for one in tensors[1:])
