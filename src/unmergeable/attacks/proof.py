"""Known cases: locks that an alignment must undo before its failure on another one says anything.

The unprotected fine-tune is locked with a key of the audit's own, in memory, in the way that the attack claims
to undo; the attack gets the locked model and its anchor, never the fine-tune. It has solved the case when it
ends nearer to the fine-tune than half of the way between fine-tune and anchor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import open_checkpoint
from ..errors import ClaimError, InputError
from ..groups import Dense, Element, Floats, Monomial
from ..keys import Key
from ..match import Instance, Match
from ..methods import Context, method
from ..plan import Weights, find_match
from ..transform import apply_floats, compile_tensor
from . import Case, attack_named
from .files import Stored, anchor_names
from .prepare import Preparation

Elements = Mapping[tuple[int, Instance], Element]

# Of the distance between fine-tune and anchor: nearer is solved.
SOLVED = 0.5
INNER = ("qk", "vo")
OUTER = ("mlp", "heads", "experts")


@dataclass(frozen=True)
class Solved:
    """How an attack did on its known case; distances are relative to that between fine-tune and anchor.

    Attributes:
        locked, attacked: from the locked and the attacked model to the fine-tune.
        to_anchor: from the attacked model to the anchor, over that from the locked one.
    """

    case: str
    locked: float
    attacked: float
    to_anchor: float

    @property
    def holds(self) -> bool:
        """Whether the attack may be believed."""
        if self.case == "published":  # does not keep the function: all that it claims is to come nearer
            return self.to_anchor <= SOLVED
        return self.attacked <= SOLVED

    @property
    def reason(self) -> str | None:
        """Why not, in words."""
        if self.holds:
            return None
        if self.case == "published":
            return f"on a known lock it keeps {self.to_anchor:.0%} of the distance to the anchor"
        return (
            f"a known lock ({self.case}) is not undone: {self.attacked:.2f} of the distance between fine-tune "
            f"and anchor is left, {self.locked:.2f} before"
        )

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**vars(self), "holds": self.holds}


def prove(preparation: Preparation, plain: Path, anchor: Path, seed: int) -> Solved:
    """Run a preparation on its known case.

    Args:
        preparation: one with a case.
        plain: the unprotected fine-tune. anchor: what it is aligned to.
        seed: of the lock's key and of the attack.

    Raises:
        InputError: the models do not fit together, or the lock has nothing to act on.
    """
    case = preparation.solves
    assert case is not None
    with open_checkpoint(plain) as source, open_checkpoint(anchor) as other:
        match = find_match(source, None)
        true = {name: np.asarray(values) for name, values in Stored(source).items() if name in match.parts}
        compared = {
            name: np.asarray(values)
            for name, values in Stored(other, anchor_names(match, source, other)).items()
            if name in match.parts
        }
        elements = CASES[case](
            match, _drawn(match, source, "exact", seed), _drawn(match, source, "gauge", seed)
        )
    if not elements:
        raise InputError("the known case has nothing to act on in this architecture", where=case)
    far = _distance(true, compared)
    if not far:
        what = "fine-tune and anchor do not differ where a lock acts: there is no distance to measure by"
        raise InputError(what, where=plain)
    locked = _applied(match, elements, true)
    current: dict[str, Floats] = locked
    for name, options in preparation.steps:
        outcome = attack_named(name).run(Case(match, current, compared, seed), **options)
        current = outcome.tensors(Case(match, current, compared, seed))
    return Solved(
        case,
        _distance(locked, true) / far,
        _distance(current, true) / far,
        _distance(current, compared) / _distance(locked, compared),
    )


def _drawn(match: Match, source: Any, name: str, seed: int) -> Elements:
    key = Key(hashlib.sha256(f"known case {seed}".encode()).digest())
    try:
        return method(name).draw(Context(match, key, bytes(32), Weights(source), None, {})).elements
    except ClaimError as error:  # weights that hardly move, whatever is drawn
        raise InputError("no lock can be made of this model to test attacks on", got=error) from error


def _only(match: Match, elements: Elements, kinds: tuple[str, ...]) -> dict[tuple[int, Instance], Element]:
    return {key: one for key, one in elements.items() if match.sites[key[0]].site.kind in kinds}


def _orders(match: Match, exact: Elements, gauge: Elements) -> Elements:
    """Orders of rows, heads and experts alone."""
    return {
        key: Monomial(one.perm, np.ones(one.perm.shape))
        for key, one in _only(match, exact, OUTER).items()
        if isinstance(one, Monomial)
    }


def _rotations(match: Match, exact: Elements, gauge: Elements) -> Elements:
    """The orthogonal part of a dense lock of attention, with orders of everything else."""
    found: dict[tuple[int, Instance], Element] = dict(_orders(match, exact, gauge))
    for key, one in _only(match, gauge, INNER).items():
        left, _, right = np.linalg.svd(one.matrix(1))
        found[key] = Dense(left @ right, left @ right)
    return found


def _dense(match: Match, exact: Elements, gauge: Elements) -> Elements:
    """A dense lock of attention, with orders of everything else."""
    return {**_orders(match, exact, gauge), **_only(match, gauge, INNER)}


def _published(match: Match, exact: Elements, gauge: Elements) -> Elements:
    """What locks were when the attack was published: dense in attention, with orders of MLP rows alone."""
    rows = _only(match, _orders(match, exact, gauge), ("mlp",))
    return {**rows, **_only(match, gauge, INNER)}


def _everything(match: Match, exact: Elements, gauge: Elements) -> Elements:
    """All that `gauge` does."""
    return gauge


CASES: dict[str, Callable[[Match, Elements, Elements], Elements]] = {
    "orders": _orders,
    "rotations": _rotations,
    "dense": _dense,
    "gauge": _everything,
    "published": _published,
}


def _applied(match: Match, elements: Elements, tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    found = {}
    for name in tensors:
        plan = compile_tensor(match, elements, name)
        found[name] = apply_floats(tensors[plan.source], plan.steps)
    return found


def _distance(one: Mapping[str, Floats], other: Mapping[str, Floats]) -> float:
    return float(np.sqrt(sum(float(((one[name] - other[name]) ** 2).sum()) for name in other)))
