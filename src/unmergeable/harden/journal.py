"""What a search for a strength has measured so far, and the best weights: on disk as well, so that it may be killed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .measure import Exposure
from .train import save_whole


@dataclass(frozen=True)
class Trial:
    """A training, as far as it went: its strength, what it cost, and what merges of the result keep.

    Attributes:
        strength: to begin with. steps: after so many, of so many: fewer are a look on the way.
        loss: of the standalone score on held-out examples: points of accuracy, or per cent of the cross-entropy.
        allowed: whether it is within what was asked for; without that, whether half of the fine-tune's worth is left.
        figures: of the training so far, as `train` gives them to its `pause`.
    """

    strength: float
    steps: int
    of: int
    standalone: float
    loss: float
    exposure: Exposure
    allowed: bool
    figures: dict[str, float]


class Journal:
    """Trials in the order of their measuring.

    Args:
        folder: where it is kept; None keeps it in memory alone. It must be one search's alone.

    Attributes:
        best: the weights of the trial that exposes least of those that are allowed; None if none is.
    """

    def __init__(self, folder: Path | None) -> None:
        self.trials: list[Trial] = []
        self.best: dict[str, torch.Tensor] | None = None
        self._path = None if folder is None else folder / "search.pt"
        if self._path is not None and self._path.exists():
            state = torch.load(self._path, map_location="cpu", weights_only=True)
            self.trials = [_trial(one) for one in state["trials"]]
            self.best = state["best"]

    @property
    def taken(self) -> Trial | None:
        """Whose weights are the best ones: of those that expose as little, to a hundredth, what lost least."""
        allowed = (one for one in self.trials if one.allowed)
        return min(allowed, key=lambda one: (round(one.exposure.mean, 2), one.loss), default=None)

    def find(self, strength: float, steps: int, of: int) -> Trial | None:
        """A trial that was measured already."""
        wanted = strength, steps, of
        return next((one for one in self.trials if (one.strength, one.steps, one.of) == wanted), None)

    def add(self, trial: Trial, weights: Mapping[str, torch.Tensor]) -> None:
        """Another one, with its weights, which are kept if they are the best so far."""
        self.trials.append(trial)
        if self.taken is trial:
            self.best = dict(weights)
        if self._path is not None:
            save_whole(self._path, {"trials": [asdict(one) for one in self.trials], "best": self.best})


def _trial(fields: Mapping[str, Any]) -> Trial:
    return Trial(**{**fields, "exposure": Exposure(**fields["exposure"])})
