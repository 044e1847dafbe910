"""docs/results.md from the results of `bench/audits.py`. Every figure comes from a results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from audits_text import level_of, number, page, share, table
from audits_words import (
    CLAIMS,
    CLOCKS,
    COSTS,
    DOUBTS,
    EARLIER,
    HEAD,
    METHODS_HEAD,
    OLDER,
    PUBLISHED_HEAD,
    RECOVERED,
    SCENARIOS,
)
from unmergeable.audit.suite import RULES

Document = Mapping[str, Any]
Found = Mapping[str, tuple[Any, Document]]

# Published figures: accuracy in per cent of the protected task after task arithmetic of CLIP ViT-B/32 at λ = 0.2,
# from arXiv 2606.30360, before and after its base-anchored attack; and what the papers claim in words.
PUBLISHED = (
    ("no protection", 67.2, None),
    ("PaRaMS", 5.5, 66.4),
    ("MergeLock", 5.1, 66.4),
    ("MergeBarrier", 29.3, 60.8),
    ("ARF, its own training defence", 4.6, 27.4),
)
NAMES = {
    "embedded": "embedded zoo: fashion against digits, latin, cyrillic (ViT, 0.6 M)",
    "images": "measuring zoo, images: fmnist against mnist, cyr (ViT, 2.7 M)",
    "text-c": "measuring zoo, text: c against python (Llama class, 3.1 M)",
    "text-python": "measuring zoo, text: python against js (Llama class, 3.1 M)",
    "text2-c": "measuring zoo, text: c against python (GPT-2 class, 3.1 M)",
    "text2-python": "measuring zoo, text: python against js (GPT-2 class, 3.1 M)",
}
LOST = 0.05  # a merge that keeps less than this part of the unprotected value has lost over 95 %
FLOOR = 0.25


def document(
    found: Found,
    slices: Mapping[str, str],
    scenarios: Mapping[str, str],
    seed: int,
    earlier: str | None,
    missing: Sequence[str],
    hardening: str,
    times: Mapping[str, Any],
) -> str:
    """The whole page.

    `earlier` are the tables of zoo_tables.py, if they were made, `missing` audits that were not, `hardening` a section
    of its own, `times` how long audits took from nothing.
    """
    first = next(iter(found.values()))[1]
    parts = [
        HEAD.format(
            seed=seed,
            suite=first["suite"],
            tool=first["tool"],
            machine=_machine(first["machine"]),
            missing=f" Of what the script asks for were not run: {', '.join(missing)}." if missing else "",
            slices="\n".join(
                f"- `{name}`: {NAMES[name]}; {slices[name]}"
                for name in dict.fromkeys(case.setting for case, _ in found.values())
            ),
        ),
        summary(found),
        RECOVERED,
        scenario_table(found, scenarios),
        *(through(found, setting) for setting in ("embedded", "images", "text-c", "text2-c")),
        METHODS_HEAD,
        *(methods(found, setting) for setting in NAMES),
        claims(found),
        costs(found),
        clocks(times),
        hardening,
        EARLIER.format(tables=earlier) if earlier else "",
        DOUBTS,
        doubts(found),
    ]
    return page(*parts) + "\n"


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "mergekit"))
    kind = f"{machine['cores']} {machine['processor']} cores, {machine['device']}"
    return f"{kind}, Python {machine['python']}, {versions}"


def summary(found: Found) -> str:
    """Every lock: alone, and recovered by level."""
    lines = []
    for case, result in found.values():
        if case.method in ("same domain", "key", "two releases"):
            continue
        alone = result["standalone"]
        lines.append(
            (
                case.setting, f"`{case.method}`{_mark(result)}",
                number(alone["plain"], 4), number(alone["protected"], 4),
                *(share(level_of(result, level)) for level in range(4)),
            )
        )  # fmt: skip
    header = (
        "models",
        "lock",
        "alone before",
        "alone after",
        "level 0",
        "level 1",
        "level 2",
        "level 3",
    )
    parts = [
        f"`{case.name}` ran under a budget: {len(result['left_out'])} of "
        f"{len(result['left_out']) + len(result['rows'])} rows were left out, the least informative ones."
        for case, result in found.values()
        if result["left_out"]
    ]
    return page("## What thieves get", table(header, lines), *parts, _older(found))


def _mark(result: Document) -> str:
    """Behind a lock whose figures are of earlier rules."""
    return "" if result.get("rules", 1) == RULES else " †"


def _older(found: Found) -> str:
    return OLDER if any(_mark(result) for _, result in found.values()) else ""


def clocks(times: Mapping[str, Any]) -> str:
    """How long audits take from nothing."""
    lines = [
        (f"`{name}`", ", ".join(map(str, one["levels"])), one["rows"], one["workers"],
         f"{one['seconds'] / 60:.1f}", _machine(one["machine"]))
        for name, one in times.items()
    ]  # fmt: skip
    header = ("audit", "levels", "rows", "workers", "minutes", "machine")
    return page(CLOCKS, table(header, lines)) if lines else ""


def readme(found: Found) -> str:
    """The shares of the main locks alone, for the README."""
    lines = []
    for case, result in found.values():
        if case.method in ("exact", "gauge", "mergelock", "params diagonal"):
            shares = [share(level_of(result, level)) or "–" for level in range(4)]
            total = len(result["left_out"]) + len(result["rows"])
            part = f"{len(result['rows'])} of {total}" if result["left_out"] else "all"
            lines.append((case.setting, f"`{case.method}`{_mark(result)}", part, *shares))
    header = (
        "models",
        "lock",
        "rows",
        "0: off the shelf",
        "1: and thinks",
        "2: and has inputs",
        "3: and has few labels",
    )
    return page(table(header, lines), _older(found)).rstrip()


def scenario_table(found: Found, scenarios: Mapping[str, str]) -> str:
    """Circumstances in which everything must come back."""
    unlocked = _result(found, "embedded", "none")
    lines = []
    for case, result in found.values():
        if case.method in scenarios or (case.setting, case.method) == ("embedded", "none"):
            cells = []
            for level in (0, 1):
                one = level_of(result, level)
                cells += [share(one), _against(one, level_of(unlocked, level) if unlocked else None)]
            lines.append((scenarios.get(case.method, "no lock"), *cells))
    header = ("on the embedded zoo, `exact`", "level 0", "gains", "level 1", "gains")
    return page("## Where nothing is protected", SCENARIOS, table(header, lines))


def _against(level: Mapping[str, Any] | None, unlocked: Mapping[str, Any] | None) -> str:
    """The sum of the gains with the protected model, and that with models that were never locked."""
    if level is None or unlocked is None:
        return ""
    return f"{number(level['gains']['protected'])} of {number(unlocked['gains']['plain'])}"


def through(found: Found, setting: str) -> str:
    """What gets through an exact lock, level by level and floor by floor."""
    result = _result(found, setting, "exact")
    if result is None:
        return ""
    rows = result["rows"]
    lines = []
    for level in result["levels"]:
        for floor in level["floors"]:
            cells = []
            for side in ("protected", "plain", "without"):
                chosen = floor[side]
                name = "nothing" if chosen["row"] is None else rows[chosen["row"]]["attack"]
                cells.append(f"{number(chosen['value'])} ({name})")
            lines.append((level["level"], number(floor["floor"]), *cells))
    header = ("level", "own at least", "with the locked model", "with the unprotected", "without either")
    return f"### What gets through `exact`: {NAMES[setting]}\n\n" + table(header, lines)


def _result(found: Found, setting: str, method: str) -> Document | None:
    return next((r for c, r in found.values() if (c.setting, c.method) == (setting, method)), None)


def methods(found: Found, setting: str) -> str:
    """Level 0 by merge method: the best worse-of-both of every lock."""
    results = {
        case.method: result
        for case, result in found.values()
        if case.setting == setting and case.method not in ("same domain", "key", "two releases", "none")
    }
    if not results:
        return ""
    plain = _joints(next(iter(results.values())), "plain")
    columns = {method: _joints(result, "protected") for method, result in results.items()}
    lines = [
        (f"`{attack}`", number(value), *(number(column.get(attack)) for column in columns.values()))
        for attack, value in plain.items()
    ]
    header = ("merge", "no lock", *(f"`{method}`" for method in columns))
    return f"### {NAMES[setting]}\n\n" + table(header, lines)


def _joints(result: Document, side: str) -> dict[str, float | None]:
    return {
        row["attack"]: row["test"]["joint"] if row["test"] else None
        for row in result["rows"]
        if row["side"] == side and row["level"] == 0 and len(row["chain"]) == 1 and row["attack"] != "probe"
    }


def claims(found: Found) -> str:
    """The papers' claims beside ours."""
    lines = []
    for case, result in found.values():
        if case.method not in ("mergelock", "exact", "gauge") and not case.method.startswith("params"):
            continue
        kept = _kept(result)
        if kept:
            lost = sum(one < LOST for one in kept)
            lines.append((case.setting, f"`{case.method}`", f"{lost} of {len(kept)}", number(max(kept))))
    ours = table(("models", "lock", "merge methods that lose over 95 %", "most that one keeps"), lines)
    published = table(
        ("protection", "merged, published", "after the published attack"),
        [(name, number(one, 1), number(other, 1)) for name, one, other in PUBLISHED],
    )
    return page(CLAIMS, ours, PUBLISHED_HEAD, published)


def _kept(result: Document) -> list[float]:
    """By merge method that works without a lock: the part of the protected value that the lock leaves.

    Of each method the merge with the best worse-of-both is compared: what a thief would take.
    """
    plain, protected = _joints(result, "plain"), _joints(result, "protected")
    return [
        max(0.0, other) / value
        for attack, value in plain.items()
        if value is not None and value >= 0.1 and (other := protected.get(attack)) is not None
    ]


def costs(found: Found) -> str:
    """What the attacks cost, of the exact lock of the embedded zoo."""
    result = _result(found, "embedded", "exact")
    if result is None:
        return ""
    lines = []
    for row in result["rows"]:
        if row["side"] == "protected" and row["test"] and row["level"] >= 1:
            cost = row["cost"]
            lines.append(
                (
                    row["level"], f"`{row['attack']}`", number(row["test"]["protected"]), number(row["test"]["own"]),
                    f"{cost['forwards']:,.0f}", cost["inputs"], cost["labelled"], cost["tokens"],
                    f"{cost['seconds']:.0f}", number(cost["size"], 1),
                )
            )  # fmt: skip
    header = (
        "level",
        "attack",
        "protected",
        "own",
        "forward passes",
        "inputs",
        "labelled",
        "tokens",
        "seconds",
        "size",
    )
    return page("## What attacks cost", COSTS, table(header, lines))


def doubts(found: Found) -> str:
    """Everything that was refused or unreliable, over all audits."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for name, (_, result) in found.items():
        for row in result["rows"]:
            if row["state"] != "done" and row["side"] == "protected":
                seen.setdefault((row["attack"], row["state"], row["reason"] or ""), []).append(name)
    lines = [(f"`{attack}`", state, reason, len(names)) for (attack, state, reason), names in seen.items()]
    return table(("attack", "state", "reason", "audits"), lines)
