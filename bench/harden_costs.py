"""What hardening costs, of what bench/harden holds: time and memory beside plain training, and side effects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from audits_text import flowing, number, page, table
from harden_records import audits_to, model_key, recipe_of, recipe_text, trainings_of
from harden_words import ALONE, EFFECTS, PRICES, STEPS


def prices(records: list[Any]) -> str:
    """Time and memory beside plain training of the same steps, of all models and seeds of a run."""
    groups: dict[tuple[Any, ...], list[tuple[Any, Any]]] = {}
    trainings = trainings_of(records)
    for key, record in trainings.items():
        if record["peak"] and record["variant"].startswith(("trap", "mined", "kept")):
            family, looks = record["case"].partition("-")[0], "plain" in record["report"]["standalone"]
            way = record["source"], family, record["variant"], recipe_of(record), looks
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


def steps(machines: Iterable[Mapping[str, Any]]) -> str:
    """CPU seconds of a step, plain and hardened, in both precisions, on each machine."""
    header = (
        "model", "objective", "batch", "plain, fp32", "hardened, fp32", "plain, bf16", "hardened, bf16",
        "hardened / plain", "bf16 / fp32", "attention in bf16 too / not",
    )  # fmt: skip
    parts = []
    for found in machines:
        about = f"On {found['machine']}; medians of {found['rounds']} rounds:"
        parts += [about, table(header, _steps(found))]
    return page("### A step on a CPU", STEPS, *parts)


def _steps(found: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    lines = []
    for row in found["rows"]:
        full, half = (
            [row["seconds"][f"{way}, {precision}"] for way in ("plain", "hardened")]
            for precision in ("fp32", "bf16")
        )
        lines.append(
            (
                row["case"], f"`{row['objective']}`", row["batch"],
                *(f"{seconds:.2f} s" for seconds in (*full, *half)), number(full[1] / full[0], 1),
                number(half[1] / full[1]), number(row["seconds"]["plain, bf16, attention too"] / half[0]),
            )
        )  # fmt: skip
    return lines


def alone(sources: Mapping[str, Any]) -> str:
    """What models are worth by themselves, on many images, and what several seeds have in common."""
    lines, groups = [], dict[tuple[str, ...], list[float]]()
    for source, found in sources.items():
        for row in found["rows"]:
            recipe = recipe_text(*(row[name] for name in ("steps", "batch", "rate")))
            apart = f"{number(100 * row['difference'])} ± {number(100 * row['error'])} points"
            way = source, row["case"], f"`{row['variant']}`", recipe
            scores = (number(row[side], 4) for side in ("fine-tune", "control", "hardened"))
            images = f"{row['images']:,}"
            if row["groups"] < row["images"]:
                images += f" in {row['groups']} faces"
            lines.append((*way, row["seed"], images, number(row["strength"]), *scores, apart))
            groups.setdefault(way, []).append(100 * row["difference"])
    for way, apart in groups.items():
        if len(apart) > 1:
            lines.append((*way, "mean", *[""] * 5, f"**{number(sum(apart) / len(apart))} points**"))
    header = (
        "run", "model", "way", "recipe", "seed", "images", "λ", "as it was", "control", "hardened", "change",
    )  # fmt: skip
    return page("### What it costs alone, on many images", ALONE, table(header, lines)) if lines else ""


def effect(found: Mapping[str, Any], records: list[Any]) -> str:
    """Side effects of one model, and of which way it is."""
    models = found["models"]
    names = list(dict.fromkeys(name for row in models.values() for name in row))
    lines = [(name, *(number(models[model].get(name), 4) for model in models)) for name in names]
    head = f"### Side effects: {found['case']}"
    about = flowing(EFFECTS.format(slice=found["slice"], way=_way(found, records)))
    return page(head, about, table(("", *models), lines))


def _way(found: Mapping[str, Any], records: list[Any]) -> str:
    """Which hardened model side effects are of: as the file says, or that of this case whose scores are the same."""
    known: dict[tuple[str, str], list[str]] = {}
    trainings, models = trainings_of(records), found["models"]
    for record in audits_to(records, 1, 2, 3):
        alone, trained = record["found"]["standalone"], trainings.get(model_key(record))
        far = (
            abs(alone["plain"] - models["control"]["score"]),
            abs(alone["protected"] - models["hardened"]["score"]),
        )
        same = max(far) < 1e-6 and all(record[name] == found[name] for name in ("case", "seed"))
        if same and trained is not None and found.get("way") in (None, record["variant"]):
            report = trained["report"]
            how = "at a fixed λ of" if report.get("may") is None else "its λ followed what merges keep, to"
            known.setdefault((record["variant"], f"{how} {number(report['strength'])}"), []).append(
                record["source"]
            )
    ways = [f"`{way}` ({', '.join(dict.fromkeys(runs))}), {how}" for (way, how), runs in known.items()]
    return " or ".join(ways) or (f"`{found['way']}`" if "way" in found else "a way that is not known")
