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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harden_cases import cases, paths
from unmergeable.stock import load_module
from zoo_images import Images, read_fashion

CASES = ("embedded-fashion", "images-fmnist")
KEPT = Path(__file__).parent / "harden"
BATCH = 500


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
    rows = priced(args.work, args.zoo, images, labels)
    if args.keep:
        found = {"images": len(images), "rows": rows}
        (KEPT / f"price-{args.keep}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def priced(work: Path, zoo: Path, images: Images, labels: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Of every hardened model in the records there: what it has right beside its control."""
    known, rows = {one.name: one for one in cases()}, []
    for record in map(json.loads, (work / "records.jsonl").open(encoding="utf-8")):
        if record["kind"] != "training" or record["case"] not in CASES or record["variant"] == "control":
            continue
        name, report, case = f"{record['case']}-{record['seed']}", record["report"], known[record["case"]]
        before = paths(case, zoo, work)[1][case.protected]
        first, control, hardened = (
            right(model, images, labels)
            for model in (before, work / f"{name}-control", work / f"{name}-{record['variant']}")
        )
        apart = hardened.astype(float) - control
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


def right(model: Path, images: Images, labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Whether it names each image as it is labelled, (n,) booleans."""
    module: Any = load_module(model).eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            pixels = torch.from_numpy(images[start : start + BATCH].copy()).float()[:, None] / 255
            found.append(module(pixel_values=(pixels - 0.5) / 0.5).logits.argmax(-1).numpy())
    return np.concatenate(found) == labels


if __name__ == "__main__":
    main()
