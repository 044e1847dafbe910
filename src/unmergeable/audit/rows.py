"""What an audit measures: a row is one attack on one side, with the best merges that it found.

Sides: `protected`, the thief holds the released model; `plain`, he holds the fine-tune as it was before; and
`without`, he holds only his own models. All three try the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Scores = Mapping[str, Floats]  # by task, one score an example, higher is better

Side = Literal["protected", "plain", "without"]
SIDES: tuple[Side, ...] = ("protected", "plain", "without")
State = Literal["done", "unreliable", "refused", "failed"]

LEVELS = {
    0: "off the shelf, no data",
    1: "adaptive, no data",
    2: "unlabelled inputs",
    3: "few labels",
}


@dataclass(frozen=True)
class Cost:
    """What an attack took, looking for its best merge included; in results what led to it as well (`costs`).

    Attributes:
        inputs, labelled: different examples that it used without and with their labels, beyond those that
            merges are chosen on.
        tokens: in both, for text.
        forwards: forward passes of one example through one model; a step of training counts as three, and a pass
            through a wide merge as many as its size is of one model's.
        seconds: wall clock of one worker.
        size: parameters of the result over those of one model.
    """

    inputs: int = 0
    labelled: int = 0
    tokens: int = 0
    forwards: float = 0.0
    seconds: float = 0.0
    size: float = 1.0


@dataclass(frozen=True)
class Point:
    """A merge that was scored in full.

    Attributes:
        options: of the attack's last step; with the row's chain they say how to do it again.
        validation, test: scores of every example.
    """

    options: Mapping[str, Any]
    validation: Scores
    test: Scores


@dataclass(frozen=True)
class Look:
    """A merge that was looked at on a few examples: values of the protected task and of the worst own one."""

    options: Mapping[str, Any]
    protected: float
    own: float

    @property
    def joint(self) -> float:
        """The worse of the two."""
        return min(self.protected, self.own)


@dataclass(frozen=True)
class Row:
    """One attack on one side.

    Attributes:
        chain: what was done, in order: preparations, then a merge, then a repair.
        level: of access that it takes.
        needs: what a thief must have; keys of `attacks.NEEDS`.
        points: the merges that were scored in full, none if it was refused or failed.
        looks: everything that was looked at.
        state, reason: why it is not simply done.
    """

    chain: tuple[str, ...]
    side: Side
    level: int
    about: str
    needs: tuple[str, ...]
    points: tuple[Point, ...] = ()
    looks: tuple[Look, ...] = ()
    cost: Cost = field(default_factory=Cost)
    state: State = "done"
    reason: str | None = None
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attack(self) -> str:
        """The chain as one name."""
        return " > ".join(self.chain)

    @property
    def errored(self) -> bool:
        """Whether an error kept the attack from being tried: what it would have got is not known.

        Merges that were made, and whose answers are no numbers, are a result.
        """
        return "error" in self.facts and not self.points

    def summary(self) -> dict[str, Any]:
        """Ready for JSON, without scores: those are for `scores`."""
        return {
            "attack": self.attack,
            "chain": list(self.chain),
            "side": self.side,
            "level": self.level,
            "about": self.about,
            "needs": list(self.needs),
            "state": self.state,
            "reason": self.reason,
            "seed": self.seed,
            "tried": len(self.looks),
            "looks": [[round(look.protected, 4), round(look.own, 4)] for look in self.looks],
            "cost": asdict(self.cost),
            "facts": _finite(self.facts),
        }


def _finite(found: Any) -> Any:
    """The same for JSON, which has no NaN: what is measured of a broken model may be none of its numbers."""
    if isinstance(found, Mapping):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not isfinite(found) else found
