"""Hardened models of the measuring zoo, judged by audits with experts and data that hardening never saw.

    python bench/harden.py -d WORK --zoo PATH                              # everything, hours even on a GPU
    python bench/harden.py -d WORK --zoo PATH --groups bars --only images-fmnist --seeds 0
    python bench/harden.py -d WORK --zoo PATH --only text-c --steps 300 --batch 8    # a reduced recipe, on two cores

Groups: `bars`, each task protected in turn, against a control that is trained plainly for the same steps on the same
data, which is the audit's unprotected model; `strengths`, fixed strengths of the trap; `directions`, without another
fine-tune of the owner's, or with it alone; `ideas`, those of bench/frontier_ideas.py against labels and distillation;
`locked`, the bars once more with an exact lock on top; `peft`, merges of adapters by peft's own methods. One of the
other fine-tunes is the owner's stand-in, the rest are the thief's. The weights that are judged are read again from
disk. With --keep, what was found is kept in bench/harden; bench/audits.py writes its tables.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import frontier_ideas
import unmergeable as um
from audits import locked
from harden_cases import (
    ANSWERS,
    ATTACKS,
    BARS,
    CONTROL,
    DIRECTIONS,
    LOCKED,
    RECIPES,
    SIMPLE,
    TRAINED,
    TRAP,
    WAYS,
    Case,
    Variant,
    adapter,
    cases,
    paths,
    shuffled,
    training,
)
from harden_kept import KEPT
from harden_peft import merges
from harden_records import EDITION
from parallel import Job, run
from unmergeable.audit.bench import pick_device
from unmergeable.audit.suite import access
from unmergeable.harden.objectives import Objective

GROUPS = ("bars", "locked", "strengths", "directions", "ideas", "peft")
STRENGTHS = (0.08, 0.3, 1.0)
IDEAS_ON = ("embedded-fashion",)


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    record = args.work / "records.jsonl"
    known = {json.loads(line)["name"] for line in record.open()} if record.exists() else set()
    began = time.monotonic()
    for job, found in run(planned(args), args.workers, args.minutes, known):
        said = found if isinstance(found, str) else found["said"]
        print(f"{time.monotonic() - began:6.0f} s  {job.name}: {said}", flush=True)
        if not isinstance(found, str):
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": job.name, **found}) + "\n")
    if args.keep is not None:
        keep(record, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", "--work", type=Path, required=True, help="folder for models, rows and results")
    parser.add_argument("--zoo", type=Path, required=True, help="the measuring zoo")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names begin so")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="a recipe's, if not given")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument(
        "--adapter", nargs=3, type=float, metavar=("STEPS", "BATCH", "RATE"), help="how adapters are made"
    )
    parser.add_argument("--strength", type=float, help="fixed; else it follows what simulated merges keep")
    parser.add_argument("--may", type=float, help="what they may keep; a recipe's, if not given")
    parser.add_argument(
        "--ways", nargs="+", choices=[one.name for one in BARS], help="of the bars; a family's, if not given"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--workers", type=int, default=2, help="processes; each has one thread")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many")
    parser.add_argument("--ideas", nargs="+", default=list(frontier_ideas.IDEAS), help="only these")
    parser.add_argument("--trained", nargs="+", default=list(TRAINED), help="attacks on ideas")
    parser.add_argument(
        "--attacks", nargs="+", default=list(ATTACKS), help="of the bars; `all`: the whole suite"
    )
    parser.add_argument("--top", type=int, default=2, help="the highest level of access of the bars")
    parser.add_argument("--keep", metavar="NAME", help="keep what was found in bench/harden under this name")
    parser.add_argument("--about", metavar="TEXT", default="", help="on which machine, for the tables")
    return parser.parse_args()


def planned(args: argparse.Namespace) -> list[Job]:
    """All jobs, what matters most first: the bars seed by seed, ideas, directions and strengths."""
    place = {"zoo": args.zoo, "work": args.work, "device": args.device}
    chosen = [case for case in cases() if case.name.startswith(tuple(args.only))]
    reduced = {name: getattr(args, name) for name in ("steps", "batch") if getattr(args, name)}
    made = reduced
    if args.adapter:
        made = {"steps": int(args.adapter[0]), "batch": int(args.adapter[1]), "rate": args.adapter[2]}
    given = {**reduced, "precision": args.precision, "strength": args.strength}
    given |= {name: getattr(args, name) for name in ("rate", "may") if getattr(args, name)}
    found: dict[str, tuple[float, Job]] = {}

    def plan(rank: float, job: Job) -> str:
        if job.name not in found or rank < found[job.name][0]:
            found[job.name] = rank, job
        return job.name

    def bars(case: Case) -> list[Variant]:
        named = args.ways or WAYS.get(case.family, ("trap",))
        return [one for one in BARS if {"bars", "locked", "peft"} & set(args.groups) and one.name in named]

    def train(rank: float, case: Case, variant: Variant, seed: int) -> str:
        after = ()
        if case.family == "lora":
            tasks = (case.protected, case.proxy, *case.own)
            after = tuple(
                plan(0, Job(f"adapter-{task}", learnt, {"case": Case("lora", task, "", ()), "given": made, **place}))
                for task in tasks
            )  # fmt: skip
        ways = [one for one in bars(case) if one.options != ANSWERS] if args.strength is None else []
        if variant == CONTROL and ways:
            variant = ways[0]
        own = {"case": case, "variant": variant, "seed": seed, "given": given, **place}
        own["control"] = variant in ways[:1]  # its strength follows, and comes with a control
        return plan(rank, Job(f"{case.name}-{seed}-{variant.name}", harden, own, after))

    def judge(
        rank: float, case: Case, variant: Variant, seed: int, attacks: list[str], top: int, *after: str,
        lock: bool = False,
    ) -> str:  # fmt: skip
        pair = (train(rank, case, CONTROL, seed), train(rank, case, variant, seed))
        own = {
            "case": case,
            "variant": variant,
            "seed": seed,
            "attacks": attacks,
            "top": top,
            "lock": lock,
            **place,
        }
        name = f"{pair[1]}{'-locked' * lock}-audit-{top}"
        return plan(rank, Job(name, audit, own, (*pair, *after)))

    for seed in args.seeds:
        for case in chosen:
            rank = 1 + seed + (2.5 if case.family == "lora" and seed != args.seeds[0] else 0)
            first, shown = (
                seed == args.seeds[0],
                case.protected in ("fashion", "fmnist", "c") and case.family != "lora",
            )
            for way in bars(case):
                if "bars" in args.groups:
                    judge(rank, case, way, seed, args.attacks, args.top)
                if "locked" in args.groups:
                    judge(rank + 0.1, case, way, seed, args.attacks, args.top, lock=True)
                if "peft" in args.groups and case.family == "lora":
                    sides = (train(rank, case, CONTROL, seed), train(rank, case, way, seed))
                    own = {"case": case, "variant": way, "seed": seed, **place}
                    plan(rank + 0.5, Job(f"{sides[1]}-peft", by_peft, own, sides))
            if "ideas" in args.groups and first and case.name in IDEAS_ON:
                before = judge(1, case, TRAP, seed, args.trained, 3)
                for idea in args.ideas:
                    judge(1.5, case, Variant(idea, idea), seed, args.trained, 3, before)
            if "directions" in args.groups and first and shown:
                for variant in DIRECTIONS:
                    judge(4, case, variant, seed, args.attacks, args.top)
            if "strengths" in args.groups and first and shown:
                for strength in STRENGTHS:
                    variant = Variant(f"strength-{strength:g}", options={"strength": strength})
                    judge(5, case, variant, seed, args.attacks, args.top)
    return [job for _, job in sorted(found.values(), key=lambda one: one[0])]


# --- jobs ---------------------------------------------------------------------------------------------------


def learnt(case: Case, given: dict[str, Any], zoo: Path, work: Path, device: str) -> dict[str, Any]:
    """An adapter to protect, or of a thief."""
    quick()
    began = time.monotonic()
    adapter(case, zoo, work / f"adapter-{case.protected}", pick_device(device), **given)
    return {"kind": "adapter", "seconds": time.monotonic() - began, "said": "trained"}


def quick() -> None:
    """Matrix products in TF32 where the GPU has it, of trainings and of audits."""
    torch.set_float32_matmul_precision("high")


def harden(
    case: Case,
    variant: Variant,
    seed: int,
    given: dict[str, Any],
    control: bool,
    zoo: Path,
    work: Path,
    device: str,
) -> dict[str, Any]:
    """A hardened model, or its control, or both, and what its owner sees."""
    quick()
    base, models, _ = paths(case, zoo, work)
    data, kind, fields = training(case, zoo)
    proxies = [models[case.proxy]] if variant.proxies is True else []
    if variant.proxies == "shuffled":
        proxies = [shuffled(case, zoo, work, pick_device(device), one) for one in (seed, seed + 1)]
    objective: str | Objective = variant.objective
    if isinstance(objective, str) and objective in frontier_ideas.IDEAS:
        objective = frontier_ideas.objective(objective, SIMPLE)
    options = {**RECIPES[case.family], **given, **variant.options}
    if variant == CONTROL or options.get("strength") is not None:
        options.pop("may", None)
    if control:
        options["control"] = work / f"{case.name}-{seed}-{CONTROL.name}"
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    report = um.harden(
        models[case.protected], work / f"{case.name}-{seed}-{variant.name}", base=base, data=data, task=kind,
        fields=fields, proxies=proxies, objective=objective, seed=seed, device=device, **options,
    ).as_dict()  # fmt: skip
    for path in ("expert", "base", "dst", "data", "proxies"):
        del report[path]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    score, exposure = report["standalone"], report["exposure"]["after"]["mean"]
    return {
        "kind": "training", "case": case.name, "seed": seed, "variant": variant.name, "report": report, "peak": peak,
        "said": f"{score['before']:.4f} -> {score['after']:.4f}, exposure {exposure:.3f}, {report['seconds']:.0f} s",
    }  # fmt: skip


def audit(
    case: Case,
    variant: Variant,
    seed: int,
    attacks: list[str],
    top: int,
    lock: bool,
    zoo: Path,
    work: Path,
    device: str,
) -> dict[str, Any]:
    """An audit of a hardened model or its lock, against its control; draws and subsets are not those of training."""
    quick()
    _, models, setting = paths(case, zoo, work)
    released = work / f"{case.name}-{seed}-{variant.name}"
    if lock:
        released = locked(released, work / "locks", "exact", seed, {"method": "exact"})
    config = {
        "version": 1,
        "base": str(setting.base),
        "protected": {
            "model": str(released),
            "plain": str(work / f"{case.name}-{seed}-{CONTROL.name}"),
            "task": case.protected,
        },
        "others": {task: str(models[task]) for task in case.own},
        "tasks": {task: dict(fields) for task, fields in setting.tasks.items()},
        "levels": list(range(top + 1)),
        "seed": seed + 100,
        "device": device,
        **({} if attacks == ["all"] else {"attacks": [name for name in attacks if access(name) <= top]}),
    }
    way = variant.name + LOCKED * lock
    folder = work / f"audit-{case.name}-{seed}-{way}-{top}"
    found = um.audit(config, folder, workers=1, cache=work / "cache").as_dict()
    shares = ", ".join(f"{one['level']}: {one['recovered']:.3f} {one['interval']}" for one in found["levels"])
    alone = found["standalone"]
    return {
        "kind": "audit", "case": case.name, "seed": seed, "variant": way, "slice": setting.slice,
        "whole": attacks == ["all"], "found": brief(found),
        "said": f"alone {alone['protected']:.4f} against {alone['plain']:.4f}; {shares}; {found['seconds']:.0f} s",
    }  # fmt: skip


def by_peft(case: Case, variant: Variant, seed: int, zoo: Path, work: Path, device: str) -> dict[str, Any]:
    """Merges of the hardened adapter, and of its control, by every method of peft."""
    base, models, setting = paths(case, zoo, work)
    began = time.monotonic()
    folders = {
        side: work / f"{case.name}-{seed}-{one.name}"
        for side, one in (("control", CONTROL), ("hardened", variant))
    }
    own, plain = models[case.own[0]], folders["control"]
    tasks = {name: setting.tasks[name] for name in (case.protected, case.own[0])}
    sides = {
        side: merges(base, folder, own, plain, tasks, pick_device(device), seed + 100)
        for side, folder in folders.items()
    }
    best = {side: max(row["test"]["joint"] for row in rows) for side, rows in sides.items()}
    return {
        "kind": "peft", "case": case.name, "seed": seed, "variant": variant.name, "rows": sides,
        "seconds": time.monotonic() - began,
        "said": ", ".join(f"{side} {joint:.3f}" for side, joint in best.items()),
    }  # fmt: skip


def brief(found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an audit: no paths, no grids."""
    rows = [
        {name: row[name] for name in ("chain", "side", "level", "state", "reason", "options", "test", "cost")}
        for row in found["rows"]
    ]
    kept = ("levels", "standalone", "machine", "suite", "rules", "seed", "seconds", "left_out", "notes")
    return {**{name: found[name] for name in kept if name in found}, "rows": rows}


def keep(record: Path, args: argparse.Namespace) -> None:
    """Keep records beside this script, with where and how they were made, without the paths of a machine."""
    KEPT.mkdir(exist_ok=True)
    places = {str(args.work): "WORK", str(args.zoo): "PATH"}
    given = iter(sys.argv[1:])
    command = ["python bench/harden.py"]
    for one in given:
        if one in ("--keep", "--about"):
            next(given)
        else:
            command.append(places.get(one, one))
    about = {"name": "about", "kind": "about", "text": args.about, "command": " ".join(command)}
    text = json.dumps({**about, "edition": EDITION}) + "\n" + record.read_text(encoding="utf-8")
    (KEPT / f"{args.keep}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
