"""Hardened models of the measuring zoo, judged by audits with experts and data that hardening never saw.

    python bench/harden.py -d WORK --zoo PATH                        # everything, hours even on a GPU
    python bench/harden.py -d WORK --zoo PATH --only images-fmnist --seeds 0 --top 1
    python bench/harden.py -d WORK --zoo PATH --only text-c --steps 300 --batch 8    # a reduced recipe, on two cores

For each protected task and seed: a control that is trained plainly for the same steps, and the hardened model, both
from the same fine-tune and on the same data; the audit's unprotected model is the control. One of the other
fine-tunes is the owner's stand-in, the rest are the thief's. Everything is fixed before training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import unmergeable as um
from audits import Setting, images, texts

IMAGES = ("fmnist", "mnist", "latin", "cyr")
TEXTS = ("c", "python", "js")
FAMILIES = {"text": "llama", "text2": "gpt2"}


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


def cases() -> Iterator[Case]:
    """Each task protected in turn; the next one of the list is the owner's stand-in."""
    for family, tasks in (("images", IMAGES), *((family, TEXTS) for family in FAMILIES)):
        for place, protected in enumerate(tasks):
            rest = [*tasks[place + 1 :], *tasks[:place]]
            yield Case(family, protected, rest[0], tuple(rest[1:]))


def paths(case: Case, zoo: Path) -> tuple[Path, dict[str, Path], Setting]:
    """The base under the protected task's head, models by task, and the setting of their audit."""
    tasks = (case.protected, *case.own)
    if case.family == "images":
        setting = images(zoo, tasks)
        return setting.base, {task: zoo / f"vit-{task}" for task in IMAGES}, setting
    prefix = FAMILIES[case.family]
    return (
        zoo / f"{prefix}-base",
        {task: zoo / f"{prefix}-{task}" for task in TEXTS},
        texts(zoo, prefix, tasks),
    )


def training(case: Case, zoo: Path) -> tuple[Path, str, dict[str, Any]]:
    """What to train on: the file, the kind of task, and its fields."""
    if case.family == "images":
        arrays = {"images": f"{case.protected}_images", "labels": f"{case.protected}_labels"}
        return zoo / "vit-train.npz", "image-classification", {**arrays, "mean": 0.5, "std": 0.5}
    return zoo / "text-train.npz", "language-modelling", {"field": case.protected}


def hardened(
    case: Case, zoo: Path, folder: Path, seed: int, objective: str, options: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """A hardened model, made once, and its report."""
    target, record = folder / objective, folder / f"{objective}.json"
    if not record.exists():
        base, models, _ = paths(case, zoo)
        data, kind, fields = training(case, zoo)
        report = um.harden(
            models[case.protected], target, base=base, data=data, task=kind, fields=fields,
            proxies=[models[case.proxy]], objective=objective, seed=seed, **options,
        )  # fmt: skip
        record.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    return target, json.loads(record.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", "--work", type=Path, required=True, help="folder for models, rows and results")
    parser.add_argument("--zoo", type=Path, required=True, help="the measuring zoo")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names begin so")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--objective", default="trap")
    parser.add_argument("--top", type=int, default=3, help="the highest level of access")
    parser.add_argument("--strength", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--attacks", nargs="+", help="only these, as in an audit's configuration")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in ("steps", "rate", "batch") if getattr(args, name)}
    given["device"] = args.device
    for case in cases():
        if not case.name.startswith(tuple(args.only)):
            continue
        for seed in args.seeds:
            folder = args.work / f"{case.name}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            control, plain = hardened(case, args.zoo, folder, seed, "plain", given)
            more = given if args.strength is None else {**given, "strength": args.strength}
            model, trained = hardened(case, args.zoo, folder, seed, args.objective, more)
            _, models, setting = paths(case, args.zoo)
            config = {
                "version": 1,
                "base": str(setting.base),
                "protected": {"model": str(model), "plain": str(control), "task": case.protected},
                "others": {task: str(models[task]) for task in case.own},
                "tasks": {task: dict(fields) for task, fields in setting.tasks.items()},
                "levels": list(range(args.top + 1)),
                "seed": seed + 100,
                "device": args.device,
                **({"attacks": args.attacks} if args.attacks else {}),
            }
            result = um.audit(config, folder / "audit", workers=args.workers, cache=args.work / "cache")
            shares = ", ".join(
                f"level {one.level}: {one.recovered:.3f} {one.interval}" for one in result.levels
            )
            alone = result.standalone
            print(
                f"{case.name}, seed {seed}: alone {alone['protected']:.4f} against {alone['plain']:.4f}; {shares}; "
                f"held out {plain['standalone']['after']:.4f} and {trained['standalone']['after']:.4f}; "
                f"{plain['seconds']:.0f} s plain, {trained['seconds']:.0f} s hardened",
                flush=True,
            )


if __name__ == "__main__":
    main()
