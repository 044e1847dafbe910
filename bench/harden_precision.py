"""What a step of hardening takes beside one of plain training, in float32 and in bfloat16, on one core of this machine.

    python bench/harden_precision.py --zoo PATH --keep NAME

Passes forward and backward alone, in CPU seconds of one thread: the median of rounds in which all are taken in turn. A
CPU may be slower with it, even one that has such arithmetic. "attention too" is a plain step with attention in bfloat16
as well, where `harden` has it in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from harden_cases import cases, opened, paths
from harden_kept import keep_document
from unmergeable.harden.attention import attending
from unmergeable.harden.defaults import OBJECTIVE
from unmergeable.harden.wrapper import Hardening
from unmergeable.stock import load_module

CASES = {"embedded-fashion": 64, "images-cyr": 64, "text-c": 16}  # and the examples in a batch, as by default
ROUNDS = 9
TOO = "bf16, attention too"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True, help="the measuring zoo")
    parser.add_argument("--keep", metavar="NAME", help="keep what was found in bench/harden, of a machine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {one.name: one for one in cases()}
    rows = []
    for name, size in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(timed(known[name], size, args.zoo, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    if args.keep:
        found = {"machine": machine(), "rounds": ROUNDS, "rows": rows}
        keep_document(f"precision-{args.keep}", found)


def timed(case: Any, size: int, zoo: Path, work: Path) -> dict[str, Any]:
    """Median CPU seconds of a step, by way and precision."""
    base, models, _ = paths(case, zoo, work)
    module: Any = load_module(models[case.protected]).train()
    text = case.family == "text"
    objective = OBJECTIVE.get("language-modelling" if text else "image-classification", "trap")
    hardening = Hardening(module, base, objective, proxies=[models[case.proxy]])
    batch = opened(case, zoo, models[case.protected]).evaluation[torch.arange(size)]
    inputs = {**batch.inputs, "labels": batch.inputs["input_ids"] if text else batch.labels}
    device = torch.device("cpu")
    kinds: dict[str, tuple[bool, Callable[..., Any]]] = {
        "fp32": (False, nullcontext),
        "bf16": (True, attending),
        TOO: (True, nullcontext),
    }
    spent: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):
        for way in ("plain", "hardened"):
            for kind, (half, attention) in kinds.items():
                if (way, kind) == ("hardened", TOO):
                    continue  # what hardening adds has it in float32 by itself
                began = time.process_time()
                hardening.begin(number)  # the same merges in all of them
                with attention(device):
                    with torch.autocast("cpu", torch.bfloat16, enabled=half):
                        loss = module(**inputs).loss
                    loss.backward()
                    if way == "hardened":
                        with torch.autocast("cpu", torch.bfloat16, enabled=half):
                            hardening.backward(inputs)
                module.zero_grad()
                if number:  # the first round warms up
                    spent.setdefault(f"{way}, {kind}", []).append(time.process_time() - began)
    seconds = {name: median(found) for name, found in spent.items()}
    return {"case": case.name, "objective": objective, "batch": size, "seconds": seconds}


def machine() -> str:
    """The processor and what of bfloat16 it has, in words."""
    known = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    maker = [name for name in ("AuthenticAMD", "GenuineIntel") if name in known]
    has = [name for name in ("avx512_bf16", "amx_bf16") if name in known] or ["no bfloat16 arithmetic"]
    return ", ".join(("one core", platform.machine(), *maker, *has, f"torch {torch.__version__}"))


if __name__ == "__main__":
    main()
