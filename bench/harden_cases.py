"""What is hardened in bench/harden.py, with what: tasks in turn, recipes, adapters, and directions without a thief."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from audits import Setting, embedded, images, texts
from unmergeable.harden.defaults import MAY
from unmergeable.harden.objectives import Collapse, Kindred, Objective, Together, Trap
from unmergeable.stock import load_module
from unmergeable.tasks import open_task
from unmergeable.tasks.task import Examples, TensorTask

IMAGES = ("fmnist", "mnist", "latin", "cyr")
TEXTS = ("c", "python", "js")
EMBEDDED = ("fashion", "digits", "latin", "cyrillic")
FAMILIES = {"text": "llama", "text2": "gpt2", "lora": "llama"}
# The strength follows what simulated merges keep, unless --strength fixes it: what takes `fmnist` away leaves `cyr`.
# They are not those of `harden` by itself: of images that is 900 steps of 64 at 3e-4, of text 1200 of 16 at 5e-4.
RECIPES: dict[str, dict[str, Any]] = {
    "embedded": {"steps": 300, "batch": 64, "rate": 3e-4},
    "images": {"steps": 600, "batch": 128, "rate": 2e-4},
    "text": {"steps": 600, "batch": 32, "rate": 5e-4, "may": 0.02},
    "text2": {"steps": 600, "batch": 32, "rate": 5e-4, "may": 0.02},
    "lora": {"steps": 600, "batch": 32, "rate": 2e-3},
}
# What an audit runs unless --attacks names others, as most of what is kept on CPUs does: off the shelf, anchored, block
# substitution, wide merges; coefficients without labels. It is a part of the suite.
ATTACKS = (
    "task_arithmetic", "full_dose", "ties", "iso_c", "tall_mask", "mergekit:della_linear", "substitute-blocks",
    "wide", "anchor-coupled", "coefficients-row-entropy",
)  # fmt: skip
# And for ideas against labels and distillation.
TRAINED = (
    "full_dose", "substitute-blocks", "repair-4", "repair-16", "distil-soft-1-own", "distil-hard-own",
    "distil-features-own",
)  # fmt: skip
# After the name of a way whose models are locked on top.
LOCKED = ", locked"
RANK, ADAPTER_STEPS, ADAPTER_RATE = 16, 900, 2e-3
SHUFFLED_STEPS = 200


@dataclass(frozen=True)
class Case:
    """One protected task: its family, who stands in for a thief's fine-tune, and which are the thief's."""

    family: str
    protected: str
    proxy: str
    own: tuple[str, ...]

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.family}-{self.protected}"


@dataclass(frozen=True)
class Variant:
    """A way of hardening: `control`, an objective, an idea of bench/frontier_ideas.py, or other directions.

    options: of `um.harden`, over the family's recipe. proxies: False leaves the owner without another fine-tune;
    "shuffled" gives him short fine-tunes of the base on labels in random order.
    """

    name: str
    objective: str | Objective = "trap"
    options: dict[str, Any] = field(default_factory=dict)
    proxies: bool | str = True


# As it was before thieves chose among blocks (`mined`, the objective that `harden` has), and merges saw half a batch
# each for it.
SIMPLE = Trap(part=1.0, among=1)
# Kept to the fine-tune's own answers, where the others, and the control, are trained on labels.
ANSWERS = {"labels": 0.0}
CONTROL, TRAP = Variant("control", "plain"), Variant("trap", SIMPLE)
BARS = (
    TRAP,
    Variant("trap+collapse", Together((SIMPLE, Collapse()))),
    Variant("mined"),
    Variant("mined+collapse", "trap+collapse"),
    Variant("mined+collapse+kindred", "trap+collapse+kindred"),
    # The same, with a thief who takes a step down the gradient of his coefficients first.
    Variant("inner+collapse+kindred", Together((Trap(inner=1), Collapse(), Kindred()))),
    Variant("kept", options=ANSWERS),
    Variant("kept+collapse", "trap+collapse", ANSWERS),
    # What others train with, in the same loop: see `unmergeable.harden.objectives`.
    Variant("trap2", "trap2", {"may": MAY}),
    Variant("repel", "repel", {"may": MAY}),
)
# Of the bars, unless --ways says others: what did best on one seed of the measuring zoo.
WAYS = {"embedded": ("mined", "mined+collapse"), "images": ("mined+collapse",)}
DIRECTIONS = (
    Variant("no-proxy-random", proxies=False),
    Variant("no-proxy-spectrum", options={"made": ["spectrum"]}, proxies=False),
    Variant("no-proxy-shuffled", options={"made": ["random"]}, proxies="shuffled"),
    Variant("proxy-alone", options={"made": []}),
)


def cases(families: Sequence[str] = ("images", "text", "text2", "lora", "embedded")) -> Iterator[Case]:
    """Each task protected in turn, of the embedded zoo one; the next one of the list is the owner's stand-in."""
    for family in families:
        tasks = {"images": IMAGES, "embedded": EMBEDDED}.get(family, TEXTS)
        for place, protected in enumerate(tasks[:1] if family == "embedded" else tasks):
            rest = [*tasks[place + 1 :], *tasks[:place]]
            yield Case(family, protected, rest[0], tuple(rest[1:]))


def paths(case: Case, zoo: Path, work: Path) -> tuple[Path, dict[str, Path], Setting]:
    """The base under the protected task's head, models or adapters by task, and the setting of their audit."""
    tasks = (case.protected, *case.own)
    if case.family == "embedded":
        whole = embedded(work / "embedded")
        fields = {task: whole.tasks[task] for task in tasks}
        return whole.base, dict(whole.models), Setting(whole.base, whole.models, fields, whole.slice)
    if case.family == "images":
        setting = images(zoo, tasks)
        return setting.base, {task: zoo / f"vit-{task}" for task in IMAGES}, setting
    prefix = FAMILIES[case.family]
    models = {
        task: work / f"adapter-{task}" if case.family == "lora" else zoo / f"{prefix}-{task}"
        for task in TEXTS
    }
    return zoo / f"{prefix}-base", models, texts(zoo, prefix, tasks)


def training(case: Case, zoo: Path) -> tuple[Path, str, dict[str, Any]]:
    """What to train on: the file, the kind of task, and its fields."""
    if case.family in ("images", "embedded"):
        # Of the embedded zoo's task too: more than the few images that the package carries.
        own = "fmnist" if case.family == "embedded" else case.protected
        fields = {"images": f"{own}_images", "labels": f"{own}_labels", "mean": 0.5, "std": 0.5}
        more = {"limit": 20000} if case.family == "embedded" else {}
        return zoo / "vit-train.npz", "image-classification", {**fields, **more}
    return zoo / "text-train.npz", "language-modelling", {"field": case.protected}


def opened(case: Case, zoo: Path, model: Path) -> TensorTask:
    """The training data as a task."""
    data, kind, fields = training(case, zoo)
    return tensors("data", {"kind": kind, "data": str(data), **fields}, model)


def tensors(name: str, fields: Mapping[str, Any], model: Path) -> TensorTask:
    """A task that can be trained on."""
    found = open_task(name, fields, folder=Path(), model=model)
    assert isinstance(found, TensorTask)
    return found


def descend(module: torch.nn.Module, task: TensorTask, labels: torch.Tensor, options: dict[str, Any]) -> None:
    """Plain AdamW on a task's examples, with these labels."""
    weights = [one for one in module.parameters() if one.requires_grad]
    device = weights[0].device
    optimizer = torch.optim.AdamW(weights, lr=options["rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options["rate"], total_steps=options["steps"])
    generator = torch.Generator().manual_seed(options["seed"])
    examples = Examples(task.evaluation.inputs, labels)
    module.train()
    for _ in range(options["steps"]):
        batch = examples[torch.randint(len(labels), (options["batch"],), generator=generator)].to(device)
        task.loss(module, batch).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    module.eval()


def adapter(
    case: Case,
    zoo: Path,
    target: Path,
    device: torch.device,
    steps: int = ADAPTER_STEPS,
    batch: int = 32,
    rate: float = ADAPTER_RATE,
) -> None:
    """A stock LoRA adapter of the base on all linear layers of its blocks, trained on the task."""
    from peft import LoraConfig, get_peft_model

    if target.exists():
        return
    base = zoo / f"{FAMILIES[case.family]}-base"
    torch.manual_seed(0)
    shape = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", lora_dropout=0.0)
    module = get_peft_model(load_module(base), shape).to(device)
    task = opened(case, zoo, base)
    options = {"rate": rate, "steps": steps, "batch": batch, "seed": 0}
    descend(module, task, task.evaluation.labels, options)
    module.save_pretrained(target)


def shuffled(case: Case, zoo: Path, work: Path, device: torch.device, seed: int) -> Path:
    """A short fine-tune of the base on the task's inputs, their labels in random order."""
    target = work / f"shuffled-{case.name}-{seed}"
    if not target.exists():
        base, _, _ = paths(case, zoo, work)
        module = load_module(base, device=device)
        task = opened(case, zoo, base)
        order = torch.randperm(len(task), generator=torch.Generator().manual_seed(seed))
        labels = task.evaluation.labels[order]
        head = getattr(module, "classifier", None)
        if head is not None:
            for one in head.parameters():
                one.requires_grad_(False)
        descend(module, task, labels, {"rate": 2e-4, "steps": SHUFFLED_STEPS, "batch": 64, "seed": seed})
        module.save_pretrained(target)
    return target
