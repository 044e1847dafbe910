"""A tiny zoo for attacks on tasks: a base, fine-tunes of it for three kinds of pictures, and their bench.

The pictures of a class are one random picture of 8 × 8 with noise. Everything is trained here, in about two
seconds, and written as checkpoints that stock classes open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import toy
import unmergeable as um
from unmergeable.attacks import Outcome
from unmergeable.attacks.thief import Look, MergeAttack, Thief, detached
from unmergeable.audit.bench import Bench
from unmergeable.audit.config import make_config
from unmergeable.audit.explore import Explorer
from unmergeable.audit.finalists import finalists
from unmergeable.audit.known import prepare
from unmergeable.audit.scores import Reference
from unmergeable.audit.work import one_thread
from unmergeable.merging import Merged

CLASSES = {"stars": 4, "moons": 3, "suns": 5}  # the protected task, and two of the thief's
PROTECTED, *OWN = CLASSES
TRAIN, TEST = 240, 240
TRAP, SPOILT = 3.0, 2.0  # noise in a tensor, relative to it, where a fine-tune is made unusable for merges
State = dict[str, torch.Tensor]


def pictures(task: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures from -1 to 1, (n, 1, 8, 8), and their classes."""
    number = list(CLASSES).index(task)
    random = torch.Generator().manual_seed(number)
    coarse = torch.randn(CLASSES[task], 1, 4, 4, generator=random)
    ideal = torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear", align_corners=False)
    random = torch.Generator().manual_seed(100 * number + seed)
    classes = torch.arange(count) % CLASSES[task]
    noisy = ideal[classes] + 0.8 * torch.randn(count, 1, 8, 8, generator=random)
    return (noisy / 3).clamp(-1, 1), classes


def model(classes: int) -> Any:
    """A vision transformer of three blocks."""
    import transformers as tf

    torch.manual_seed(0)
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=8,
            patch_size=4, num_channels=1, num_labels=classes,
        )
    ).eval()  # fmt: skip


def fit(module: Any, heads: Mapping[str, Any], tasks: list[str], steps: int, train_heads: bool) -> None:
    """Train a body on tasks, each under its head."""
    data = {task: pictures(task, TRAIN, 1) for task in tasks}
    trained = [*module.vit.parameters()]
    trained += [weight for task in tasks for weight in heads[task].parameters()] if train_heads else []
    random = torch.Generator().manual_seed(5)

    def loss() -> torch.Tensor:
        total = torch.zeros(())
        for task, (images, classes) in data.items():
            rows = torch.randint(0, len(images), (32,), generator=random)
            hidden = module.vit(pixel_values=images[rows]).last_hidden_state[:, 0]
            total = total + torch.nn.functional.cross_entropy(heads[task](hidden), classes[rows])
        return total

    descend(trained, loss, steps)


def descend(
    weights: Sequence[torch.Tensor], loss: Callable[[], torch.Tensor], steps: int, rate: float = 1e-3
) -> None:
    """So many steps of AdamW with a one-cycle rate, on a loss that draws its own batches."""
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        found = loss()
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        schedule.step()


@cache
def trained() -> dict[str, Any]:
    """The base, with a head for all classes, and a fine-tune of each task with its part of that head."""
    with one_thread():
        base = model(sum(CLASSES.values()))
        heads = {task: torch.nn.Linear(32, count) for task, count in CLASSES.items()}
        fit(base, heads, list(CLASSES), 5, True)
        with torch.no_grad():
            base.classifier.weight.copy_(torch.cat([head.weight for head in heads.values()]))
            base.classifier.bias.copy_(torch.cat([head.bias for head in heads.values()]))
        found = {"base": base}
        for task, head in heads.items():
            tuned = model(CLASSES[task])
            tuned.vit.load_state_dict(base.vit.state_dict())
            fit(tuned, heads, [task], 60, False)
            tuned.classifier.load_state_dict(head.state_dict())
            found[task] = tuned
    return found


def write(folder: Path) -> Path:
    """Models and pictures as files."""
    for name, module in trained().items():
        module.save_pretrained(folder / name)
    for task in CLASSES:
        for split, seed, count in (("test", 2, TEST), ("train", 3, TRAIN)):
            images, classes = pictures(task, count, seed)
            values = ((images[:, 0] + 1) / 2).numpy().astype(np.float32)
            np.savez(folder / f"{task}-{split}.npz", images=values, labels=classes.numpy())
    return folder


def configuration(own: Sequence[str] = tuple(OWN), model: str = PROTECTED, **changes: Any) -> dict[str, Any]:
    """An audit of what `write` wrote, for a thief with these tasks of his own; no lock unless `model` says so."""
    fields = {
        "version": 1,
        "base": "base",
        "protected": {"model": model, "plain": PROTECTED, "task": PROTECTED},
        "others": {task: task for task in own},
        "tasks": {
            task: {
                "kind": "image-classification", "data": f"{task}-test.npz", "train": {"data": f"{task}-train.npz"},
            }
            for task in (PROTECTED, *own)
        },
        "device": "cpu",
    }  # fmt: skip
    return fields | changes


def locked(folder: Path, method: str) -> str:
    """The protected model locked, beside it; its name."""
    name = f"{PROTECTED}-{method}"
    if not (folder / name).exists():
        um.lock(folder / PROTECTED, folder / name, key=toy.key(), salt=bytes(32), method=method)
    return name


@dataclass(eq=False)
class Scene:
    """A bench with what is known of it."""

    bench: Bench
    reference: Reference

    def thief(self, side: Any = "plain", **more: Any) -> Thief:
        return self.bench.thief(side, **more)

    def look(self, attack: MergeAttack, thief: Thief) -> Explorer:
        """What an attack looks at."""
        explorer = Explorer(self.bench, self.reference)
        fresh = not (thief.bill.inputs or thief.bill.labelled)
        attack.explore(thief, explorer)
        within_budget(attack, thief, len(explorer.looks), fresh)
        return explorer

    def values(self, subject: Any, half: str = "test") -> tuple[float, float]:
        """Of the protected task and of the worst own one."""
        return self.reference.pair(half, self.bench.measure(subject, half))

    def best(self, explorer: Explorer) -> tuple[Mapping[str, Any], Any]:
        """Options and merge of the best look; the merge if it was kept, else None."""
        (first, *_) = finalists(explorer.looks, self.reference.floors, least=1)
        return explorer.looks[first].options, explorer.kept.get(first)


def within_budget(attack: MergeAttack, thief: Thief, looks: int, fresh: bool = True) -> None:
    """What an attack took is no more than it declares; `fresh` thieves had spent nothing before."""
    budget = attack.budget
    if "merges" in budget:
        assert looks <= budget["merges"] * max(1, len(thief.starts)), attack.name
    for spent, each in ((thief.bill.inputs, False), (thief.bill.labelled, True)) if fresh else ():
        for task, count in spent.items():
            classes = (thief.trainable(task).classes or 1) if each else 1
            assert count <= budget["examples"] * classes, (attack.name, task)


@dataclass
class Doses:
    """Doses of the protected model, as one wishes: what is done before a merge is made, by its dose."""

    doses: tuple[float, ...]
    before: Mapping[float, Callable[[], object]] = field(default_factory=dict)
    broken: tuple[float, ...] = ()
    keep: bool = False
    made: list[float] = field(default_factory=list)
    name: str = "doses"
    about: str = "doses"
    needs: tuple[str, ...] = ("base",)
    access: int = 0
    alone: bool = True

    @property
    def budget(self) -> dict[str, int]:
        return {"merges": len(self.doses)}

    def explore(self, thief: Thief, look: Look) -> None:
        for dose in self.doses:
            merged = self.make(thief, {"dose": dose})
            look({"dose": dose}, merged, kept=detached(merged) if self.keep else None)

    def make(self, thief: Thief, options: Mapping[str, Any]) -> Merged:
        self.made.append(options["dose"])
        self.before.get(options["dose"], lambda: None)()
        weights = dict.fromkeys(thief.experts, 0.4) | {next(iter(thief.experts)): options["dose"]}
        merged = thief.whole(detached(thief.mixer.mix(weights)))
        if options["dose"] in self.broken:
            next(iter(merged.shared.values())).fill_(float("nan"))
        return merged


def opened(fields: Mapping[str, Any], folder: Path) -> Scene:
    """The bench of a configuration."""
    with one_thread():
        bench = Bench(make_config(dict(fields), folder, folder / "audit.yaml"), folder / "work")
        return Scene(bench, prepare(bench).reference)


def scene(folder: Path, own: Sequence[str] = tuple(OWN), model: str = PROTECTED, **changes: Any) -> Scene:
    """The bench of what `write` wrote, for a thief with these tasks of his own."""
    fields = configuration(own, model, **changes)
    return opened(fields, folder)


def one_block(bench: Bench, block: int) -> State:
    """A fine-tune of the protected task that changes one block alone, with noise in all others.

    It computes nothing by itself: merges that keep the block and leave the rest have all that was learnt.
    """
    with one_thread():
        tuned = model(CLASSES[PROTECTED])
        tuned.vit.load_state_dict(trained()["base"].vit.state_dict())
        tuned.classifier.load_state_dict(trained()[PROTECTED].classifier.state_dict())
        tuned.vit.requires_grad_(False)
        tuned.vit.layers[block].requires_grad_(True)
        fit(tuned, {PROTECTED: tuned.classifier}, [PROTECTED], 80, False)
    random = torch.Generator().manual_seed(9)
    state = {name: tensor.detach().clone() for name, tensor in tuned.state_dict().items()}
    for name, tensor in state.items():
        if name in bench.base and f"layers.{block}." not in name:
            size = TRAP * tensor.std() if tensor.numel() > 1 else 0.0
            tensor.add_(size * torch.randn(tensor.shape, generator=random))
    return state


def spoilt(bench: Bench, block: int) -> State:
    """The fine-tune of the protected task with noise in one block, which no merge should take."""
    random = torch.Generator().manual_seed(3)
    state = {name: tensor.clone() for name, tensor in bench.models["plain"].items()}
    for name, tensor in state.items():
        if f"layers.{block}." in name:
            tensor.add_(SPOILT * float(tensor.std()) * torch.randn(tensor.shape, generator=random))
    return state


def dose(bench: Bench, role: str, merged: State, block: int) -> tuple[float, float]:
    """How much of a model's change a merge has: in one block, and in everything else; least squares."""
    inner, outer = [0.0, 0.0], [0.0, 0.0]
    for name, origin in bench.base.items():
        change = bench.models[role][name] - origin
        sums = inner if f"layers.{block}." in name else outer
        sums[0] += float(((merged[name] - origin) * change).sum())
        sums[1] += float((change * change).sum())
    return inner[0] / inner[1], outer[0] / outer[1]


def zoo_scene(folder: Path, method: str, images: int = 240) -> Scene:
    """The bench of the embedded zoo, fashion locked and digits of a thief, with so many test images a task."""
    from unmergeable import zoo

    zoo.copy_to(folder)
    for task in ("fashion", "digits"):
        for split in ("test", "few"):
            pixels, labels = zoo.images(task, split)
            np.savez(folder / f"{task}-{split}.npz", images=pixels, labels=labels)
    um.lock(folder / "fashion", folder / "locked", key=toy.key(), salt=bytes(32), method=method)
    fields = {
        "version": 1, "base": "base", "device": "cpu", "others": {"digits": "digits"},
        "protected": {"model": "locked", "plain": "fashion", "task": "fashion"},
        "tasks": {
            task: {
                "kind": "image-classification", "data": f"{task}-test.npz", "limit": images, "mean": 0.5,
                "std": 0.5, "train": {"data": f"{task}-few.npz"},
            }
            for task in ("fashion", "digits")
        },
    }  # fmt: skip
    return opened(fields, folder)


def distance(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> float:
    """‖two − one‖ / ‖one‖ over what the first has."""
    off = sum(float((two[name].double() - tensor.double()).square().sum()) for name, tensor in one.items())
    return float(off / sum(float(tensor.double().square().sum()) for tensor in one.values())) ** 0.5


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    """Whether tensors are the same, bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Weak:
    """An alignment that aligns nothing."""

    @staticmethod
    def run(case: Any, **options: Any) -> Outcome:
        return Outcome()
