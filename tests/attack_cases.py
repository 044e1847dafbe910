"""Known cases for attacks: a toy fine-tune, its base, another expert, and locks of it in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

import toy
from unmergeable.groups import Dense, Element, Monomial
from unmergeable.match import Match, match_spec
from unmergeable.methods import Context, method
from unmergeable.transform import apply_floats, compile_tensor

State = dict[str, np.ndarray]
SPREAD = 0.15  # of every fine-tune around the base, relative to its weights


class Weights:
    """Tensors in memory, as methods read them."""

    def __init__(self, values: State) -> None:
        self.values = values

    def dtype(self, name: str) -> str:
        return "F64"

    def bits(self, name: str) -> np.ndarray:
        return self.values[name].view(np.uint64)

    def floats(self, name: str) -> np.ndarray:
        return self.values[name]


def models() -> tuple[State, State, State]:
    """A base, and two fine-tunes of it."""
    base = toy.tensors(0)
    random = np.random.default_rng(7)
    made = [{k: v + SPREAD * random.standard_normal(v.shape) for k, v in base.items()} for _ in range(2)]
    return base, made[0], made[1]


def toy_match(values: State) -> Match:
    return match_spec(toy.spec(), {name: value.shape for name, value in values.items()}, toy.CONFIG)


def apply(match: Match, elements: Mapping[Any, Element], values: State) -> State:
    out = {}
    for name in values:
        plan = compile_tensor(match, elements, name)
        out[name] = apply_floats(values[plan.source], plan.steps)
    return out


def draw(
    match: Match, values: State, name: str, options: Mapping[str, Any] = {}, seed: int = 1
) -> dict[Any, Element]:
    context = Context(match, toy.key(seed), bytes(32), Weights(values), None, options)
    return dict(method(name).draw(context).elements)


def only(match: Match, elements: Mapping[Any, Element], kinds: Iterable[str]) -> dict[Any, Element]:
    """The elements at sites of these kinds."""
    wanted = set(kinds)
    return {key: element for key, element in elements.items() if match.sites[key[0]].site.kind in wanted}


def unsigned(elements: Mapping[Any, Element]) -> dict[Any, Element]:
    """The orders alone."""
    return {
        k: Monomial(e.perm, np.ones(e.perm.shape)) for k, e in elements.items() if isinstance(e, Monomial)
    }


def rotations(elements: Mapping[Any, Element]) -> dict[Any, Element]:
    """The orthogonal part of dense elements."""
    out: dict[Any, Element] = {}
    for key, element in elements.items():
        left, _, right = np.linalg.svd(element.matrix(1))
        out[key] = Dense(left @ right, left @ right)
    return out


def distance(match: Match, a: State, b: State) -> float:
    """‖a − b‖ / ‖b‖ over the tensors of all sites."""
    squares = sum(((a[name] - b[name]) ** 2).sum() for name in match.parts)
    return float(np.sqrt(squares / sum((b[name] ** 2).sum() for name in match.parts)))


def moved(a: State, b: State) -> float:
    """The largest difference of outputs, relative to the largest output."""
    first, second = toy.forward(a), toy.forward(b)
    return float(np.abs(first - second).max() / np.abs(second).max())
