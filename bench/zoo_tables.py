"""Earlier measurements once more: merges of a locked image model of the measuring zoo, lock by lock.

    python bench/zoo_tables.py --zoo PATH

Protected: fmnist; the thief's own: mnist and cyr. Attacker's best (value of the protected task, the least value of
his own) over task arithmetic at λ .1 to 1 and over the full-dose grid, on the first 600 test images of each task;
then averages and wide merges without a choice, on the first 300, with the mean of his own. Merges are chosen on the
images that they are reported on, as it was done then. An audit does neither.
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
from unmergeable.merging.grids import FULL_DOSE_GRID, LAMBDAS, Mixer
from unmergeable.merging.wide import WideModel
from unmergeable.stock import load_module, module_state

PROTECTED, OWN = "fmnist", ("mnist", "cyr")
HEAD = "classifier."
COUNT, FEWER, BATCH = 600, 300, 50
# Coefficients of fmnist, mnist, cyr, and for a wide merge with the base, of the base.
AVERAGE, WIDE, WITHOUT = (0.45, 0.275, 0.275), (0.7, 0.4, 0.4, -0.5), (0.4, 0.3, 0.3)
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

    def values(self, body: State) -> dict[str, float]:
        """The values of all tasks."""
        return {task: self.value(task, self.accuracy(body, task)) for task in (PROTECTED, *OWN)}

    def pair(self, body: State) -> tuple[float, float]:
        """The value of the protected task, and the least of the thief's own."""
        found = self.values(body)
        return found[PROTECTED], min(found[task] for task in OWN)

    def best(self, expert: State, points: Iterable[tuple[float, float]]) -> tuple[float, float]:
        mixer = Mixer(
            self.base, {PROTECTED: _body(expert), **{task: _body(self.states[task]) for task in OWN}}
        )
        pairs = []
        for dose, others in points:
            merged = mixer.mix({PROTECTED: dose, **dict.fromkeys(OWN, others)})
            pairs.append(self.pair(merged.shared))
        return max(pairs, key=min)

    def wide(self, expert: State, weights: tuple[float, ...]) -> dict[str, float]:
        """Blocks side by side; with the base where there is a weight for it."""
        states = {PROTECTED: expert, **{task: self.states[task] for task in OWN}}
        values = {}
        for host, task in enumerate(states):
            models = [self._made(task, state) for state in states.values()]
            models += [self._made(task, self.base)] * (len(weights) - len(states))
            model = WideModel(models, weights, host=host, private=(HEAD,))
            values[task] = self.value(task, self.run(model, task))
        return values

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


def aligned(judge: Judge, zoo: Path, folder: Path) -> dict[str, dict[str, float]]:
    """A dense lock, aligned to another expert, and averaged without any base; and wide merges of it.

    Returns: values by task of every model.
    """
    locked = folder / "gauge-condition-11"
    um.attack("anchor-coupled", locked, folder / "aligned", anchor=zoo / f"vit-{OWN[0]}")
    back, expert = _copy(load_module(folder / "aligned")), _copy(load_module(locked))

    def average(first: State) -> dict[str, float]:
        states = [_body(first), *(_body(judge.states[task]) for task in OWN)]
        parts = [(weight, state) for weight, state in zip(AVERAGE, states, strict=True)]
        return judge.values({n: sum(weight * state[n] for weight, state in parts) for n in states[0]})

    return {
        "by itself, after alignment": judge.values(back),
        f"average {AVERAGE}, never locked": average(judge.states[PROTECTED]),
        f"average {AVERAGE}, locked": average(expert),
        f"average {AVERAGE}, aligned": average(back),
        f"wide with the base {WIDE}, locked": judge.wide(expert, WIDE),
        f"wide without the base {WITHOUT}, locked": judge.wide(expert, WITHOUT),
    }


def measured(zoo: Path) -> dict[str, Any]:
    """Both tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        judge = Judge(zoo, COUNT)
        rows = [measure(judge, zoo, folder, lock, options) for lock, options in LOCKS.items()]
        return {"locks": rows, "aligned": aligned(Judge(zoo, FEWER), zoo, folder)}


def tables(found: Mapping[str, Any]) -> str:
    """Both tables, in Markdown."""
    lines = [
        "| lock | output changed by | alone | task arithmetic | full dose | distance to the base |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["locks"]:
        pairs = [f"{a:.2f}, {b:.2f}" for a, b in (row["alone"], row["task_arithmetic"], row["full_dose"])]
        lines.append(
            f"| `{row['lock']}` | {row['output']:.1e} | {' | '.join(pairs)} | {row['distance']:.3g} |"
        )
    lines += ["", f"| merge | {PROTECTED} | mean of {', '.join(OWN)} |", "|---|---|---|"]
    for name, values in found["aligned"].items():
        own = sum(values[task] for task in OWN) / len(OWN)
        lines.append(f"| {name} | {values[PROTECTED]:.2f} | {own:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True, help="the measuring zoo")
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    args = parser.parse_args()
    found = measured(args.zoo)
    print(tables(found))
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
