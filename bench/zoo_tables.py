"""Earlier measurements once more: merges of a locked image model of the measuring zoo, lock by lock.

    python bench/zoo_tables.py --zoo PATH

Protected: fmnist; the thief's own: mnist and cyr. Attacker's best (value of the protected task, mean value of his
own) over task arithmetic at λ .1 to 1 and over the full-dose grid, on the first 600 test images of each task; the
merge is chosen on the images that it is reported on, as it was done then. An audit does neither.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ViTForImageClassification

import unmergeable as um
from unmergeable.attacks.wide import fill
from unmergeable.merging import Merged
from unmergeable.merging.grids import FULL_DOSE_GRID, LAMBDAS, Mixer
from unmergeable.merging.wide import WideModel
from unmergeable.stock import load_module, module_state

PROTECTED, OWN = "fmnist", ("mnist", "cyr")
HEAD = "classifier."
COUNT, BATCH = 600, 50
LOCKS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "exact": {"method": "exact"},
    "exact --scales": {"method": "exact", "scales": True},
    "params, condition 400": {"method": "params", "condition": 400.0},
    "gauge, condition 11": {"method": "gauge", "condition": 11.0},
    "mergelock, condition 1e6": {"method": "mergelock", "condition": 1e6},
}
State = Mapping[str, torch.Tensor]


class Judge:
    """Accuracies of bodies under each task's head, as values between base and fine-tune."""

    def __init__(self, zoo: Path, count: int) -> None:
        tasks = (PROTECTED, *OWN)
        self.models = {task: load_module(zoo / f"vit-{task}") for task in tasks}
        self.states = {task: _copy(model) for task, model in self.models.items()}
        self.base = _copy(load_module(zoo / f"vit-base-{PROTECTED}-head"))
        self.heads = {task: _head(self.states[task]) for task in tasks}
        self.base = {name: tensor for name, tensor in self.base.items() if not name.startswith(HEAD)}
        with np.load(zoo / "vit-test.npz") as file:
            self.images = {
                task: torch.from_numpy(file[f"{task}_images"][:count]).float().div(127.5).sub(1)[:, None]
                for task in tasks
            }
            self.labels = {
                task: torch.from_numpy(file[f"{task}_labels"][:count].astype(np.int64)) for task in tasks
            }
        self.zero = {task: self.accuracy(self.base, task) for task in tasks}
        self.one = {task: self.accuracy(self.states[task], task) for task in tasks}

    def accuracy(self, body: State, task: str) -> float:
        fill(self.models[task], {**self.heads[task], **_body(body)})
        return self.run(self.models[task], task)

    def run(self, model: torch.nn.Module, task: str) -> float:
        right = 0
        with torch.inference_mode():
            batches = zip(self.images[task].split(BATCH), self.labels[task].split(BATCH), strict=True)
            for images, labels in batches:
                right += int((model(images).logits.argmax(-1) == labels).sum())
        return right / len(self.labels[task])

    def value(self, task: str, accuracy: float) -> float:
        return (accuracy - self.zero[task]) / (self.one[task] - self.zero[task])

    def pair(self, body: State) -> tuple[float, float]:
        """The value of the protected task, and the mean of the thief's own."""
        found = {task: self.value(task, self.accuracy(body, task)) for task in (PROTECTED, *OWN)}
        return found[PROTECTED], sum(found[task] for task in OWN) / len(OWN)

    def best(self, expert: State, points: Iterable[tuple[float, float]]) -> tuple[float, float]:
        mixer = Mixer(
            self.base, {PROTECTED: _body(expert), **{task: _body(self.states[task]) for task in OWN}}
        )
        pairs = []
        for dose, others in points:
            merged = mixer.mix({PROTECTED: dose, **dict.fromkeys(OWN, others)})
            pairs.append(self.pair(merged.shared))
        return max(pairs, key=min)

    def wide(self, expert: State, weights: tuple[float, ...], *, base: bool) -> tuple[float, float]:
        """Blocks side by side."""
        states = {PROTECTED: expert, **{task: self.states[task] for task in OWN}}
        values = {}
        for host, task in enumerate(states):
            models = [self._made(task, state) for state in states.values()]
            models += [self._made(task, self.base)] if base else []
            model = WideModel(models, weights, host=host, private=(HEAD,))
            values[task] = self.value(task, self.run(model, task))
        return values[PROTECTED], sum(values[task] for task in OWN) / len(OWN)

    def _made(self, task: str, state: State) -> torch.nn.Module:
        model = ViTForImageClassification(self.models[task].config).eval()
        fill(model, {**self.heads[task], **_body(state)})
        return model


def _copy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module_state(model).items()}


def _head(state: State) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(HEAD)}


def _body(state: State) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}


def _distance(one: State, other: State) -> float:
    names = [name for name in other if not name.startswith(HEAD)]
    return float(sum((one[name] - other[name]).double().square().sum() for name in names)) ** 0.5


def measure(
    judge: Judge, zoo: Path, folder: Path, name: str, options: dict[str, Any] | None
) -> dict[str, Any]:
    """One lock: how far it moves outputs and weights, and what merges of it give."""
    source = zoo / f"vit-{PROTECTED}"
    expert = judge.states[PROTECTED]
    if options is not None:
        key = um.Key(hashlib.sha256(b"zoo tables").digest())
        target = folder / name.replace(" ", "-").replace(",", "")
        um.lock(
            source, target, key=key, salt=hashlib.sha256(name.encode()).digest(), dtype="float32", **options
        )
        expert = _copy(load_module(target))
    images = judge.images[PROTECTED][:100]
    outputs = []
    for state in (judge.states[PROTECTED], expert):
        fill(judge.models[PROTECTED], state)
        with torch.inference_mode():
            outputs.append(judge.models[PROTECTED](images).logits)
    return {
        "lock": name,
        "output": float((outputs[1] - outputs[0]).abs().max()),
        "alone": judge.pair(expert),
        "task_arithmetic": judge.best(expert, [(one, one) for one in LAMBDAS]),
        "full_dose": judge.best(expert, FULL_DOSE_GRID),
        "distance": _distance(expert, judge.base) / _distance(judge.states[PROTECTED], judge.base),
    }


def aligned(judge: Judge, zoo: Path, folder: Path) -> dict[str, Any]:
    """A dense lock, aligned to another expert, and merged without any base; and wide merges of it."""
    locked = folder / "gauge-condition-11"
    um.attack("anchor-coupled", locked, folder / "aligned", anchor=zoo / f"vit-{OWN[0]}")
    back = _copy(load_module(folder / "aligned"))
    own = {task: _body(judge.states[task]) for task in OWN}

    def mean(expert: State) -> tuple[float, float]:
        states = [_body(expert), *own.values()]
        merged = Merged({n: torch.stack([state[n] for state in states]).mean(0) for n in states[0]})
        return judge.pair(merged.shared)

    expert = _copy(load_module(locked))
    return {
        "standalone value after alignment": judge.pair(back)[0],
        "mean of three, aligned": mean(back),
        "mean of three, never locked": mean(judge.states[PROTECTED]),
        "mean of three, locked": mean(expert),
        "wide with the base, locked": judge.wide(expert, (0.5, 0.5, 0.5, -0.5), base=True),
        "wide without the base, locked": judge.wide(expert, (1 / 3, 1 / 3, 1 / 3), base=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True, help="the measuring zoo")
    parser.add_argument("--count", type=int, default=COUNT, help="test images a task")
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    args = parser.parse_args()
    judge = Judge(args.zoo, args.count)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(judge, args.zoo, Path(folder), name, options) for name, options in LOCKS.items()]
        more = aligned(judge, args.zoo, Path(folder))
    print("| lock | output changed by | alone | task arithmetic | full dose | distance to the base |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        pairs = [f"{a:.2f}, {b:.2f}" for a, b in (row["alone"], row["task_arithmetic"], row["full_dose"])]
        print(f"| {row['lock']} | {row['output']:.1e} | {' | '.join(pairs)} | {row['distance']:.3g} |")
    for name, value in more.items():
        print(f"{name}: {value}")
    if args.output is not None:
        args.output.write_text(
            json.dumps({"locks": rows, "aligned": more}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
