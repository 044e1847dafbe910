"""The bar of a level's verdict: what a thief recovers, with its interval, on a scale that all levels share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .numerals import known, percent

EDGE = 4.0  # percent of the width: labels nearer to an end do not stand in the middle


@dataclass(frozen=True)
class Scale:
    """Shares between `low` and `high`, which are 0 and 1 unless a level needs more."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """Where a share is, in percent of the width."""
        return round(100 * (share - self.low) / (self.high - self.low), 2)


@dataclass(frozen=True)
class Bar:
    """Positions in percent of the width.

    Attributes:
        zero, one: where nothing and everything of the unprotected model's gain is.
        start, width: of the bar.
        low, high: of the interval; None where there is none.
    """

    zero: float
    one: float
    start: float
    width: float
    low: float | None
    high: float | None

    @property
    def labels(self) -> tuple[tuple[str, float, str], ...]:
        """What stands below it: text, position and which part of it stands there."""
        return tuple(
            (text, at, "start" if at < EDGE else "end" if at > 100 - EDGE else "middle")
            for text, at in ((percent(0), self.zero), (percent(1), self.one))
        )


def scale(levels: Sequence[Mapping[str, Any]]) -> Scale:
    """A scale on which the figures and intervals of all levels have a place. Nothing is clipped."""
    judged = [level for level in levels if level["reliable"]]
    shares = [share for level in judged for share in (level["recovered"], *level["interval"]) if known(share)]
    return Scale(min(0.0, *shares, 0.0), max(1.0, *shares, 1.0))


def bar(level: Mapping[str, Any], scale: Scale) -> Bar | None:
    """The bar of a level; None for one that was not judged."""
    if not level["reliable"] or not known(level["recovered"]):
        return None
    zero, found = scale.at(0.0), scale.at(level["recovered"])
    low, high = (scale.at(limit) if known(limit) else None for limit in level["interval"])
    return Bar(zero, scale.at(1.0), min(zero, found), round(abs(found - zero), 2), low, high)
