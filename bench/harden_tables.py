"""The part of docs/results.md about hardening, of what bench/harden holds."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from audits_text import flowing, level_of, number, page, share, table
from harden_costs import alone, effect, prices, steps
from harden_kept import documents
from harden_records import (
    EDITION,
    Record,
    audits_to,
    chains,
    change_text,
    editions_of,
    gain_of,
    is_trained,
    joint_of,
    model_key,
    moved_by,
    own_rows,
    pair_text,
    pairs_of,
    recipe_of,
    recipe_text,
    trainings_of,
)
from harden_words import (
    BARS,
    BY_PEFT,
    DEFAULT,
    EACH,
    HEAD,
    IDEAS,
    LABELS,
    OTHER_RECIPE,
    OWNERS,
    PUBLISHED,
    ROTATION,
    SUMMARY,
    TRIED,
    UNLABELLED,
)

# As many seeds are summed up. AIM: what the score alone may change by on average of them, in points or per cent.
SEEDS, AIM = 3, -0.3


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
    abouts, editions = [record for record in records if record["kind"] == "about"], editions_of(records)
    return page(
        HEAD,
        "\n".join(
            f"- `{one['source']}`{_marked(editions[one['source']])}: {one['text']}\n\n      {one['command']}\n"
            for one in abouts
        ),
        bars(records),
        labels(records),
        ideas(records),
        owners(records),
        adapters(records),
        prices(records),
        steps(documents(kept, "precision").values()),
        alone(documents(kept, "price")),
        *(effect(one, records) for one in documents(kept, "effects").values()),
        page("### What others publish", table(("work", "models", "published, not measured here"), PUBLISHED)),
    )


def _marked(edition: int) -> str:
    return "" if edition == EDITION else f" (edition {edition})"


def bars(records: list[Any]) -> str:
    """Every audit up to level 2, against its control."""
    lines, trainings = [], trainings_of(records)
    whole = any(record["whole"] for record in audits_to(records, 1, 2))
    for record in sorted(audits_to(records, 1, 2), key=model_key):
        alone = record["found"]["standalone"]
        trained = trainings.get(model_key(record))
        strength = None if trained is None else trained["report"]["strength"]
        lines.append(
            (
                record["source"], record["case"], record["seed"], f"`{record['variant']}`", recipe_of(trained),
                number(strength), number(alone["plain"], 4), number(alone["protected"], 4), change_text(alone),
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
        flowing(TRIED.format(how="not all of them" if whole else "none of them")),
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

    audited = {record["case"] for record in audits_to(records, 1, 2)}
    lines = [(one.name, one.proxy, ", ".join(one.own)) for one in cases() if one.name in audited]
    return table(("model", "the owner's stand-in", "the thief's own"), lines)


def tried(records: list[Any]) -> str:
    """Which attacks every audit ran, and which of them proved themselves."""
    from harden_cases import ATTACKS

    groups: dict[tuple[str, ...], dict[tuple[str, str], list[int]]] = {}
    for record in sorted(audits_to(records, 1, 2), key=model_key):
        rows = [row for row in record["found"]["rows"] if row["side"] == "protected"]
        levels = range(1 + max(level["level"] for level in record["found"]["levels"]))
        ran = {name for row in rows for name in row["chain"]}
        key = (
            *(
                chains(own_rows(record, level)) or "none" if level in levels else "not run"
                for level in range(3)
            ),
            chains(row for row in rows if row["state"] != "done"),
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
    trainings = trainings_of(records)
    for record in sorted(audits_to(records, 1, 2), key=model_key):
        key = (
            record["source"],
            record["case"],
            record["variant"],
            recipe_of(trainings.get(model_key(record))),
        )
        groups.setdefault(key, []).append(record["found"])
    lines = []
    for (source, case, variant, recipe), found in groups.items():
        if len(found) < SEEDS:
            continue
        levels = [[one for one in (level_of(each, n) for each in found) if one is not None] for n in range(3)]
        worst = [number(max(one["recovered"] for one in level)) if level else "" for level in levels]
        limit = number(max(one["interval"][1] for one in levels[1]))
        moved = [moved_by(each["standalone"]) for each in found]
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
    for record in audits_to(records, 3):
        if record["variant"] != "trap":
            continue
        rows = pairs_of(record)
        for attack in dict.fromkeys(name for name, _ in rows):
            cells = [pair_text(rows.get((attack, side))) for side in ("protected", "plain", "without")]
            lines.append((record["source"], record["case"], record["seed"], f"`{attack}`", *cells))
        shares = (f"level {level} {share(level_of(record['found'], level))}" for level in (2, 3))
        recovered.append(f"{record['case']} {record['seed']} ({record['source']}) {', '.join(shares)}")
    header = ("run", "model", "seed", "attack", "hardened", "control", "without either")
    about = flowing(LABELS.format(recovered="; ".join(recovered)))
    judged = any(one["variant"].startswith(("mined", "kept")) for one in audits_to(records, 3))
    rest = "" if judged else UNLABELLED
    head = "### Against thieves with labels, or with inputs"
    return page(head, about, rest, table(header, lines)) if lines else ""


def ideas(records: list[Any]) -> str:
    """Ideas against repair and distillation, side by side."""
    every = audits_to(records, 3)
    several = {(one["source"], one["case"]) for one in every if one["variant"] != "trap"}
    audits = [one for one in every if (one["source"], one["case"]) in several]
    if not audits:
        return ""
    ran = [dict.fromkeys(attack for attack, _ in pairs_of(one)) for one in audits]
    trained = [name for name in ran[0] if is_trained(name) and all(name in names for names in ran)]
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for record in audits:
        groups.setdefault(model_key(record)[:3], []).append(record)
    lines = []
    for (source, _, seed), found in groups.items():
        rows = pairs_of(found[0])
        for side, name in (("without", "no protected model"), ("plain", "control")):
            cells = [pair_text(rows.get((attack, side))) for attack in trained]
            lines.append((source, seed, f"({name})", "", "", "", gain_of(rows, side), *cells))
        for record in found:
            rows = pairs_of(record)
            about = change_text(record["found"]["standalone"]), number(joint_of(record))
            cells = [pair_text(rows.get((attack, "protected"))) for attack in trained]
            level = share(level_of(record["found"], 3))
            lines.append(
                (source, seed, f"`{record['variant']}`", *about, level, gain_of(rows, "protected"), *cells)
            )
    names = (f"`{attack}`" for attack in trained)
    header = ("run", "seed", "idea", "change", "joint without data", "level 3", "gain", *names)
    return page("### Ideas against repair and distillation", IDEAS, _unjudged(records), table(header, lines))


def _unjudged(records: list[Any]) -> str:
    """Ideas that were trained, and audited on no model."""
    from frontier_ideas import IDEAS as KNOWN

    judged = {record["variant"] for record in records if record["kind"] == "audit"}
    cases: dict[str, set[str]] = {}
    for record in trainings_of(records).values():
        if record["variant"] in KNOWN and record["variant"] not in judged:
            cases.setdefault(record["variant"], set()).add(f"{record['case']}, {record['source']}")
    names = [f"`{name}` ({'; '.join(sorted(where))})" for name, where in sorted(cases.items())]
    return flowing(f"Trained, never audited, and so not judged: {', '.join(names)}.") if names else ""


def owners(records: list[Any]) -> str:
    """What owners see: every training, on held-out examples."""
    lines = []
    for record in trainings_of(records).values():
        report = record["report"]
        score, exposure = report["standalone"], report["exposure"]["after"]
        lines.append(
            (
                record["source"], record["case"], record["seed"], f"`{record['variant']}`",
                "" if report["objective"] == "plain" else number(report["strength"]),
                recipe_of(record), number(score["after"], 4), number(score.get("plain"), 4),
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
            cells = [pair_text(sides[side].get(kind)) for side in ("control", "hardened")]
            way = f"`{record['variant']}`"
            lines.append((record["source"], record["case"], record["seed"], way, f"`{kind}`", *cells))
    header = ("run", "adapter", "seed", "way", "`combination_type`", "control", "hardened")
    return page("### Adapters merged by peft", BY_PEFT, table(header, lines)) if lines else ""


def _mark(record: Record, level: int) -> str:
    """What is to be known of a figure: it stands on one attack of its own, or on one that did not prove itself."""
    found = level_of(record["found"], level)
    if found is None or not found["reliable"]:
        return ""
    rows = record["found"]["rows"]
    taken = [floor["plain"]["row"] for floor in found["floors"]]
    unproven = any(row is not None and rows[row]["state"] == "unreliable" for row in taken)
    return " ‡" * (level < 2 and len(own_rows(record, level)) == 1) + " §" * unproven


def _open(records: list[Any]) -> str:
    """Of the ways with several seeds, what was not stopped: intervals that lie above nothing."""
    audits = sorted(audits_to(records, 1, 2), key=model_key)
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
    return flowing(f"In {count} {what}: {'; '.join(found)}.") if found else ""


def _defaults(records: list[Any]) -> str:
    """What `harden` does unless it is asked for something else, and which audits are of that."""
    from unmergeable.harden.defaults import MAY, MAY_TEXT, settings_of

    kinds = {"mined+collapse+kindred": "image-classification", "mined": "language-modelling"}

    def recipe(kind: str, adapter: bool) -> str:
        own = settings_of(kind, adapter, None, None, None, None, 0)
        return recipe_text(own.steps, own.batch, own.rate)

    def alike(record: Any, trained: Any) -> bool:
        kind = kinds.get(record["variant"])
        if kind is None or trained is None or editions[record["source"]] != EDITION:
            return False
        may = MAY if kind == "image-classification" else MAY_TEXT
        own = recipe(kind, record["case"].startswith("lora-"))
        return trained["report"].get("may") == may and recipe_of(trained) == own

    trainings, editions = trainings_of(records), editions_of(records)
    found = dict.fromkeys(
        f"{record['case']} ({record['source']})"
        for record in audits_to(records, 1, 2, 3)
        if alike(record, trainings.get(model_key(record)))
    )
    other = "" if any(name.startswith("images-") for name in found) else OTHER_RECIPE
    images, texts = (recipe(kind, adapter=False) for kind in kinds.values())
    adapters = recipe("language-modelling", adapter=True)
    return flowing(
        DEFAULT.format(
            images=images, texts=texts, adapters=adapters, found=", ".join(found) or "none", other=other
        )
    )
