"""The part of docs/results.md about hardening, of what bench/harden holds."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from audits_text import level_of, number, page, share, table

Record = Mapping[str, Any]

# What others publish, in their own words or figures: none of it was measured here.
PUBLISHED = (
    ("Trap², arXiv 2601.21898", "CLIP ViT-B/32 and L/14; full models, LoRA", "keeps the score alone, degrades merges"),
    ("ARF, arXiv 2606.30360", "CLIP ViT-B/32", "4.6 % of accuracy after task arithmetic, 27.4 % after its own attack"),
    ("MergeBarrier, arXiv 2511.10712", "CLIP ViT-B/32", "29.3 %, and 60.8 % after the attack of arXiv 2606.30360"),
    (
        "MergeGuard, arXiv 2511.11851", "CLIP ViT-L/14, Llama 2, Gemma 2, Mistral",
        "accuracy of merges falls by up to 90 %, alone by less than 1.5 %",
    ),
    ("TAR, arXiv 2408.00761", "language models", "safeguards that stand hundreds of steps of fine-tuning"),
    ("SOPHON, arXiv 2404.12699", "image models", "fine-tuning costs as much as training from nothing, or more"),
    ("arXiv 2412.07097", "evaluation", "such claims fall to small changes of an attack: hence the attacker's best"),
)  # fmt: skip


def section(kept: Path) -> str:
    """All tables of hardening, or nothing if nothing is kept."""
    sources = {
        path.name.removesuffix(".jsonl.gz"): [
            json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()
        ]
        for path in sorted(kept.glob("*.jsonl.gz"))
    }
    records = [{**record, "source": source} for source, found in sources.items() for record in found]
    if not records:
        return ""
    abouts = [record for record in records if record["kind"] == "about"]
    effects = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(kept.glob("*.json"))]
    return page(
        HEAD,
        "\n".join(f"- `{one['source']}`: {one['text']}\n\n      {one['command']}\n" for one in abouts),
        bars(records),
        labels(records),
        ideas(records),
        owners(records),
        adapters(records),
        prices(records),
        *(effect(one) for one in effects),
        page("### What others publish", table(("work", "models", "published, not measured here"), PUBLISHED)),
    )


def bars(records: list[Any]) -> str:
    """Every audit up to level 2, against its control."""
    lines, trainings = [], _trainings(records)
    for record in sorted(_audits(records, 1, 2), key=_key):
        alone = record["found"]["standalone"]
        trained = trainings.get(_key(record))
        strength = None if trained is None else trained["report"]["strength"]
        lines.append(
            (
                record["source"], record["case"], record["seed"], f"`{record['variant']}`", number(strength),
                number(alone["plain"], 4), number(alone["protected"], 4), _change(alone),
                *(share(level_of(record["found"], level)) for level in range(3)),
            )
        )  # fmt: skip
    header = (
        "run",
        "model",
        "seed",
        "way",
        "λ",
        "control",
        "hardened",
        "change",
        "level 0",
        "level 1",
        "level 2, by entropy",
    )
    return page("### Against thieves without labels", BARS, summary(records), EACH, table(header, lines))


def summary(records: list[Any]) -> str:
    """What several seeds of one task have in common: the mean change, and the worst of what was recovered."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for record in sorted(_audits(records, 1, 2), key=_key):
        groups.setdefault((record["source"], record["case"], record["variant"]), []).append(record["found"])
    lines = []
    for (source, case, variant), found in groups.items():
        if len(found) < 3:
            continue
        levels = [[one for one in (level_of(each, n) for each in found) if one is not None] for n in range(3)]
        worst = [number(max(one["recovered"] for one in level)) if level else "" for level in levels]
        limit = number(max(one["interval"][1] for one in levels[1]))
        change = sum(each["standalone"]["difference"] for each in found) / len(found)
        score = f"{number(100 * change, 1)} points"
        lines.append((source, case, f"`{variant}`", len(found), score, *worst[:2], limit, worst[2]))
    header = (
        "run",
        "model",
        "way",
        "seeds",
        "mean change",
        "level 0",
        "level 1",
        "its upper limit",
        "level 2, by entropy",
    )
    return table(header, lines)


def labels(records: list[Any]) -> str:
    """The trap against labels and distillation, row by row."""
    lines, recovered = [], []
    for record in _audits(records, 3):
        if record["variant"] != "trap":
            continue
        rows = _rows(record)
        for attack in dict.fromkeys(name for name, _ in rows):
            cells = [_value(rows.get((attack, side))) for side in ("protected", "plain", "without")]
            lines.append((record["source"], record["case"], f"`{attack}`", *cells))
        shares = (f"level {level} {share(level_of(record['found'], level))}" for level in (2, 3))
        recovered.append(f"{record['case']} ({record['source']}) {', '.join(shares)}")
    header = ("run", "model", "attack", "hardened", "control", "without either")
    about = LABELS.format(recovered="; ".join(recovered))
    return (
        page("### Against thieves with labels, or with inputs", about, table(header, lines)) if lines else ""
    )


def ideas(records: list[Any]) -> str:
    """Ideas against repair and distillation, side by side."""
    every = _audits(records, 3)
    several = {(one["source"], one["case"]) for one in every if one["variant"] != "trap"}
    audits = [one for one in every if (one["source"], one["case"]) in several]
    if not audits:
        return ""
    first = audits[0]
    shown = [name for name in dict.fromkeys(attack for attack, _ in _rows(first)) if _trained(name)]
    lines, rows = [], _rows(first)
    for side, name in (("without", "no protected model"), ("plain", "control")):
        cells = [_value(rows.get((attack, side))) for attack in shown]
        lines.append((f"({name})", "", "", _gain(rows, side), *cells))
    for record in audits:
        alone, rows = record["found"]["standalone"], _rows(record)
        cells = [_value(rows.get((attack, "protected"))) for attack in shown]
        lines.append(
            (
                f"`{record['variant']}`",
                _change(alone),
                number(_joint(record)),
                _gain(rows, "protected"),
                *cells,
            )
        )
    header = ("idea", "change", "joint without data", "gain", *(f"`{attack}`" for attack in shown))
    return page("### Ideas against repair and distillation", IDEAS, table(header, lines))


def owners(records: list[Any]) -> str:
    """What owners see: every training, on held-out examples."""
    lines = []
    for record in _trainings(records).values():
        report = record["report"]
        score, exposure = report["standalone"], report["exposure"]["after"]
        lines.append(
            (
                record["source"], record["case"], record["seed"], f"`{record['variant']}`",
                "" if report["objective"] == "plain" else number(report["strength"]),
                f"{report['steps']} × {report['batch']}", number(score["after"], 4), number(score.get("plain"), 4),
                number(exposure["mean"]),
            )
        )  # fmt: skip
    header = (
        "run",
        "model",
        "seed",
        "way",
        "λ at the end",
        "steps × batch",
        "held-out score",
        "plain",
        "exposure",
    )
    return page("### Every training, as its owner sees it", OWNERS, table(header, lines))


def adapters(records: list[Any]) -> str:
    """Merges by peft's own methods."""
    lines = []
    for record in records:
        if record["kind"] != "peft":
            continue
        sides = {side: {row["type"]: row["test"] for row in rows} for side, rows in record["rows"].items()}
        for kind in sides["control"]:
            cells = [_value(sides[side].get(kind)) for side in ("control", "trap")]
            lines.append((record["case"], record["seed"], f"`{kind}`", *cells))
    header = ("adapter", "seed", "`combination_type`", "control", "hardened")
    return page("### Adapters merged by peft", table(header, lines)) if lines else ""


def prices(records: list[Any]) -> str:
    """Time and memory beside plain training of the same steps."""
    lines, trainings = [], _trainings(records)
    for key, record in trainings.items():
        before = trainings.get((*key[:3], "control"))
        if record["variant"] != "trap" or before is None or not record["peak"]:
            continue
        seconds = [one["report"]["seconds"] for one in (before, record)]
        peaks = [one["peak"] / 2**20 for one in (before, record)]
        lines.append(
            (
                record["case"], record["seed"], f"{seconds[0]:.0f} s", f"{seconds[1]:.0f} s",
                number(seconds[1] / seconds[0], 1), f"{peaks[0]:.0f} MiB", f"{peaks[1]:.0f} MiB",
                number(peaks[1] / peaks[0]),
            )
        )  # fmt: skip
    header = ("model", "seed", "plain", "trap", "ratio", "peak, plain", "peak, trap", "ratio")
    return page("### What it costs", PRICES, table(header, lines)) if lines else ""


def effect(found: Mapping[str, Any]) -> str:
    """Side effects of one model."""
    models = found["models"]
    names = list(dict.fromkeys(name for row in models.values() for name in row))
    lines = [(name, *(number(models[model].get(name), 4) for model in models)) for name in names]
    head = f"### Side effects: {found['case']}"
    return page(head, EFFECTS.format(slice=found["slice"]), table(("", *models), lines))


# --- records ------------------------------------------------------------------------------------------------


def _audits(records: Iterable[Any], *tops: int) -> list[Any]:
    """Audits up to these levels of access."""
    audits = [record for record in records if record["kind"] == "audit"]
    return [one for one in audits if max(level["level"] for level in one["found"]["levels"]) in tops]


def _key(record: Record) -> tuple[Any, ...]:
    """Which model a training or an audit is of."""
    return tuple(record[name] for name in ("source", "case", "seed", "variant"))


def _trainings(records: Iterable[Any]) -> dict[tuple[Any, ...], Any]:
    return {_key(record): record for record in records if record["kind"] == "training"}


def _rows(record: Record) -> dict[tuple[str, str], Mapping[str, float]]:
    return {
        (" > ".join(row["chain"]), row["side"]): row["test"]
        for row in record["found"]["rows"]
        if row["test"] is not None and row["state"] == "done"
    }


def _joint(record: Record) -> float:
    """The best worse-of-both of merges without data."""
    return max(
        pair["joint"] for (attack, side), pair in _rows(record).items() if side == "protected" and not _trained(attack)
    )  # fmt: skip


def _gain(rows: Mapping[tuple[str, str], Mapping[str, float]], side: str) -> str:
    """What a side's model adds to a repair with 16 labels a class."""
    pair = [rows.get(("repair-16", one)) for one in (side, "without")]
    if side == "without" or pair[0] is None or pair[1] is None:
        return ""
    return number(pair[0]["protected"] - pair[1]["protected"])


def _trained(attack: str) -> bool:
    return attack.startswith(("repair", "distil", "untrap"))


def _value(pair: Mapping[str, float] | None) -> str:
    return "–" if pair is None else f"{number(pair['protected'])}, {number(pair['own'])}"


def _change(alone: Mapping[str, Any]) -> str:
    """Of the score alone: points of accuracy, or per cent of the cross-entropy; better is positive."""
    if alone["plain"] < 0:
        return f"{number(100 * alone['difference'] / abs(alone['plain']))} %"
    return f"{number(100 * alone['difference'], 1)} points"


HEAD = """
## Hardening

What `harden` makes of the same fine-tunes, judged by audits with models and data that hardening never saw; the
unprotected model is a control that was trained plainly for as many steps on the same data. `python bench/harden.py`
and `python bench/harden_effects.py` made what is kept in `bench/harden`; this section is written from it. Runs:
"""
BARS = """
*level n*: recovered, as above. *change*: of the score alone against the control's, better is positive. These audits
run a part of the suite (`ATTACKS` in `bench/harden_cases.py`): merges off the shelf, block substitution, wide merges,
coupled alignment, and of level 2 row coefficients by entropy alone: with distillation among the attacks level 2 gets
most of the task, see below. `trap` and `trap+collapse`: the objectives without a thief who chooses among blocks;
`mined` and `mined+collapse`: with him, as `harden` has them; `kept` and `kept+collapse`: these with `--labels 0`,
beside a control that is trained on labels all the same. The worst of several seeds:
"""
EACH = """
One by one. A λ that is too weak for a task changes nothing, and there are such rows here: that is why the strength
follows what merges keep unless it is given.
"""
LABELS = """
Values of the protected task and the worst own one, (0 the base, 1 the fine-tunes), of each attack's best merge by the
worse of the two. `repair-n` trains on n labelled examples a class, `distil` on 2,048 unlabelled inputs of the task.
Hardening takes merges without labels away, and little else: a thief who trains gets most of the task.
Recovered over these attacks: {recovered}.
"""
IDEAS = """
Each idea of `bench/frontier_ideas.py` beside the trap. A cell is the protected task's value and the worst own one.
What a thief has from labels without the protected model is in the first row: an idea would have to bring the others
near it. *gain*: what the protected model adds to 16 labels a class; the target, half of the control's, is not
reached, and distillation from hard answers is as good as ever. `unrolled-4` and `collapse` take more from merges
without data than the trap by itself, which is why `collapse` can be had as an objective; `nasty` is the trap over
again, for its divergence has no slope where training begins. One seed, 500 test images a task: differences below .1
say nothing.
"""
OWNERS = """
Exposure: the value of the task in fixed simulated merges on held-out examples, which the fine-tune itself may have
seen in its own training. Rows of one task are to be compared with its `control`, or with *plain*: the same training
without the objective.
"""
PRICES = """
With two simulated merges a step: three forward and backward passes for one. Peak memory as torch counts it on the
GPU; time with other processes on it.
"""
EFFECTS = """
On {slice}; score: accuracy or minus nats a token; ece: expected calibration error; int8: every matrix rounded to 255
levels, one scale a row. *further*: the score after a licensed user's own plain training from the model.
"""
