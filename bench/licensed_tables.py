"""Markdown tables of what `licensed.py` measured, and where they go in a document."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

Entry = Mapping[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float, metric: str) -> str:
    return f"{value:.3f}" if metric != "accuracy" else f"{value:.3f}".removeprefix("0")


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def quantise(found: Entry, subject: Entry) -> str:
    metric = subject["metric"]
    worst = min if metric == "accuracy" else max
    rows = []
    for variant, entry in found.items():
        cells = []
        for values in entry["scores"].values():
            cell = _number(median(values), metric)
            cells.append(cell + (f" ({_number(worst(values), metric)})" if len(values) > 1 else ""))
        rows.append([variant, *cells, f"{median(entry['distance from base']):.1f}"])
    names = list(next(iter(found.values()))["scores"])
    return table(["locked by", *names, "‖θ′ − θ₀‖ / ‖θ − θ₀‖"], rows)


def train(found: Entry, subject: Entry) -> str:
    metric, rows = subject["metric"], []
    for variant, entry in found.items():
        losses, back = entry["losses"], entry.get("unlocked")
        rows.append(
            [
                variant,
                *(f"{mean(losses[part]):.3f}" for part in (slice(10), slice(25, 35), slice(-10, None))),
                "" if variant.endswith("batches") else _small(entry["largest difference of losses"]),
                f"{_number(entry['before'], metric)} → {_number(entry['after'], metric)}",
                _number(back["score"], metric) if back else "",
                _small(back["difference"]) if back else "",
            ]
        )
    steps = len(next(iter(found.values()))["losses"])
    head = ["trained from", "loss, steps 1–10", "26–35", f"{steps - 9}–{steps}", "largest difference"]
    return table([*head, f"{metric} on {subject['new']}", "unlocked", "its outputs differ by"], rows)


def adapters(found: Entry, subject: Entry) -> str:
    metric, rows = subject["metric"], []
    for variant, entry in found.items():
        if not isinstance(entry, dict):
            continue
        cells = [
            _number(entry[kind][task], metric) if task in entry.get(kind, {}) else ""
            for task in ("own", "new")
            for kind in ("without", "with")
        ]
        trained = entry.get("trained on it")
        rows.append([variant, *cells, _number(trained["new"], metric) if trained else ""])
    own, new = subject["own"], subject["learnt"]
    head = ["model", f"{own}", f"{own}, base's adapter", f"{new}", f"{new}, base's adapter"]
    return table([*head, f"{new}, adapter trained on this model"], rows)


def dtypes(found: Entry, subject: Entry) -> str:
    stored = found["stored"]
    floor = found["none"]["native, against float32"]
    rows = [
        [
            f"none, {stored} against float32",
            f"{_small(floor['difference'])}, {floor['argmax']:.3f}",
            "",
            "",
            "",
        ]
    ]
    for variant, entry in found.items():
        if variant in ("stored", "none"):
            continue
        kinds = ("stored and run in it", "stored in it, run in float32", "--dtype float32")
        cells = [f"{_small(entry[kind]['difference'])}, {entry[kind]['argmax']:.3f}" for kind in kinds]
        rows.append([variant, *cells, _small(entry["states"])])
    head = ["locked by", f"stored and run in {stored}", f"stored in {stored}, run in float32"]
    return table([*head, "--dtype float32, run in float32", "states between blocks (column 3)"], rows)


def domains(found: Entry, subject: Entry) -> str:
    metric, rows = subject["metric"], []

    def scores(entry: Entry) -> str:
        return " / ".join(_number(value, metric) for value in entry.values())

    for variant, entry in found.items():
        for merge, values in entry.items():
            if variant == "none":
                rows.append(["not locked", merge, scores(values), "", "", ""])
                continue
            cells = [scores(values["scores"])]
            if "unlocked" in values:
                cells += [scores(values["unlocked"]), _small(values["difference"])]
                cells.append(f"{values['weights that differ']:.2%}".replace("0.00%", "0"))
            rows.append([variant, merge, *cells, *[""] * (4 - len(cells))])
    head = ["locked by", "merge", f"{subject['own']} / {subject['new']}", "unlocked by --manifest"]
    return table([*head, "differs from the merge of the originals by", "weights that differ"], rows)


RATES = {"train": "rate", "adapters": "adapter_rate"}
TABLES = {"quantise": quantise, "train": train, "adapters": adapters, "dtypes": dtypes, "domains": domains}


def markdown(document: Entry, part: str) -> str:
    """The tables of one part, one for every subject that has it, with how they were made."""
    blocks = [f"`{document['command']}`, seed {document['seed']}, {document['machine']}."]
    for subject in document["subjects"].values():
        if part in subject["parts"]:
            facts = subject["facts"]
            caption = f"**{facts['name']}**, {facts['metric']}, {facts['slice']}"
            if part in RATES:
                caption += f"; rate {facts[RATES[part]]:g}, {facts['data']}"
            caption += ":"
            blocks += [caption, TABLES[part](subject["parts"][part], facts)]
    return "\n\n".join(blocks)


def fill(text: str, document: Entry) -> str:
    """A document with the tables between `<!-- table: PART -->` and `<!-- end -->` replaced."""

    def one(found: re.Match[str]) -> str:
        part = found[1]
        return f"<!-- table: {part} -->\n\n{markdown(document, part)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", one, text, flags=re.DOTALL)
