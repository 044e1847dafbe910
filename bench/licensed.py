"""What changes for licensed users of a locked model: quantisation, training, adapters, dtypes, domains.

    python bench/licensed.py --zoo DIR -o bench/results/licensed.json --docs docs/licensed-users.md

Writes JSON after every part, and Markdown beside it; a part that is not run is kept from an earlier file. All
locks are drawn from the seed, so the figures come out again on the same kind of machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from licensed_models import Images, Subject, Text
from licensed_parts import PARTS, Bench
from licensed_tables import fill, markdown

MACHINE = "2 x86-64 cores, CPU, one thread"
SKIPPED = {"images": ("adapters", "domains")}  # the embedded images stand for them, at a tenth of the work


def subjects(zoo: Path | None) -> dict[str, Subject]:
    """The models that are measured; the embedded ones are images alone."""
    found: dict[str, Subject] = {} if zoo is None else {"text": Text(zoo), "images": Images(zoo)}
    return {**found, "embedded": Images(None)}


def facts(subject: Subject) -> dict[str, Any]:
    """What a reader of the figures needs to know of their subject."""
    names = ("name", "own", "new", "learnt", "metric", "slice", "data", "rate", "adapter_rate")
    return {name: getattr(subject, name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, help="the measuring zoo, beside the embedded one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--locks", type=int, default=3, help="locks a quantised score is taken over")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument(
        "--parts", help=f"of {', '.join(PARTS)} (default: all; images without adapters and domains)"
    )
    parser.add_argument(
        "--subjects", help="of text, images (both of --zoo) and embedded (default: all there are)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="JSON; the Markdown is written beside it"
    )
    parser.add_argument("--docs", type=Path, help="also fill the tables of this document")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the figures do not depend on the number of cores
    logging.set_verbosity_error()
    zoo = "" if args.zoo is None else " --zoo ZOO"
    own = "".join(
        f" --{n} {getattr(args, n)}" for n in ("locks", "steps") if getattr(args, n) != parser.get_default(n)
    )
    document: dict[str, Any] = {
        "document": "unmergeable.licensed",
        "version": 1,
        "command": f"python bench/licensed.py{zoo} --seed {args.seed}{own}",
        "seed": args.seed,
        "machine": MACHINE,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
        "subjects": {},
    }
    if args.output.exists():
        document["subjects"] = json.loads(args.output.read_text())["subjects"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    chosen = subjects(args.zoo)
    for kind in (args.subjects or ",".join(chosen)).split(","):
        subject = chosen[kind]
        entry = document["subjects"].setdefault(kind, {"parts": {}, "seconds": {}})
        entry["facts"] = facts(subject)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), args.seed, args.locks, args.steps)
            usual = [part for part in PARTS if part not in SKIPPED.get(kind, ())]
            for part in usual if args.parts is None else filter(None, args.parts.split(",")):
                started = time.monotonic()
                entry["parts"][part] = PARTS[part](bench, subject)
                entry["seconds"][part] = round(time.monotonic() - started, 1)
                args.output.write_text(json.dumps(document, indent=1) + "\n")
                print(f"{kind} {part}: {entry['seconds'][part]} s", flush=True)
    done = [part for part in PARTS if any(part in entry["parts"] for entry in document["subjects"].values())]
    text = "\n\n".join(f"## {part}\n\n{markdown(document, part)}" for part in done)
    args.output.with_suffix(".md").write_text(text + "\n")
    if args.docs is not None:
        args.docs.write_text(fill(args.docs.read_text(), document))


if __name__ == "__main__":
    main()
