"""The training loop: AdamW on the fine-tune's own loss and an objective, from the finished fine-tune.

Training that was killed goes on from the last checkpoint in its folder; a loss that is not finite takes it back to
the last good weights with half the rate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RunError
from .directions import Directions
from .draws import Draws
from .objectives import Objective, Step
from .strength import EVERY, Ends, Strength

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .owner import Owner

LONGEST, WARM = 1.0, 0.1  # a gradient's norm; the part of the steps in which the rate rises
FALLS = 3  # how often training may fall back, at half the rate
SAVE = 50  # steps between checkpoints
SHOWN = 2  # merges that a look is at
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What training depends on, beside models, data and objective.

    Attributes:
        strength: λ, the objective's factor, or the one to begin with. may: what simulated merges may keep of the
            task: the strength follows; None leaves it as it is.
        steps, rate, batch: of AdamW; rate is the highest of a one-cycle.
        made: directions that are made up beside the owner's fine-tunes. seed: of everything random.
    """

    strength: float = 0.15
    may: float | None = None
    steps: int = 300
    rate: float = 2e-4
    batch: int = 64
    made: tuple[str, ...] = ("random",)
    seed: int = 0


def train(
    owner: Owner,
    objective: Objective,
    settings: Settings,
    accelerator: Accelerator,
    *,
    ends: Ends | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train the owner's weights in place, from where they are.

    Args:
        owner, objective, settings: what is trained, and how.
        accelerator: runs passes in its precision.
        ends: what the base and the fine-tune are, for a strength that follows.
        folder: for checkpoints; training that has one there goes on from it. It must be this training's alone.
        progress: called with steps done, steps in all, and the losses.

    Returns: the means over the last tenth of the steps, "loss" and "objective", the last strength, and how often it
        fell back.

    Raises:
        RunError: a loss that is not finite again and again.
    """
    parameters = list(owner.weights.parameters.values())
    strength = Strength(settings.strength, settings.may, ends or Ends())
    run = _Run(owner, settings, strength)
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=settings.steps, pct_start=max(WARM, 2 / settings.steps)
    )
    step, losses = run.resume(folder, optimizer, schedule), run.losses
    good, falls = owner.weights.copy(), 0
    owner.module.train()
    while step < settings.steps:
        optimizer.zero_grad()
        batch = run.batch()
        with accelerator.autocast():
            loss = owner.task.loss(owner.module, batch)
        accelerator.backward(loss)
        with accelerator.autocast():
            extra = objective.add(run.step(batch, accelerator.backward), strength.value)
        norm = torch.nn.utils.clip_grad_norm_(parameters, LONGEST)
        value = float(loss.detach())
        if not all(map(_finite, (value, extra, float(norm)))):
            falls += 1
            if falls > FALLS:
                what = "the loss is not finite, again and again"
                raise RunError(
                    what, where=f"step {step + 1}", got=value, hint="give a lower rate or strength"
                )
            owner.weights.load(good)
            optimizer.state.clear()
            schedule.base_lrs = [rate / 2 for rate in schedule.base_lrs]
            for group in optimizer.param_groups:
                for name in ("lr", "initial_lr", "max_lr", "min_lr"):
                    group[name] /= 2
            continue
        optimizer.step()
        schedule.step()
        step += 1
        if settings.may is not None and step % EVERY == 0:
            strength.follow(*run.look())
        losses.append((value, extra))
        if step % SAVE == 0 or step == settings.steps:
            good = owner.weights.copy()
            if folder is not None:
                run.save(folder, step, optimizer, schedule)
        if progress is not None:
            progress(step, settings.steps, f"loss {value:.3f}, objective {extra:.3f}, λ {strength.value:.3g}")
    owner.module.eval()
    last = losses[-max(1, settings.steps // 10) :]
    means = [sum(pair[place] for pair in last) / len(last) for place in (0, 1)]
    return {"loss": means[0], "objective": means[1], "strength": strength.value, "falls": float(falls)}


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


class _Run:
    """All that is random in a training, and its checkpoints."""

    def __init__(self, owner: Owner, settings: Settings, strength: Strength) -> None:
        self.owner, self.settings, self.strength = owner, settings, strength
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.draws = Draws(owner.weights.shapes, settings.seed + 1)
        self.directions = Directions(owner.vectors, settings.made, settings.seed + 2, owner.device)
        self.losses: list[tuple[float, float]] = []
        # Looks have draws of their own: training is the same with and without them.
        self.looking = torch.Generator().manual_seed(settings.seed + 3)
        self.shown = Draws(owner.weights.shapes, settings.seed + 4)
        self.turned = Directions(owner.vectors, settings.made, settings.seed + 5, owner.device)

    def look(self) -> tuple[list[float], float]:
        """Scores of a few merges on held-out examples, and the fine-tune's own loss on them."""
        owner, held = self.owner, self.owner.task.evaluation
        size = min(self.settings.batch, len(held))
        index = torch.randperm(len(held), generator=self.looking)[:size].tolist()
        owner.module.eval()
        scores = []
        with torch.no_grad():
            loss = float(owner.task.loss(owner.module, held[index].to(owner.device)))
            for _ in range(SHOWN):
                draw, direction = self.shown.draw(), self.turned.draw(owner.weights.vector())
                with owner.weights.merged(draw, direction):
                    scores.append(float(owner.task.score(owner.module, index).mean()))
        owner.module.train()
        return scores, loss

    def batch(self) -> Any:
        """Random training examples, changed at random where the task knows how."""
        training, augment = self.owner.training, self.owner.task.augment
        size = min(self.settings.batch, len(training))
        found = training[torch.randint(len(training), (size,), generator=self.generator)]
        if augment is not None:
            found = augment(found, self.generator)
        return found.to(self.owner.device)

    def step(self, batch: Any, backward: Callable[[torch.Tensor], None]) -> Step:
        """What the objective is given."""
        owner = self.owner
        return Step(owner.weights, self.draws, self.directions, owner.task, owner.module, batch, backward)

    def _generators(self) -> dict[str, torch.Generator]:
        return {
            "data": self.generator,
            "draws": self.draws.generator,
            "directions": self.directions.generator,
            "noise": self.directions.noise,
            "looking": self.looking,
            "shown": self.shown.generator,
            "turned": self.turned.generator,
            "turned noise": self.turned.noise,
        }

    def save(self, folder: Path, step: int, optimizer: Any, schedule: Any) -> None:
        """A checkpoint, whole or not at all."""
        state = {
            "settings": asdict(self.settings),
            "step": step,
            "weights": self.owner.weights.copy(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "random": {name: one.get_state() for name, one in self._generators().items()},
            "torch": torch.get_rng_state(),
            "losses": self.losses,
            "strength": self.strength.state(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".state.{os.getpid()}"
        torch.save(state, temporary)
        os.replace(temporary, folder / "state.pt")

    def resume(self, folder: Path | None, optimizer: Any, schedule: Any) -> int:
        """Go on from a checkpoint, if there is one of the same settings; the steps that it has done."""
        path = folder / "state.pt" if folder is not None else None
        if path is None or not path.exists():
            torch.manual_seed(self.settings.seed)
            return 0
        state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise RunError("a checkpoint of another training", where=path, hint="remove it")
        self.owner.weights.load(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        for name, one in self._generators().items():
            one.set_state(state["random"][name])
        torch.set_rng_state(state["torch"])
        self.strength.load(state["strength"])
        self.losses = [(one, other) for one, other in state["losses"]]
        return int(state["step"])
