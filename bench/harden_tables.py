"""The part of docs/results.md about hardening, of what bench/harden holds."""

from __future__ import annotations

import gzip
import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from audits_text import level_of, number, page, share, table
from harden_words import (
    BARS,
    DEFAULT,
    EACH,
    EFFECTS,
    HEAD,
    IDEAS,
    LABELS,
    OTHER_RECIPE,
    OWNERS,
    PRICES,
    ROTATION,
    SUMMARY,
    TRIED,
    UNLABELLED,
)

Record = Mapping[str, Any]

# As many seeds are summed up. AIM: what the score alone may change by on average of them, in points or per cent.
SEEDS, AIM = 3, -0.3
# What others publish, in their own words or figures: none of it was measured here.
WORDS = "no comparable figure"
PUBLISHED = (
    (
        "Trap², arXiv 2601.21898", "CLIP ViT-B/32 and L/14; full models, LoRA",
        f"keeps the score alone, degrades merges; {WORDS}",
    ),
    ("ARF, arXiv 2606.30360", "CLIP ViT-B/32", "4.6 % of accuracy after task arithmetic, 27.4 % after its own attack"),
    ("MergeBarrier, arXiv 2511.10712", "CLIP ViT-B/32", "29.3 %, and 60.8 % after the attack of arXiv 2606.30360"),
    (
        "MergeGuard, arXiv 2511.11851", "CLIP ViT-L/14, Llama 2, Gemma 2, Mistral",
        "accuracy of merges falls by up to 90 %, alone by less than 1.5 %",
    ),
    ("TAR, arXiv 2408.00761", "language models", f"safeguards that stand hundreds of steps of fine-tuning; {WORDS}"),
    (
        "SOPHON, arXiv 2404.12699", "image models",
        f"fine-tuning costs as much as training from nothing, or more; {WORDS}",
    ),
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
        *(effect(one, records) for one in effects),
        page("### What others publish", table(("work", "models", "published, not measured here"), PUBLISHED)),
    )


def bars(records: list[Any]) -> str:
    """Every audit up to level 2, against its control."""
    lines, trainings = [], _trainings(records)
    whole = any(record["whole"] for record in _audits(records, 1, 2))
    for record in sorted(_audits(records, 1, 2), key=_key):
        alone = record["found"]["standalone"]
        trained = trainings.get(_key(record))
        strength = None if trained is None else trained["report"]["strength"]
        lines.append(
            (
                record["source"], record["case"], record["seed"], f"`{record['variant']}`", _recipe(trained),
                number(strength), number(alone["plain"], 4), number(alone["protected"], 4), _change(alone),
                *(share(level_of(record["found"], level)) + _mark(record, level) for level in range(3)),
            )
        )  # fmt: skip
    header = (
        "run",
        "model",
        "seed",
        "way",
        "recipe",
        "λ",
        "control",
        "hardened",
        "change",
        "level 0",
        "level 1",
        "level 2, by entropy",
    )
    return page(
        "### Against thieves without labels",
        BARS,
        _defaults(records),
        ROTATION,
        rotation(records),
        _flowing(TRIED.format(how="not all of them" if whole else "none of them")),
        tried(records),
        SUMMARY,
        summary(records),
        _open(records),
        EACH,
        table(header, lines),
    )


def rotation(records: list[Any]) -> str:
    """Who is protected from whom."""
    from harden_cases import cases  # which has bench/audits.py import this module

    audited = {record["case"] for record in _audits(records, 1, 2)}
    lines = [(one.name, one.proxy, ", ".join(one.own)) for one in cases() if one.name in audited]
    return table(("model", "the owner's stand-in", "the thief's own"), lines)


def tried(records: list[Any]) -> str:
    """Which attacks every audit ran, and which of them proved themselves."""
    from harden_cases import ATTACKS

    groups: dict[tuple[str, ...], dict[tuple[str, str], list[int]]] = {}
    for record in sorted(_audits(records, 1, 2), key=_key):
        rows = [row for row in record["found"]["rows"] if row["side"] == "protected"]
        levels = range(1 + max(level["level"] for level in record["found"]["levels"]))
        ran = {name for row in rows for name in row["chain"]}
        key = (
            *(_names(_own(record, level)) or "none" if level in levels else "not run" for level in range(3)),
            _names(row for row in rows if row["state"] != "done"),
            ", ".join(f"`{name}`" for name in ATTACKS if name not in ran),
        )
        seeds = groups.setdefault(key, {}).setdefault((record["source"], record["case"]), [])
        seeds.extend([record["seed"]] * (record["seed"] not in seeds))
    lines = []
    for key, audits in groups.items():
        by_run: dict[str, list[str]] = {}
        for (source, case), seeds in audits.items():
            by_run.setdefault(source, []).append(f"{case} {' '.join(map(str, seeds))}")
        lines.append(("; ".join(f"{run}: {', '.join(each)}" for run, each in by_run.items()), *key))
    return table(("audits", "level 0", "level 1", "level 2", "did not prove themselves", "not run"), lines)


def summary(records: list[Any]) -> str:
    """What several seeds of one task have in common: the mean change, and the worst of what was recovered."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    trainings = _trainings(records)
    for record in sorted(_audits(records, 1, 2), key=_key):
        key = (record["source"], record["case"], record["variant"], _recipe(trainings.get(_key(record))))
        groups.setdefault(key, []).append(record["found"])
    lines = []
    for (source, case, variant, recipe), found in groups.items():
        if len(found) < SEEDS:
            continue
        levels = [[one for one in (level_of(each, n) for each in found) if one is not None] for n in range(3)]
        worst = [number(max(one["recovered"] for one in level)) if level else "" for level in levels]
        limit = number(max(one["interval"][1] for one in levels[1]))
        moved = [_moved(each["standalone"]) for each in found]
        mean, unit = sum(change for change, _ in moved) / len(moved), moved[0][1]
        met = "yes" if mean > AIM - 1e-9 else "no"
        change = f"{number(mean)} {unit}", f"{number(min(moved)[0])} {unit}", met
        lines.append((source, case, f"`{variant}`", recipe, len(found), *change, *worst[:2], limit, worst[2]))
    header = (
        "run",
        "model",
        "way",
        "recipe",
        "seeds",
        "mean change",
        "worst change",
        "aim",
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
    about = _flowing(LABELS.format(recovered="; ".join(recovered)))
    judged = any(one["variant"].startswith(("mined", "kept")) for one in _audits(records, 3))
    rest = "" if judged else UNLABELLED
    head = "### Against thieves with labels, or with inputs"
    return page(head, about, rest, table(header, lines)) if lines else ""


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
        lines.append((f"({name})", "", "", "", _gain(rows, side), *cells))
    for record in audits:
        alone, rows = record["found"]["standalone"], _rows(record)
        cells = [_value(rows.get((attack, "protected"))) for attack in shown]
        lines.append(
            (
                f"`{record['variant']}`" + NO_OPS.get(record["variant"], ""),
                _change(alone),
                number(_joint(record)),
                share(level_of(record["found"], 3)),
                _gain(rows, "protected"),
                *cells,
            )
        )
    header = ("idea", "change", "joint without data", "level 3", "gain", *(f"`{attack}`" for attack in shown))
    return page("### Ideas against repair and distillation", IDEAS, _unjudged(records), table(header, lines))


def _unjudged(records: list[Any]) -> str:
    """Ideas that were trained, and audited on no model."""
    from frontier_ideas import IDEAS as KNOWN

    judged = {record["variant"] for record in records if record["kind"] == "audit"}
    cases: dict[str, set[str]] = {}
    for record in _trainings(records).values():
        if record["variant"] in KNOWN and record["variant"] not in judged:
            cases.setdefault(record["variant"], set()).add(f"{record['case']}, {record['source']}")
    names = [f"`{name}` ({'; '.join(sorted(where))})" for name, where in sorted(cases.items())]
    return _flowing(f"Trained, never audited, and so not judged: {', '.join(names)}.") if names else ""


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
                _recipe(record), number(score["after"], 4), number(score.get("plain"), 4),
                number(exposure["mean"]),
            )
        )  # fmt: skip
    header = (
        "run",
        "model",
        "seed",
        "way",
        "λ at the end",
        "recipe",
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
    """Time and memory beside plain training of the same steps, of all models and seeds of a run."""
    groups: dict[tuple[Any, ...], list[tuple[Any, Any]]] = {}
    trainings = _trainings(records)
    for key, record in trainings.items():
        if record["peak"] and record["variant"].startswith(("trap", "mined", "kept")):
            family, looks = record["case"].partition("-")[0], "plain" in record["report"]["standalone"]
            way = record["source"], family, record["variant"], _recipe(record), looks
            groups.setdefault(way, []).append((trainings.get((*key[:3], "control")), record))
    lines = []
    for (source, family, variant, recipe, looks), pairs in groups.items():
        both = [(before["report"]["seconds"], one["report"]["seconds"]) for before, one in pairs if before]
        peaks = [(before["peak"] / 2**20, one["peak"] / 2**20) for before, one in pairs if before]
        seconds = median(one["report"]["seconds"] for _, one in pairs)
        peak = median(one["peak"] / 2**20 for _, one in pairs)
        lines.append(
            (
                source, family, f"`{variant}`", recipe, len(pairs), "yes" if looks else "no",
                f"{median(plain for plain, _ in both):.0f} s" if both else "–", f"{seconds:.0f} s",
                number(median(one / plain for plain, one in both), 1) if both else "–",
                f"{median(plain for plain, _ in peaks):.0f} MiB" if peaks else "–", f"{peak:.0f} MiB",
                number(median(one / plain for plain, one in peaks)) if peaks else "–",
            )
        )  # fmt: skip
    header = (
        "run",
        "models",
        "way",
        "recipe",
        "trainings",
        "with looks and plain training",
        "plain",
        "hardened",
        "ratio",
        "peak, plain",
        "peak, hardened",
        "ratio",
    )
    return page("### What it costs", PRICES, table(header, lines)) if lines else ""


def effect(found: Mapping[str, Any], records: list[Any]) -> str:
    """Side effects of one model, and of which way it is."""
    models = found["models"]
    names = list(dict.fromkeys(name for row in models.values() for name in row))
    lines = [(name, *(number(models[model].get(name), 4) for model in models)) for name in names]
    head = f"### Side effects: {found['case']}"
    about = _flowing(EFFECTS.format(slice=found["slice"], way=_way(found, records)))
    return page(head, about, table(("", *models), lines))


def _way(found: Mapping[str, Any], records: list[Any]) -> str:
    """Which hardened model side effects are of: as the file says, or that of this case whose scores are the same."""
    known, trainings, models = {}, _trainings(records), found["models"]
    for record in _audits(records, 1, 2, 3):
        alone, trained = record["found"]["standalone"], trainings.get(_key(record))
        far = (
            abs(alone["plain"] - models["control"]["score"]),
            abs(alone["protected"] - models["hardened"]["score"]),
        )
        same = max(far) < 1e-6 and all(record[name] == found[name] for name in ("case", "seed"))
        if same and trained is not None and found.get("way") in (None, record["variant"]):
            report = trained["report"]
            how = "at a fixed λ of" if report.get("may") is None else "its λ followed what merges keep, to"
            known[f"`{record['variant']}` in `{record['source']}`, {how} {number(report['strength'])}"] = None
    return " or ".join(known) or (f"`{found['way']}`" if "way" in found else "a way that is not known")


# --- records ------------------------------------------------------------------------------------------------


def _audits(records: Iterable[Any], *tops: int) -> list[Any]:
    """Audits up to these levels of access."""
    audits = [record for record in records if record["kind"] == "audit"]
    return [one for one in audits if max(level["level"] for level in one["found"]["levels"]) in tops]


def _key(record: Record) -> tuple[Any, ...]:
    """Which model a training or an audit is of; a lock of it is none of its own."""
    from harden_cases import LOCKED

    return (*(record[name] for name in ("source", "case", "seed")), record["variant"].removesuffix(LOCKED))


def _trainings(records: Iterable[Any]) -> dict[tuple[Any, ...], Any]:
    return {_key(record): record for record in records if record["kind"] == "training"}


def _rows(record: Record) -> dict[tuple[str, str], Mapping[str, float]]:
    return {
        (" > ".join(row["chain"]), row["side"]): row["test"]
        for row in record["found"]["rows"]
        if row["test"] is not None and row["state"] == "done"
    }


def _own(record: Record, level: int) -> list[Any]:
    """A level's own attacks on the protected model that proved themselves."""
    rows = record["found"]["rows"]
    return [
        row for row in rows if row["side"] == "protected" and row["level"] == level and row["state"] == "done"
    ]


def _names(rows: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(f"`{' > '.join(row['chain'])}`" for row in rows))


def _mark(record: Record, level: int) -> str:
    """What is to be known of a figure: it stands on one attack of its own, or on one that did not prove itself."""
    found = level_of(record["found"], level)
    if found is None or not found["reliable"]:
        return ""
    rows = record["found"]["rows"]
    taken = [floor["plain"]["row"] for floor in found["floors"]]
    unproven = any(row is not None and rows[row]["state"] == "unreliable" for row in taken)
    return " ‡" * (level < 2 and len(_own(record, level)) == 1) + " §" * unproven


def _open(records: list[Any]) -> str:
    """Of the ways with several seeds, what was not stopped: intervals that lie above nothing."""
    audits = sorted(_audits(records, 1, 2), key=_key)
    ways = [(one["source"], one["case"], one["variant"]) for one in audits]
    several = [one for one, way in zip(audits, ways, strict=True) if ways.count(way) >= SEEDS]
    found = []
    for one in several:
        levels = [level for level in one["found"]["levels"] if level["reliable"]]
        if any(level["interval"][0] > 0 for level in levels):
            said = ", ".join(f"level {level['level']} {share(level)}" for level in levels)
            found.append(
                f"{one['case']} with seed {one['seed']} ({one['source']}, `{one['variant']}`): {said}"
            )
    count = f"{len(found)} of {len(several)} audits in this table"
    what = "the interval of a level lies above nothing, so that the task was not taken from merges"
    return _flowing(f"In {count} {what}: {'; '.join(found)}.") if found else ""


def _recipe(trained: Record | None) -> str:
    """Steps, batch and rate of a training."""
    if trained is None:
        return ""
    report = trained["report"]
    return f"{report['steps']} × {report['batch']}, {report['rate']:g}"


def _defaults(records: list[Any]) -> str:
    """What `harden` does unless it is asked for something else, and which audits are of that."""
    from unmergeable.harden.run import DEFAULTS

    ways = {"mined+collapse": "image-classification", "mined": "language-modelling"}
    recipes = {
        way: f"{DEFAULTS[kind].steps} × {DEFAULTS[kind].batch}, {DEFAULTS[kind].rate:g}"
        for way, kind in ways.items()
    }
    trainings = _trainings(records)
    found = dict.fromkeys(
        f"{record['case']} ({record['source']})"
        for record in _audits(records, 1, 2)
        if _recipe(trainings.get(_key(record))) == recipes.get(record["variant"])
    )
    other = "" if any(name.startswith("images-") for name in found) else OTHER_RECIPE
    images, texts = recipes.values()
    return _flowing(DEFAULT.format(images=images, texts=texts, found=", ".join(found) or "none", other=other))


def _flowing(text: str) -> str:
    """A paragraph whose lines are as long as any, whatever was filled in."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


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


def _moved(alone: Mapping[str, Any]) -> tuple[float, str]:
    """By how much the score alone has changed, and in what: points of accuracy, or per cent of the cross-entropy."""
    if alone["plain"] < 0:
        return 100 * alone["difference"] / abs(alone["plain"]), "%"
    return 100 * alone["difference"], "points"


def _change(alone: Mapping[str, Any]) -> str:
    """Of the score alone; better is positive."""
    change, unit = _moved(alone)
    return f"{number(change, 2 if unit == '%' else 1)} {unit}"


# Ideas that their audit says nothing of.
NO_OPS = {"nasty": " (a no-op: no slope)"}
