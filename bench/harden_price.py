"""What hardening costs a model of clothes by itself, on all 10,000 test images of Fashion-MNIST.

    python bench/harden_price.py -d WORK --zoo PATH --fashion DIR --keep NAME

An audit scores 500 or 1,000 images, of which a point is five or ten: with them a price of a point cannot be told from
none. WORK is that of bench/harden.py: of every hardened model of `embedded-fashion` or `images-fmnist` in its records
the accuracy, its control's and that of the fine-tune as it was, and the mean difference to the control with its
standard error, image by image. DIR is the folder of t10k-images-idx3-ubyte.gz (Debian's dataset-fashion-mnist).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from harden_cases import cases, paths, tensors
from unmergeable.stock import load_module
from zoo_images import read_fashion

CASES = ("embedded-fashion", "images-fmnist")
KEPT = Path(__file__).parent / "harden"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", "--work", type=Path, required=True, help="of bench/harden.py")
    parser.add_argument("--zoo", type=Path, required=True, help="the measuring zoo")
    parser.add_argument("--fashion", type=Path, required=True, help="folder of Fashion-MNIST's .gz files")
    parser.add_argument("--keep", metavar="NAME", help="keep what was found in bench/harden under this name")
    args = parser.parse_args()
    images, labels = read_fashion(args.fashion, "t10k")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "t10k.npz"
        np.savez(data, images=images, labels=labels)
        rows = priced(args.work, args.zoo, data)
    if args.keep:
        found = {"images": len(images), "rows": rows}
        (KEPT / f"price-{args.keep}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def priced(work: Path, zoo: Path, data: Path) -> list[dict[str, Any]]:
    """Of every hardened model in the records there: what it has right beside its control."""
    known, rows = {one.name: one for one in cases()}, []
    for record in map(json.loads, (work / "records.jsonl").open(encoding="utf-8")):
        if record["kind"] != "training" or record["case"] not in CASES or record["variant"] == "control":
            continue
        name, report, case = f"{record['case']}-{record['seed']}", record["report"], known[record["case"]]
        before = paths(case, zoo, work)[1][case.protected]
        first, control, hardened = (
            right(model, data)
            for model in (before, work / f"{name}-control", work / f"{name}-{record['variant']}")
        )
        apart = hardened - control
        row = {
            **{field: record[field] for field in ("case", "seed", "variant")},
            **{field: report[field] for field in ("objective", "strength", "steps", "batch", "rate")},
            "fine-tune": float(first.mean()),
            "control": float(control.mean()),
            "hardened": float(hardened.mean()),
            "difference": float(apart.mean()),
            "error": float(apart.std(ddof=1) / len(apart) ** 0.5),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


@cache
def right(model: Path, data: Path) -> Any:
    """Whether it names each image as it is labelled, (n,) of 0 and 1."""
    task = tensors(
        "fashion", {"kind": "image-classification", "data": str(data), "mean": 0.5, "std": 0.5}, model
    )
    return task.score(load_module(model).eval(), range(len(task)))


if __name__ == "__main__":
    main()
