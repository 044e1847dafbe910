"""What `merge` and `attack` print for people. What a script should read is the JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ._render import fields, locked, plural, table

if TYPE_CHECKING:
    from .attacks import AttackReport
    from .authorised import MergeReport
    from .merging.write import MergeReport as PlainReport


def authorised(report: MergeReport) -> str:
    """The text of `unmergeable merge -k KEY`."""
    inputs = [f"{weight:g} x {model}" for weight, model in zip(report.weights, report.models, strict=True)]
    head = fields(
        [
            ("merged", " + ".join(inputs)),
            ("by", report.method + "".join(f", {name} {value:g}" for name, value in report.options.items())),
            ("base", report.base),
        ]
    )
    return f"{head}\n\n{locked(report.lock)}"


def plain(report: PlainReport) -> str:
    """The text of `unmergeable merge`."""
    facts = report.facts
    moved = (
        "of the models' mean distance from the base"
        if report.base is not None
        else "of the others' mean distance from the first model"
    )
    copied = f", {facts.copied:.1%} of their numbers copied" if facts.copied else ""
    head = fields(
        [
            ("merged", f"{' + '.join(report.models)} -> {report.dst}"),
            ("by", ", ".join([report.method, *(f"{n} {value(v)}" for n, v in report.options.items())])),
            ("base", report.base),
            ("template", report.template),
            ("seed", report.seed or None),
            ("mixed", f"{facts.mixed:,} of {facts.tensors:,} tensors in which the models differ{copied}"),
            ("moved", f"{facts.moved:.2f} {moved}"),
            ("explained", f"{facts.fit:.0%} by the sum of their differences to it with these shares"),
        ]
    )
    rows = [
        (name, "" if name not in report.distances else f"{report.distances[name]:.3f}", f"{share:.3f}")
        for name, share in facts.shares.items()
    ]
    if not report.distances:
        return f"{head}\n\n{table(('model', 'share'), [(name, share) for name, _, share in rows], (1,))}"
    return f"{head}\n\n{table(('model', 'from the base', 'share'), rows, (1, 2))}"


def methods(document: Mapping[str, Any]) -> str:
    """The text of `unmergeable merge --methods`, and of the same with -m METHOD."""
    found = document["methods"]
    if len(found) > 1:
        rows = [(one["name"], one["about"]) for one in found if one["same_as"] is None]
        two = [
            one["name"].partition(":")[2] for one in found if one["same_as"] is None and ":" in one["name"]
        ]
        more = f"mergekit:NAME names mergekit's own where there are two ({', '.join(two)}); elsewhere it is the same"
        return f"{table(('method', 'what it does'), rows)}\n\n{more}"
    (one,) = found
    least, most = one["models"]
    bases = {
        "required": "needed",
        "optional": "optional",
        "pair": "the first of two models, or --base with one",
        "none": "none",
    }
    count = f"{least} or more" if most is None else f"{least} to {most}" if most > least else least
    head = fields(
        [
            ("method", one["name"]),
            ("does", one["about"]),
            ("base", bases[one["base"]]),
            ("models", count),
            ("options", None if one["options"] else "none"),
        ]
    )
    if not one["options"]:
        return head
    options = [
        (
            option["name"],
            option["value"],
            "must be given" if option["required"] else value(option["default"]),
            "yes" if option["by_model"] else "",
        )
        for option in one["options"]
    ]
    return f"{head}\n\n{table(('option', 'value', 'default', 'by model'), options)}"


def attacked(report: AttackReport) -> str:
    """The text of `unmergeable attack`."""
    from .attacks import NEEDS

    budget, spent = map(_counts, (report.budget, report.spent))
    distance = None
    if report.before is not None and report.after is not None:
        distance = f"{report.before:.3f} before, {report.after:.3f} after, from {report.anchor}"
    scalars = {name: one for name, one in report.facts.items() if not isinstance(one, Mapping)}
    head = fields(
        [
            ("attacked", f"{report.target} -> {report.destination}"),
            ("by", report.attack),
            ("needs", "; ".join(NEEDS.get(need, need) for need in report.needs) or "nothing"),
            ("access", f"level {report.access}"),
            ("cost", report.cost),
            ("budget", budget or None),
            ("spent", spent or None),
            ("function", "kept, by construction" if report.keeps_function else "not kept"),
            ("distance", distance),
            ("changed", plural(report.changed, "tensor")),
            *((name.replace("_", " "), None if one is None else value(one)) for name, one in scalars.items()),
            ("seed", report.seed),
            ("time", f"{report.seconds:.1f} s"),
        ]
    )
    more = [_mapping(name, one) for name, one in report.facts.items() if isinstance(one, Mapping) and one]
    return "\n\n".join([head, *more])


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in found.items())


def _mapping(name: str, found: Mapping[str, Any]) -> str:
    """Facts by name: a table with a column for each of their fields, or one of values."""
    rows = found.values()
    if not all(isinstance(row, Mapping) for row in rows):
        return table((name, "value"), [(key, value(one)) for key, one in found.items()], (1,))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [(key, *(value(row.get(column, "")) for column in columns)) for key, row in found.items()]
    return table((name, *columns), lines, range(1, len(columns) + 1))


def value(one: object) -> str:
    """An option or a fact as text."""
    if isinstance(one, bool):
        return str(one).lower()
    if isinstance(one, float):
        return f"{one:.4g}"
    if isinstance(one, Mapping):
        return " ".join(f"{name}:{value(part)}" for name, part in one.items())
    if isinstance(one, list | tuple | set | frozenset):
        return ", ".join(map(value, one)) or "none"
    return "none" if one is None else str(one)
