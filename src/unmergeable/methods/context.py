"""What a method may look at, what it returns, and the loop that draws for every instance of every site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ClaimError, InputError
from ..groups import Element, Monomial, Stream
from ..match import Instance, Match, MatchedSite

MIN_MOVE = 0.5  # a site counts as acted on when its weights move by this part of their norm
ATTEMPTS = 64
CONDITION = 10.0  # cap on the condition number of dense elements


class StreamSource(Protocol):
    """The part of `keys.Key` that methods need."""

    def stream(self, salt: bytes, label: str) -> Stream: ...


class Tensors(Protocol):
    """The part of a checkpoint that data-dependent methods read."""

    def dtype(self, name: str) -> str: ...
    def bits(self, name: str) -> NDArray[Any]: ...
    def floats(self, name: str) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Context:
    """Everything a method draws from.

    `recorded` is what an earlier draw of this lock returned (choices that depended on the data); with it, a
    method draws the same elements without looking at any tensor.
    """

    match: Match
    key: StreamSource
    salt: bytes
    tensors: Tensors | None = None
    base: Tensors | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    recorded: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Drawn:
    """Elements by (number of the site, instance), and the choices to record that depended on the data.

    `recorded` is JSON-ready, and so is `report`: facts for the user, such as condition numbers, that are not
    needed to unlock.

    `prune` (params only) has a `prune.Prune` for each source tensor that is thinned out before elements act.
    Nothing that streams tensors needs to know: a lock reads `prune.PrunedSource(source, drawn.prune, base)`
    in the source's place, and keeps what that changes by `sidecar.write_sidecar` if the owner asked for it;
    an unlock writes its files as if nothing had been pruned, then `sidecar.Sidecar(path, salt).put_back(
    folder, shards, drawn.prune)` puts the originals into them, or it says that zeros (the base's weights)
    stay.
    """

    elements: Mapping[tuple[int, Instance], Element]
    recorded: Mapping[str, Any] = field(default_factory=dict)
    prune: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


Draw = Callable[[MatchedSite, Stream, int], Element | None]


def draw_sites(context: Context, method: str, draw: Draw) -> dict[tuple[int, Instance], Element]:
    """Draw for every instance: `draw(site, stream, batch)` gives a batch of elements, or None to leave it.

    A draw that moves random weights by less than half of their norm is drawn again from the next stream.

    Raises:
        InputError: two places of one name, in a new lock. Locks that have them are undone as they were made.
        ClaimError: no draw of 64 moves the site's weights far enough.
    """
    if context.recorded is None:
        _check_names(context.match)
    elements: dict[tuple[int, Instance], Element] = {}
    for number, matched in enumerate(context.match.sites):
        batch = prod(matched.batch)
        if matched.trivial:
            continue
        for instance in matched.instances:
            for attempt in range(ATTEMPTS):
                label = f"{method}|{matched.label(instance)}|{attempt}"
                element = draw(matched, context.key.stream(context.salt, label), batch)
                if element is None:
                    break
                if moved(element) >= MIN_MOVE:
                    elements[number, instance] = element
                    break
            else:
                raise ClaimError(
                    "the group is too small to hide anything",
                    where=matched.label(instance),
                    expected=f"an element that moves weights by {MIN_MOVE:.0%} of their norm",
                    got=f"none in {ATTEMPTS} draws of '{matched.site.group}' on {matched.acted}",
                )
    return elements


def _check_names(match: Match) -> None:
    """Streams and recorded choices go by the names of places: two of one name would share both."""
    seen: set[str] = set()
    for matched in match.sites:
        for label in map(matched.label, matched.instances):
            if label in seen:
                raise InputError(
                    "two sites of the spec have one name",
                    where=label,
                    expected="a name for each",
                    hint="where a release before 0.2 has locked it, unlock it and lock it again",
                )
            seen.add(label)


def moved(element: Element) -> float:
    """The smaller movement of the two sides, A and A⁻ᵀ."""
    if isinstance(element, Monomial):
        return min(element.moved(), Monomial(element.perm, 1.0 / element.scale).moved())
    return min(
        element.moved(),
        float(
            np.sqrt(((element.contragredient - np.eye(element.n)) ** 2).sum() / (element.batch * element.n))
        ),
    )
