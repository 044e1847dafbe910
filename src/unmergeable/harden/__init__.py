"""Harden: a short training after which merges of a fine-tune fail, also for whoever undoes every symmetry.

    harden("my-model", "my-model-hardened", base="base", data="train.npz")

Data flows one way: paths -> owner (models and data in memory) -> objective and strength -> trained weights -> the
same checkpoint with other numbers in it. Nothing of a merge is hidden in a symmetry, so a lock may follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from ..keys import Key
    from .objectives import Objective

    Path_ = str | os.PathLike[str]

__all__ = ["HardenReport", "harden"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class HardenReport:
    """What was hardened, what it cost, and what an owner can see of its effect; `as_dict` is the JSON document.

    Attributes:
        expert, base, dst, data: paths. proxies: further fine-tunes that stood in for a thief's.
        made: what directions were made up beside them.
        objective, strength, may, labels, steps, rate, batch, seed: of the training that was taken; strength is the last
            one.
        standalone: the held-out score before and after, and after a `plain` training of as many steps where there was
            one. loss: points of accuracy or per cent of cross-entropy.
        exposure: before and after, mean and largest value of the task in simulated merges of held-out examples.
        trials: all strengths that were tried, after how many `steps` `of` how many, with the same figures.
        locked: the id of the key that it was locked with; None if it was not.
        examples: how many were trained on, and held out. seconds: in all. device: of training.
        notes: what the owner should know before he takes the result for a protection.
    """

    expert: str
    base: str
    dst: str
    data: str
    proxies: tuple[str, ...]
    made: tuple[str, ...]
    objective: str
    strength: float
    may: float | None
    labels: float
    steps: int
    rate: float
    batch: int
    seed: int
    metric: str
    standalone: Mapping[str, float]
    loss: float
    exposure: Mapping[str, Mapping[str, float]]
    trials: Sequence[Mapping[str, Any]]
    locked: str | None
    examples: Mapping[str, int]
    seconds: float
    device: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        from dataclasses import asdict

        listed = {"proxies": list(self.proxies), "made": list(self.made), "notes": list(self.notes)}
        return {"document": "unmergeable.harden", "version": 1, **asdict(self), **listed}


def harden(
    expert: Path_,
    dst: Path_,
    *,
    base: Path_,
    data: Path_,
    task: str | None = None,
    fields: Mapping[str, Any] | None = None,
    proxies: Sequence[Path_] = (),
    made: Sequence[str] | None = None,
    objective: str | Objective | None = None,
    strength: float | None = None,
    max_loss: float | None = None,
    may: float | None = None,
    labels: float | None = None,
    steps: int | None = None,
    rate: float | None = None,
    batch: int | None = None,
    seed: int = 0,
    lock: Key | None = None,
    control: Path_ | None = None,
    device: str = "auto",
    precision: str = "auto",
    checkpointing: bool = False,
    progress: Progress | None = None,
) -> HardenReport:
    """Train a finished fine-tune on, so that merges of it do not know its task, and write it.

    Args:
        expert: the fine-tune, a folder as save_pretrained writes it; never changed.
        dst: the new folder; it appears whole or not at all. A training that was killed goes on from `dst`.hardening.
        base: what it was fine-tuned from.
        data: examples of its task to train on; a tenth is held out to measure on.
        task: `image-classification`, `language-modelling`, `text-classification` or `sequence-to-sequence`; the model's
            class says it if not given.
        fields: further fields of the task, as in an audit's configuration: mean, images, length, …; with `train`,
            that is trained on, and all of `data` is held out.
        proxies: other fine-tunes of the base, or LoRA adapters, in the place of a thief's.
        made: directions that are made up in the place of a thief's fine-tunes: `random` (by itself), `spectrum`; none
            of them needs proxies.
        objective: `trap`, `collapse`, `kindred`, `trap2`, `repel`, `plain` (a control), or several with a + between; or
            an object of the protocol in `harden.objectives`. If not given, `trap+collapse+kindred` for
            images, `trap` for text.
        strength: of the objective, fixed; with `max_loss`, the first one that is tried. Without either, the trap's
            strength follows what simulated merges keep.
        max_loss: what the held-out score may lose, in points of accuracy or per cent of the cross-entropy: several
            strengths are tried, each looked at on its way, and with the best one more `steps` if none are given.
        may: what simulated merges may keep of the task on average, 0 to 1 (.03; .02 for language models): the strength
            rises until they keep no more. With `strength`, from there.
        labels: the part of the loss that asks for the labels once more, 0 to 1; the rest asks for a teacher's answers
            to the same examples, so that the fine-tune stays what it is. If the strength follows, that is a plain
            training of as many steps; else, and with 0, which is better where data is little, the fine-tune itself.
            If not given, .5 for images whose strength follows, else 1.
        steps, rate, batch: of AdamW; as the kind of task, and of model, asks for if not given.
        seed: of everything random.
        lock: a key to lock the result with, by `exact`.
        control: a new folder for the fine-tune as plain training of as many steps on the labels of the same batches
            leaves it: what an audit should take as the unprotected model. Only where labels have a part: else that is
            the fine-tune itself. A strength that follows needs that training in any case.
        device: "auto", "cpu" or "cuda".
        precision: of passes: "fp32", "bf16" (weights stay float32), or "auto": bf16 on a GPU that has it.
        checkpointing: gradient checkpointing, as the model's class has it: less memory for more time.
        progress: called with steps done, steps in all, and a label.

    Raises:
        UsageError: options that make no sense.
        InputError: models or data that do not fit each other, a fine-tune that is no better than its base, a proxy
            that is one of the two, a model without hidden states for an objective that learns from them.
        ClaimError: no strength keeps within `max_loss`; without it, training took more than half of what the
            fine-tune has over its base.
        RunError: not enough memory, or training that diverges. Nothing is left at DST in any of these cases.
    """
    from .run import run_harden

    return run_harden(
        expert, dst, base=base, data=data, task=task, fields=fields, proxies=proxies, made=made, objective=objective,
        strength=strength, max_loss=max_loss, may=may, labels=labels, steps=steps, rate=rate, batch=batch,
        seed=seed, lock=lock, control=control, device=device, precision=precision, checkpointing=checkpointing,
        progress=progress,
    )  # fmt: skip
