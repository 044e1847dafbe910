"""What hardening does to a model beside its merges: calibration, quantisation, rounding, and training it further.

    python bench/harden_effects.py --zoo PATH --case images-fmnist --way mined+collapse \\
        --control WORK/images-fmnist-0-control --hardened WORK/images-fmnist-0-mined+collapse --keep NAME

Both models are scored on the test examples. A licensed user's own training is plain AdamW on the task's training
data, and on another task's under that task's head: how well the user does from the hardened model, against the
control and, for the other task, the base. Of the embedded zoo the other task's training data are the few images that
the package carries. Adapters are not measured.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harden_cases import BARS, Case, cases, descend, opened, paths, tensors
from harden_kept import keep_document
from unmergeable.stock import load_module
from unmergeable.tasks.task import IGNORED, TensorTask

BINS = 15
STEPS, RATE = {"embedded": 100, "images": 100, "text": 60, "text2": 60}, 1e-4
BATCH = {"embedded": 64, "images": 64, "text": 4, "text2": 4}
OTHER_STEPS = {"embedded": 200, "images": 200, "text": 60, "text2": 60}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True, help="the measuring zoo")
    known = {one.name: one for one in cases()}
    parser.add_argument(
        "--case", required=True, choices=list(known), metavar="CASE", help="as bench/harden.py calls it"
    )
    parser.add_argument(
        "--way", required=True, choices=[one.name for one in BARS], help="how it was hardened"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--control", type=Path, required=True, help="in the WORK of bench/harden.py")
    parser.add_argument("--hardened", type=Path, required=True)
    parser.add_argument("--keep", help="keep what was found in bench/harden under this name")
    args = parser.parse_args()
    case = known[args.case]
    if case.family not in STEPS:
        parser.error(
            f"no side effects of {case.name}: adapters are not measured, only models of {', '.join(STEPS)}"
        )
    base, models, setting = paths(case, args.zoo, args.control.absolute().parent)
    task = tensors(case.protected, setting.tasks[case.protected], models[case.protected])
    found: dict[str, Any] = {
        "case": case.name,
        "way": args.way,
        "slice": setting.slice,
        "seed": args.seed,
        "models": {},
    }
    other = Case(case.family, case.own[0], case.proxy, ())
    for name, path in (("control", args.control), ("hardened", args.hardened)):
        row = measured(path, task)
        row["further on its own task"] = further(case, args.zoo, path, task, STEPS[case.family])
        row[f"further on {other.protected}"] = elsewhere(other, args.zoo, path, models, setting)
        found["models"][name] = row
        print(name, json.dumps(row), flush=True)
    found["models"]["base"] = {
        f"further on {other.protected}": elsewhere(other, args.zoo, base, models, setting)
    }
    print("base", json.dumps(found["models"]["base"]))
    if args.keep:
        keep_document(args.keep, found)


def measured(path: Path, task: TensorTask) -> dict[str, float]:
    """Score, calibration and loss as it is; scores with weights in int8 and in bf16."""
    module: Any = load_module(path)
    row = {"score": _score(module, task), **calibration(module, task)}
    rounded = copy.deepcopy(module)
    with torch.no_grad():
        for one in rounded.parameters():
            one.copy_(one.to(torch.bfloat16).float())
    row["score, weights in bf16"] = _score(rounded, task)
    with torch.no_grad():
        for one in module.parameters():
            if one.ndim > 1:
                one.copy_(int8(one))
    row["score, weights in int8"] = _score(module, task)
    return row


def int8(weight: torch.Tensor) -> torch.Tensor:
    """A matrix rounded to 255 levels, symmetric, one scale a row: what stock weight-only quantisers do."""
    flat = weight.flatten(1)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return ((flat / scale).round().clamp(-127, 127) * scale).reshape(weight.shape)


def calibration(module: Any, task: TensorTask) -> dict[str, float]:
    """Expected calibration error over 15 bins of equal width (arXiv 1706.04599), and the mean loss in nats."""
    sure, right, losses = [], [], []
    with torch.inference_mode():
        for batch in task.evaluation.batches(task.batch):
            logits = task.logits(module, batch).float().flatten(0, -2)
            labels = batch.labels.flatten()
            logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
            chances = logits.softmax(-1)
            top = chances.max(-1)
            sure.append(top.values.numpy())
            right.append((top.indices == labels).numpy())
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy())
    sureness, hits = np.concatenate(sure), np.concatenate(right)
    places = np.minimum((sureness * BINS).astype(int), BINS - 1)
    error = 0.0
    for place in range(BINS):
        inside = places == place
        if inside.any():
            error += float(inside.mean() * abs(sureness[inside].mean() - hits[inside].mean()))
    return {"ece": error, "loss": float(np.concatenate(losses).mean())}


def further(case: Case, zoo: Path, path: Path, task: TensorTask, steps: int) -> float:
    """The test score after more plain training on the task's own data, head and all."""
    module = load_module(path)
    data = opened(case, zoo, path)
    options = {"rate": RATE, "steps": steps, "batch": BATCH[case.family], "seed": 7}
    descend(module, data, data.evaluation.labels, options)
    return _score(module, task)


def elsewhere(other: Case, zoo: Path, path: Path, models: dict[str, Path], setting: Any) -> float:
    """The test score on another task after training the body there, under that task's frozen head."""
    module: Any = load_module(path)
    if other.family in ("images", "embedded"):
        head = load_module(models[other.protected])
        head_state = {n: t for n, t in head.state_dict().items() if n.startswith("classifier.")}
        body = {n: t for n, t in module.state_dict().items() if n not in head_state}
        module = head
        module.load_state_dict({**body, **head_state})
        for name, one in module.named_parameters():
            one.requires_grad_(not name.startswith("classifier."))
    fields = setting.tasks[other.protected]
    if other.family == "embedded":  # the measuring zoo has other classes
        few = {**fields, **fields["train"]}
        del few["train"]
        data = tensors("data", few, models[other.protected])
    else:
        data = opened(other, zoo, models[other.protected])
    task = tensors(other.protected, fields, models[other.protected])
    options = {"rate": 2e-4, "steps": OTHER_STEPS[other.family], "batch": BATCH[other.family], "seed": 7}
    descend(module, data, data.evaluation.labels, options)
    return _score(module, task)


def _score(module: Any, task: TensorTask) -> float:
    module.eval()
    return float(task.score(module, range(len(task))).mean())


if __name__ == "__main__":
    main()
