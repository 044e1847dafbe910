"""Audits of every lock on the embedded zoo and on the measuring zoo, and the tables of docs/results.md.

    python bench/audits.py -d WORK --docs docs/results.md                 # the embedded zoo alone
    python bench/audits.py -d WORK --zoo PATH --docs docs/results.md      # all of it, hours on two cores
    python bench/audits.py -d WORK --zoo PATH --only text-c               # names that begin so
    python bench/audits.py -d NEW --only embedded-exact --top 1 --timed   # from nothing, and how long that takes
    python bench/audits.py -d WORK --docs docs/results.md --readme README.md --tables   # of what bench/audits holds

Locks are drawn from a key and salts made of --seed. Rows are kept in WORK/cache: a run that was stopped goes on,
and the unprotected side of a setting is computed once for all of its locks. What was found is kept in bench/audits.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import harden_tables
import unmergeable as um
import zoo_tables
from audits_tables import document, readme
from unmergeable import zoo
from unmergeable.checkpoint import open_checkpoint
from unmergeable.plan import find_match
from unmergeable.spec import Spec

# How the protected model is made from its fine-tune: options of `lock`; None leaves it as it is.
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "exact": {"method": "exact"},
    "exact --scales": {"method": "exact", "scales": True},
    "gauge": {"method": "gauge"},
    "mergelock": {"method": "mergelock"},
    "params diagonal": {"method": "params", "options": {"form": "diagonal"}},
    "params symmetric": {"method": "params", "options": {"form": "symmetric"}},
    "params nonsymmetric": {"method": "params", "options": {"form": "nonsymmetric"}},
    "params --prune-rate 0.2": {"method": "params", "prune_rate": 0.2},
    # As models are locked of which no more is proven, such as Gemma 4.
    "exact of MLPs alone": {"method": "exact", "kinds": ("mlp",)},
}
# What audits found, packed.
KEPT = Path(__file__).parent / "audits"
# Where the table of audits stands in a document.
BEGIN, END = "<!-- audits -->", "<!-- /audits -->"
MAIN = ("exact", "gauge", "mergelock", "params diagonal")


@dataclass(frozen=True)
class Case:
    """One audit.

    Attributes:
        setting: which models: a key of `settings`.
        method: a key of METHODS, or one of SCENARIOS.
        levels: of access.
    """

    setting: str
    method: str
    levels: tuple[int, ...]

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.setting}-{self.method}".replace(" --", "-").replace(" ", "-").replace(".", "")


@dataclass(frozen=True)
class Setting:
    """Models and tasks of one zoo.

    Attributes:
        base: path. models: fine-tunes by task, the protected one first. tasks: fields of their data.
        slice: what models are scored on, in words.
    """

    base: Path
    models: Mapping[str, Path]
    tasks: Mapping[str, Mapping[str, Any]]
    slice: str
    more: Mapping[str, Any] = field(default_factory=dict)


# Locks whose circumstances say that everything must come back, and one that thieves bring together.
SCENARIOS = {
    "same domain": "base, protected and own models locked in one domain; the thief has no key",
    "key": "the thief has the key: unlocked, then merged",
    "two releases": "the same fine-tune released twice, locked with one key and two salts",
}


def cases(zoo_path: Path | None) -> Iterator[Case]:
    """Every audit, the cheap ones first."""
    every = (0, 1, 2, 3)
    every_lock = (*MAIN, *(name for name in METHODS if name not in ("none", *MAIN)))
    for method in METHODS:
        yield Case("embedded", method, every if method in ("none", *MAIN) else (0, 1))
    for scenario in SCENARIOS:
        yield Case("embedded", scenario, (0, 1))
    if zoo_path is None:
        return
    for setting in ("text-c", "text-python", "text2-c", "text2-python", "images"):
        # The other forms of these locks differ little: on one text model and on images.
        for method in every_lock if setting in ("text-c", "images") else MAIN:
            yield Case(setting, method, (0, 1))
    for setting in ("text-c", "text2-c", "images"):
        yield Case(setting, "exact", every)


def settings(work: Path, zoo_path: Path | None) -> dict[str, Setting]:
    """Models by setting. The embedded zoo is copied out, for a lock wants a destination beside it."""
    found = {"embedded": embedded(work / "embedded")}
    if zoo_path is None:
        return found
    for name, family in (("text", "llama"), ("text2", "gpt2")):
        for protected, own in (("c", "python"), ("python", "js")):
            found[f"{name}-{protected}"] = texts(zoo_path, family, (protected, own))
    found["images"] = images(zoo_path, ("fmnist", "mnist", "cyr"), limit=500)
    return found


def embedded(folder: Path) -> Setting:
    """The embedded zoo, copied out."""
    if not folder.exists():
        zoo.copy_to(folder)
        for task in zoo.tasks():
            for split in ("test", "few"):
                images, labels = zoo.images(task, split)
                np.savez(folder / f"{task}-{split}.npz", images=images, labels=labels)
    protected = "fashion"
    order = [protected, *(task for task in zoo.tasks() if task != protected)]
    fields = {
        task: {
            "kind": "image-classification", "data": str(folder / f"{task}-test.npz"), "limit": 500,
            "mean": 0.5, "std": 0.5, "train": {"data": str(folder / f"{task}-few.npz")},
        }
        for task in order
    }  # fmt: skip
    return Setting(
        folder / zoo.BASE, {task: folder / task for task in order}, fields, "the first 500 test images a task"
    )


def texts(root: Path, family: str, tasks: Sequence[str]) -> Setting:
    """Language models of the measuring zoo; the first task is the protected one's."""
    fields = {
        task: {
            "kind": "language-modelling", "data": str(root / "text-test.npz"), "field": task, "limit": 64,
            "batch": 8,  # a fifth faster on a CPU than 64: logits stay in its caches
            "train": {"data": str(root / "text-train.npz"), "field": task},
        }
        for task in tasks
    }  # fmt: skip
    models = {task: root / f"{family}-{task}" for task in tasks}
    return Setting(
        root / f"{family}-base", models, fields, "the first 64 test windows (16,384 tokens) a task"
    )


def images(root: Path, tasks: Sequence[str], limit: int | None = None) -> Setting:
    """Image classifiers of the measuring zoo; the first task is the protected one's. limit: of test images."""
    fields = {
        task: {
            "kind": "image-classification", "data": str(root / "vit-test.npz"),
            "images": f"{task}_images", "labels": f"{task}_labels", "mean": 0.5, "std": 0.5,
            "train": {"data": str(root / "vit-train.npz"), "limit": 8000},
            **({"limit": limit} if limit else {}),
        }
        for task in tasks
    }  # fmt: skip
    return Setting(
        root / f"vit-base-{tasks[0]}-head", {task: root / f"vit-{task}" for task in tasks}, fields,
        f"the first {limit} test images a task" if limit else "all 1,000 test images a task",
    )  # fmt: skip


def owner(seed: int) -> um.Key:
    """A key that anybody can make: for measuring, never for a model."""
    return um.Key(hashlib.sha256(f"audits, seed {seed}".encode()).digest())


def salt(seed: int, name: str) -> bytes:
    """A salt that is the same in every run."""
    return hashlib.sha256(f"audits, seed {seed}, {name}".encode()).digest()


def locked(source: Path, folder: Path, name: str, seed: int, options: Mapping[str, Any]) -> Path:
    """A lock of a model, made once."""
    target = folder / f"{source.name}-{name.replace(' ', '-')}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        more: dict[str, Any] = {} if "domain" in options else {"salt": salt(seed, f"{source.name} {name}")}
        if "kinds" in options:
            more["spec"] = part_of(source, options["kinds"])
        um.lock(source, target, key=owner(seed), **more, **{k: v for k, v in options.items() if k != "kinds"})
    return target


def part_of(source: Path, kinds: Sequence[str]) -> Spec:
    """The spec of a model as if no other kinds of sites had been proven."""
    with open_checkpoint(source) as found:
        spec = find_match(found, None).spec
    sites = tuple(site for site in spec.sites if site.kind in kinds)
    left = {slot.tensor for site in spec.sites for slot in site.slots}
    left -= {slot.tensor for site in sites for slot in site.slots}
    return replace(spec, sites=sites, untouched=(*spec.untouched, *sorted(left)))


def configuration(case: Case, setting: Setting, folder: Path, seed: int) -> dict[str, Any]:
    """The audit of a case, as its YAML would say it."""
    protected, *own = setting.models
    plain = setting.models[protected]
    base, others = setting.base, {task: setting.models[task] for task in own}
    releases: list[str] = []
    if case.method in METHODS:
        options = METHODS[case.method]
        model = plain if options is None else locked(plain, folder, case.method, seed, options)
    elif case.method == "same domain":
        inside = {"domain": "house"}
        # The control stands in the coordinates of the others: merges of one that does not would fail.
        model = plain = locked(plain, folder, "domain", seed, inside)
        base = locked(base, folder, "domain", seed, inside)
        others = {task: locked(path, folder, "domain", seed, inside) for task, path in others.items()}
    elif case.method == "key":
        first, model = locked(plain, folder, "exact", seed, {}), folder / f"{plain.name}-unlocked"
        if not model.exists():
            um.unlock(first, model, key=owner(seed))
    else:
        model = locked(plain, folder, "exact", seed, {})
        releases = [str(locked(plain, folder, "second", seed, {}))]
    return {
        "version": 1,
        "base": str(base),
        "protected": {"model": str(model), "plain": str(plain), "task": protected, "releases": releases},
        "others": {task: str(path) for task, path in others.items()},
        "tasks": {task: dict(fields) for task, fields in setting.tasks.items()},
        "levels": list(case.levels),
        "seed": seed,
        "device": "cpu",
    }


def keep(case: Case, results: Path, places: Mapping[str, str]) -> None:
    """Keep a results.json beside this script, without the paths of a machine: tables are made of what is kept."""
    text = results.read_text(encoding="utf-8")
    for path, name in places.items():
        text = text.replace(path, name)
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{case.name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def clock(case: Case, result: um.AuditResult, workers: int) -> None:
    """Keep how long an audit took from nothing, beside this script."""
    path = KEPT / "times.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    document = result.as_dict()
    known[case.name] = {
        "levels": list(case.levels), "workers": workers, "rows": len(result.rows), "seconds": result.seconds,
        "machine": document["machine"], "tool": document["tool"],
    }  # fmt: skip
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def lacking(found: Mapping[str, tuple[Case, Mapping[str, Any]]]) -> list[str]:
    """Audits of this script that were not run, and levels of those that were."""
    wanted: dict[str, set[int]] = {}
    for case in cases(Path()):
        wanted.setdefault(case.name, set()).update(case.levels)
    lines = []
    for name, levels in wanted.items():
        have = {level["level"] for level in found[name][1]["levels"]} if name in found else set()
        if not have:
            lines.append(f"`{name}`")
        elif levels - have:
            lines.append(f"`{name}` at level {' and '.join(map(str, sorted(levels - have)))}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", "--work", type=Path, required=True, help="folder for locks, rows and results")
    parser.add_argument("--zoo", type=Path, help="the measuring zoo")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names begin so")
    parser.add_argument("--top", type=int, default=3, help="the highest level of access")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--budget", type=float, help="minutes an audit; what does not fit is left out, and said"
    )
    parser.add_argument(
        "--timed", action="store_true", help="keep how long the first one takes; WORK must be new"
    )
    parser.add_argument("--tables", action="store_true", help="run nothing, write the document")
    parser.add_argument("--docs", type=Path, help="document to write")
    parser.add_argument("--readme", type=Path, help="document whose table of audits is written")
    args = parser.parse_args()
    known = settings(args.work, args.zoo)
    chosen = dict.fromkeys(
        replace(case, levels=tuple(level for level in case.levels if level <= args.top))
        for case in cases(args.zoo)
        if case.name.startswith(tuple(args.only))
    )
    if args.timed and (args.work / "cache").exists():
        parser.error("--timed takes a new folder: rows that are known cost nothing")
    for case in () if args.tables else chosen:
        began = time.monotonic()
        folder = args.work / case.name
        config = configuration(case, known[case.setting], args.work / "locks" / case.setting, args.seed)
        result = um.audit(config, folder, workers=args.workers, cache=args.work / "cache", budget=args.budget)
        shares = ", ".join(f"level {one.level}: {one.recovered:.3f}" for one in result.levels)
        if args.timed:
            clock(case, result, args.workers)
            break  # the next one would find rows that it shares with this one
        keep(case, folder / "results.json", {str(args.work): "WORK", str(args.zoo): "ZOO"})
        print(f"{case.name}: {shares} ({time.monotonic() - began:.0f} s)", flush=True)
    earlier = KEPT / "zoo-tables.json"
    if args.zoo is not None and not args.tables and not earlier.exists() and "".startswith(tuple(args.only)):
        earlier.write_text(json.dumps(zoo_tables.measured(args.zoo), indent=1) + "\n", encoding="utf-8")
    found = {}
    for case in cases(Path()):
        path = KEPT / f"{case.name}.json.gz"
        if path.exists():
            found[case.name] = case, json.loads(gzip.decompress(path.read_bytes()))
    if args.docs is not None:
        slices = {name: setting.slice for name, setting in settings(args.work, Path()).items()}
        before = (
            zoo_tables.tables(json.loads(earlier.read_text(encoding="utf-8"))) if earlier.exists() else None
        )
        hardening = harden_tables.section(KEPT.parent / "harden")
        kept = KEPT / "times.json"
        times = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        text = document(found, slices, SCENARIOS, args.seed, before, lacking(found), hardening, times)
        args.docs.write_text(text, encoding="utf-8")
    if args.readme is not None:
        text = args.readme.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        args.readme.write_text(
            f"{head}{BEGIN}\n{readme(found)}\n{END}{rest.partition(END)[2]}", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
