"""The training loop: AdamW on what keeps a fine-tune what it is and on an objective, from the finished fine-tune.

Training that was killed goes on from the last checkpoint in its folder; a loss that is not finite takes it back there
with half the rate. Both are of weights that a whole pass was finite at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import replacing
from ..errors import InputError, RunError
from .attention import attending
from .directions import Directions
from .fidelity import Fidelity
from .merged import freeze_statistics, modes_kept
from .objectives import Objective, Step, needs_before
from .strength import EVERY, WHOLE, Ends, Strength

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..merging import State
    from .owner import Owner

LONGEST, WARM = 1.0, 0.1  # a gradient's norm; the part of the steps in which the rate rises
FALLS = 3  # how often training may fall back, at half the rate
SAVE = 50  # steps between checkpoints
SHOWN = 2  # merges that a look is at
Progress = Callable[[int, int, str], None]
Pause = Callable[[int, dict[str, float]], bool]


@dataclass(frozen=True)
class Settings:
    """What training depends on, beside models, data and objective.

    Attributes:
        strength: λ, the objective's factor, or the one to begin with. may: what simulated merges may keep of the
            task: the strength follows; None leaves it as it is. rise: by how many e-foldings in all, at most.
        labels: the part of the loss that asks for the labels, not for a teacher's answers.
        steps, rate, batch: of AdamW; rate is the highest of a one-cycle.
        made: directions that are made up beside the owner's fine-tunes. seed: of everything random.
    """

    strength: float = 0.15
    may: float | None = None
    rise: float = WHOLE
    labels: float = 1.0
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
    plain: Mapping[int, float] | None = None,
    teacher: State | None = None,
    pauses: Container[int] = (),
    pause: Pause = lambda done, figures: False,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[int, float]:
    """Train the owner's weights in place, from where they are.

    Args:
        owner, objective, settings: what is trained, and how; its weights are the fine-tune's as it was.
        accelerator: runs passes in its precision.
        ends: what the base and the fine-tune are, for looks at what it is worth.
        plain: what it was worth at the looks of a plain training of as many steps; None stands for what it began with.
        teacher: whose answers the part of the loss that is not for labels asks for; None takes the fine-tune as it was.
        pauses: after so many steps, each time, `pause` is called with their number and the figures so far; it must
            leave the weights as they are, and training ends there if it says so.
        folder: for checkpoints; training that has one there goes on from it. It must be this training's alone.
        progress: called with steps done, steps in all, and the losses.

    Returns:
        By step, what the fine-tune was worth at that look: 1 as it was at first, 0 the base.

    Raises:
        RunError: a loss that is not finite again and again.
    """
    run = _Run(owner, objective, settings, ends, plain or {}, teacher)
    run.resume(folder)
    good, parameters = run.state(run.passing()), list(owner.weights.parameters.values())
    with attending(owner.device), modes_kept(owner.module):
        owner.module.train()
        freeze_statistics(owner.module)
        while True:
            passing = run.passing()
            run.optimizer.zero_grad()
            batch = run.batch()
            with accelerator.autocast():
                loss = run.fidelity.loss(batch)
            accelerator.backward(loss)
            with accelerator.autocast():
                extra = objective.add(run.step(batch, accelerator.backward), run.strength.value)
            norm = torch.nn.utils.clip_grad_norm_(parameters, LONGEST)
            value = float(loss.detach())
            if not all(map(math.isfinite, (value, extra, float(norm)))) or not run.look():
                run.fall(good, value)
                continue
            paused = run.done in pauses
            if run.done % SAVE == 0 or run.done == settings.steps or paused:
                good = run.state(passing)
                run.save(folder, good)
            if paused:
                with modes_kept(owner.module):
                    if pause(run.done, run.figures()):
                        break
            # The last pass only sees whether the weights are any good.
            if run.done == settings.steps:
                break
            run.forward(value, extra)
            if progress is not None:
                said = f"loss {value:.3f}, objective {extra:.3f}, λ {run.strength.value:.3g}"
                progress(run.done, settings.steps, said)
    owner.module.eval()
    return run.worths


class _Run:
    """All that changes in a training but the weights' gradients, and its checkpoints."""

    def __init__(
        self,
        owner: Owner,
        objective: Objective,
        settings: Settings,
        ends: Ends | None,
        plain: Mapping[int, float],
        teacher: State | None,
    ) -> None:
        self.owner, self.settings, self.ends, self.plain = owner, settings, ends, plain
        self.worths: dict[int, float] = {}
        self.fidelity = Fidelity(owner, settings.labels, teacher)
        self.strength = Strength(
            settings.strength, settings.may, max(1, settings.steps // EVERY), settings.rise
        )
        self.done, self.falls, self.losses = 0, 0, list[tuple[float, float]]()
        parameters = list(owner.weights.parameters.values())
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=0.0)
        warm = max(WARM, 2 / settings.steps)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.rate, total_steps=settings.steps, pct_start=warm
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.draws = owner.draws(settings.seed + 1)
        self.directions = Directions(owner.vectors, settings.made, settings.seed + 2, owner.device)
        # Looks have draws of their own: training is the same with and without them.
        self.looking = torch.Generator().manual_seed(settings.seed + 3)
        self.shown = owner.draws(settings.seed + 4)
        self.turned = Directions(owner.vectors, settings.made, settings.seed + 5, owner.device)
        # A training that goes on from a checkpoint begins with the same weights: those are loaded afterwards.
        self.before = owner.weights.snapshot() if needs_before(objective) else {}

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
        return Step(
            owner.weights, self.draws, self.directions, owner.task, owner.module, batch, backward, self.before
        )

    def look(self) -> bool:
        """Every few steps: the fine-tune, and a few merges, on held-out examples; False if they give no numbers."""
        if self.ends is None or not self.done or self.done % EVERY:
            return True
        owner, count = self.owner, len(self.owner.task)
        size = min(self.settings.batch, count)
        index = torch.randperm(count, generator=self.looking)[:size].tolist()
        try:
            with torch.no_grad(), modes_kept(owner.module):
                owner.module.eval()
                worth = self.worths[self.done] = self._worth(self.ends, index)
                kept = []
                for _ in range(SHOWN if self.settings.may is not None else 0):
                    draw, direction = self.shown.draw(), self.turned.draw(owner.weights.vector())
                    with owner.weights.merged(draw, direction):
                        kept.append(self.ends.kept(owner.task.score(owner.module, index), index))
        except InputError:  # scores that are not finite
            return False
        if kept:
            # Held-out examples may be ones that fine-tuning has seen: what any further training forgets of them by
            # heart is not the objective's price.
            self.strength.follow(kept, 1 + worth - min(1.0, self.plain.get(self.done, 1.0)))
        return True

    def _worth(self, ends: Ends, index: Sequence[int]) -> float:
        task, module = self.owner.task, self.owner.module
        losses = task.losses(module, index)
        scores = -losses if task.metric == "cross-entropy" else task.score(module, index)
        return ends.worth(scores, losses, index)

    def forward(self, value: float, extra: float) -> None:
        """A step of the optimiser, down the gradients that are there."""
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        self.losses.append((value, extra))

    def fall(self, good: Mapping[str, Any], got: float) -> None:
        """Back to a good state, with other batches and draws from there, at half the rate.

        Raises:
            RunError: once too often.
        """
        falls, where = self.falls + 1, f"step {self.done + 1}"
        if falls > FALLS:
            what = "the loss is not finite, again and again"
            raise RunError(what, where=where, got=got, hint="give a lower rate or strength")
        self.load(good)
        slower = 0.5 ** (falls - self.falls)
        self.falls = falls
        self.schedule.base_lrs = [slower * rate for rate in self.schedule.base_lrs]
        for group in self.optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):
                group[name] *= slower

    def figures(self) -> dict[str, float]:
        """The means over the last tenth of the steps, "loss" and "objective", and what strength and falls are now.

        "bound": whether the strength would be higher if it might. "falls": how often training fell back.
        """
        last = self.losses[-max(1, self.settings.steps // 10) :]
        means = [sum(pair[place] for pair in last) / len(last) for place in (0, 1)]
        return {
            "loss": means[0], "objective": means[1], "strength": self.strength.value,
            "bound": float(self.strength.bound), "falls": float(self.falls),
        }  # fmt: skip

    # --- states ----------------------------------------------------------------------------------------------

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

    def passing(self) -> dict[str, Any]:
        """What a pass changes beside the weights: all that is random, dropout as well, and the strength."""
        found = {name: one.get_state() for name, one in self._generators().items()}
        found["torch"] = torch.get_rng_state()
        if self.owner.device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(self.owner.device)
        return {"random": found, "strength": self.strength.state()}

    def state(self, passing: Mapping[str, Any]) -> dict[str, Any]:
        """Everything, copied; `passing` is from before the pass that found the weights to be good."""
        return {
            "settings": asdict(self.settings),
            "done": self.done,
            "falls": self.falls,
            "weights": self.owner.weights.copy(),
            "optimizer": _copied(self.optimizer.state_dict()),
            "schedule": dict(self.schedule.state_dict()),
            "losses": list(self.losses),
            "worths": dict(self.worths),
            **passing,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """As it was, but for what is random."""
        self.owner.weights.load(state["weights"])
        self.optimizer.load_state_dict(_copied(state["optimizer"]))
        self.schedule.load_state_dict(dict(state["schedule"]))
        self.strength.load(state["strength"])
        self.losses = [(one, other) for one, other in state["losses"]]
        self.worths = dict(state["worths"])
        self.done, self.falls = int(state["done"]), int(state["falls"])

    def save(self, folder: Path | None, state: Mapping[str, Any]) -> None:
        """A checkpoint."""
        if folder is not None:
            save_whole(folder / "state.pt", state)

    def resume(self, folder: Path | None) -> None:
        """Go on from a checkpoint, if there is one of the same settings.

        Raises:
            RunError: of others.
        """
        path = folder / "state.pt" if folder is not None else None
        if path is None or not path.exists():
            torch.manual_seed(self.settings.seed)
            return
        state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise RunError("a checkpoint of another training", where=path, hint="remove it")
        self.load(state)
        for name, one in self._generators().items():
            one.set_state(state["random"][name])
        torch.set_rng_state(state["random"]["torch"])
        if "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.owner.device)


def save_whole(path: Path, state: Mapping[str, Any]) -> None:
    """A file for torch.load, whole or not at all; its folder is made.

    Raises:
        RunError: the disk is full or fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(dict(state), file)


def _copied(value: Any) -> Any:
    """A state dict with copies of its tensors, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value
