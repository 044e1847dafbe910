"""The audit's report: one page that needs nothing else, made from the JSON document of an audit alone.

It is written for two readers: one who looks, and gets a sentence and a bar for each level of access; and one who
checks, and finds every attack beside its control, every reason, and how to do it again. Names in the document are
other people's text, so that everything is escaped. No script, no request, the same bytes for the same document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...errors import InputError
from ..results import DOCUMENT, DOCUMENT_VERSION
from ..rows import SIDES
from . import bars, curve, numerals, tables, words

__all__ = ["render"]

# What a document has; `AuditResult.as_dict` writes all of it.
KEYS = (
    "tool", "suite", "seed", "command", "seconds", "machine", "config", "models", "tasks", "standalone", "floors",
    "levels", "rows", "curve", "grid", "left_out", "notes", "requirements", "holds",
)  # fmt: skip


def render(document: Mapping[str, Any]) -> str:
    """The report of an audit as one HTML page.

    Args:
        document: what `AuditResult.as_dict` returns, or the same read from results.json.

    Raises:
        InputError: another document, another version, or one that is not whole.
    """
    found = (document.get("document"), document.get("version"))
    if found != (DOCUMENT, DOCUMENT_VERSION):
        raise InputError(
            "not a document that a report can be made of",
            where="results.json",
            expected=f"{DOCUMENT}, version {DOCUMENT_VERSION}",
            got=f"{found[0]}, version {found[1]}",
            hint="give the results.json of an audit by this version of the package",
        )
    missing = [key for key in KEYS if key not in document]
    if missing:
        raise InputError("the document is not whole", where="results.json", expected=", ".join(missing))
    return _environment().get_template("report.html").render(document=document, **_shown(document))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__name__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        numerals.figure, numerals.percent, numerals.count, numerals.duration, numerals.times,
        numerals.setting, numerals.typeset, numerals.sentence, tables.entry, words.header, words.role,
        words.level, words.options,
    ):  # fmt: skip
        environment.filters[function.__name__] = function
    environment.globals |= {"SIDE": words.SIDE, "SIDES": SIDES, "TERMS": words.TERMS, "LIMITS": words.LIMITS}
    return environment


def _shown(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the templates show that has to be worked out from the document."""
    rows = document["rows"]
    curves = curve.clean(document["curve"])
    scale = bars.scale(document["levels"])
    cases, attacks = tables.known_cases(rows)
    paired, alone = tables.pairs(attacks)
    roles: dict[str, list[str]] = {role: [] for role in words.ROLES}
    for name, model in document["models"].items():
        roles.setdefault(str(model.get("role", "other")), []).append(words.title(name, model))
    return {
        "roles": {role: names for role, names in roles.items() if names},
        "bars": [bars.bar(level, scale) for level in document["levels"]],
        "curve": Markup(curve.draw(curves)) if curves else None,
        "curve_words": curve.words(curves),
        "curve_steps": curve.steps(curves),
        "heats": tables.heats(document["grid"]) if document["grid"] else [],
        "models": tables.records(document["models"]),
        "tasks": tables.records(document["tasks"]),
        "standalone": words.by_itself(document["standalone"]),
        "cases": cases,
        "paired": paired,
        "alone": alone,
        "needs": words.needs(rows),
        "troubles": tables.troubles(rows, document["left_out"]),
        "config": json.dumps(document["config"], indent=2, ensure_ascii=False, default=str),
    }
