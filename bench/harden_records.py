"""What bench/harden holds: records of trainings and audits, and what tables say of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from audits_text import number

Record = Mapping[str, Any]

# Of what is trained: it is raised when the same command makes another model. 2: no simulated merge is the whole
# fine-tune with something added, and the strength rises slowly. 3: nor is one all but the fine-tune, or with less than
# a tenth of it, and kindred has six tenths of the fine-tune as it was. 4: all of it again, and .03 for the tenth.
# 5: the merges of 2, and of images the strength rises three times as fast. 6: images are kept to the answers of plain
# training as much as to labels.
EDITION = 6


def audits_to(records: Iterable[Any], *tops: int) -> list[Any]:
    """Audits up to these levels of access."""
    audits = [record for record in records if record["kind"] == "audit"]
    return [one for one in audits if max(level["level"] for level in one["found"]["levels"]) in tops]


def model_key(record: Record) -> tuple[Any, ...]:
    """Which model a training or an audit is of; a lock of it is none of its own."""
    from harden_cases import LOCKED

    return (*(record[name] for name in ("source", "case", "seed")), record["variant"].removesuffix(LOCKED))


def editions_of(records: Iterable[Any]) -> dict[str, int]:
    """By run."""
    return {record["source"]: record.get("edition", 1) for record in records if record["kind"] == "about"}


def trainings_of(records: Iterable[Any]) -> dict[tuple[Any, ...], Any]:
    return {model_key(record): record for record in records if record["kind"] == "training"}


def pairs_of(record: Record) -> dict[tuple[str, str], Mapping[str, float]]:
    return {
        (" > ".join(row["chain"]), row["side"]): row["test"]
        for row in record["found"]["rows"]
        if row["test"] is not None and row["state"] == "done"
    }


def own_rows(record: Record, level: int) -> list[Any]:
    """A level's own attacks on the protected model that proved themselves."""
    rows = record["found"]["rows"]
    return [
        row for row in rows if row["side"] == "protected" and row["level"] == level and row["state"] == "done"
    ]


def chains(rows: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(f"`{' > '.join(row['chain'])}`" for row in rows))


def recipe_of(trained: Record | None) -> str:
    """Steps, batch and rate of a training."""
    if trained is None:
        return ""
    report = trained["report"]
    return recipe_text(*(report[name] for name in ("steps", "batch", "rate")))


def recipe_text(steps: int, batch: int, rate: float) -> str:
    return f"{steps} × {batch}, {rate:g}"


def joint_of(record: Record) -> float:
    """The best worse-of-both of merges without data."""
    pairs = pairs_of(record).items()
    return max(
        pair["joint"] for (attack, side), pair in pairs if side == "protected" and not is_trained(attack)
    )


def gain_of(rows: Mapping[tuple[str, str], Mapping[str, float]], side: str) -> str:
    """What a side's model adds to a repair with 16 labels a class."""
    pair = [rows.get(("repair-16", one)) for one in (side, "without")]
    if side == "without" or pair[0] is None or pair[1] is None:
        return ""
    return number(pair[0]["protected"] - pair[1]["protected"])


def is_trained(attack: str) -> bool:
    return attack.startswith(("repair", "distil", "untrap"))


def pair_text(pair: Mapping[str, float] | None) -> str:
    return "–" if pair is None else f"{number(pair['protected'])}, {number(pair['own'])}"


def moved_by(alone: Mapping[str, Any]) -> tuple[float, str]:
    """By how much the score alone has changed, and in what: points of accuracy, or per cent of the cross-entropy."""
    if alone["plain"] < 0:
        return 100 * alone["difference"] / abs(alone["plain"]), "%"
    return 100 * alone["difference"], "points"


def change_text(alone: Mapping[str, Any]) -> str:
    """Of the score alone; better is positive."""
    change, unit = moved_by(alone)
    return f"{number(change, 2 if unit == '%' else 1)} {unit}"
