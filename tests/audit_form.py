"""The form of results.json, version 1, and where a document has another one."""

from __future__ import annotations

from typing import Any

NUMBER, TEXT, COUNT = (int, float), str, int
MAYBE = (int, float, type(None))
VALUES = {"protected": NUMBER, "own": NUMBER, "joint": NUMBER}
CHOSEN = {"row": (int, type(None)), "value": NUMBER, "own": NUMBER}
FORM: dict[str, Any] = {
    "document": TEXT, "version": COUNT, "tool": TEXT, "suite": COUNT, "rules?": COUNT, "seed": COUNT,
    "command": TEXT, "seconds": NUMBER, "machine": dict, "config": dict, "floors": [NUMBER],
    "notes": [TEXT], "holds": bool,
    "models": {
        "*": {"role": TEXT, "path": TEXT, "sha256": TEXT, "parameters": COUNT, "distance": MAYBE,
              "lock": (str, type(None))},
    },
    "tasks": {
        "*": {"kind": TEXT, "metric": TEXT, "role": TEXT, "screen": COUNT, "validation": COUNT, "test": COUNT,
              "base": NUMBER, "plain": NUMBER, "standard_error": NUMBER, "separation": MAYBE, "sha256": TEXT},
    },
    "standalone": {
        "alone": NUMBER, "plain": NUMBER, "protected": NUMBER, "difference": NUMBER, "interval": [NUMBER],
        "same_answers": NUMBER,
    },
    "levels": [{
        "level": COUNT, "name": TEXT, "recovered": MAYBE, "interval": [MAYBE], "protection": MAYBE,
        "gains": {"protected": MAYBE, "plain": MAYBE}, "reliable": bool, "reason": (str, type(None)),
        "verdict": TEXT, "notes": [TEXT], "stands_on": [{"level": COUNT, "row": COUNT, "attack": TEXT}],
        "floors": [{"asked": NUMBER, "floor": NUMBER, "protected": CHOSEN, "plain": CHOSEN, "without": CHOSEN,
                    "gain": {"protected": MAYBE, "plain": MAYBE}}],
        "joint": {"*": {**CHOSEN, "joint": NUMBER}},
    }],
    "rows": [{
        "id": COUNT, "attack": TEXT, "chain": [TEXT], "side": TEXT, "level": COUNT, "about": TEXT,
        "needs": [TEXT], "state": TEXT, "reason": (str, type(None)), "seed": COUNT, "tried": COUNT,
        "looks": [[NUMBER]], "facts": dict, "options": (dict, type(None)), "validation": (VALUES, None),
        "test": (VALUES, None), "scores?": {"*": NUMBER},
        "cost": {"inputs": COUNT, "labelled": COUNT, "tokens": COUNT, "forwards": NUMBER, "seconds": NUMBER,
                 "size": NUMBER},
    }],
    "curve": {"protected": [[NUMBER]], "plain": [[NUMBER]]},
    "grid": (
        {"attack": TEXT, "x": TEXT, "y": TEXT, "xs": [NUMBER], "ys": [NUMBER], "protected": [[MAYBE]],
         "plain": [[MAYBE]]},
        None,
    ),
    "left_out": [{"attack": TEXT, "level": COUNT, "side": TEXT, "reason": TEXT}],
    "requirements": [{"level": COUNT, "protection": NUMBER, "found": MAYBE, "holds": bool}],
}  # fmt: skip


def complaints(value: Any, form: Any, place: str = "$") -> list[str]:
    """Where a document has another form."""
    if isinstance(form, tuple) and not all(isinstance(one, type) for one in form):
        return [] if value is None else complaints(value, form[0], place)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return [f"{place} is no mapping"]
        if "*" in form:
            return [said for name in value for said in complaints(value[name], form["*"], f"{place}.{name}")]
        optional = {name[:-1] for name in form if name.endswith("?")}
        known = {name.removesuffix("?"): one for name, one in form.items()}
        wrong = [f"{place}.{name} is missing" for name in known.keys() - value.keys() - optional]
        wrong += [f"{place}.{name} is unknown" for name in value.keys() - known.keys()]
        both = known.keys() & value.keys()
        return wrong + [
            said for name in both for said in complaints(value[name], known[name], f"{place}.{name}")
        ]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{place} is no list"]
        return [said for n, one in enumerate(value) for said in complaints(one, form[0], f"{place}[{n}]")]
    allowed = form if isinstance(form, tuple) else (form,)
    if isinstance(value, bool) and bool not in allowed:
        return [f"{place} is {value}"]
    return [] if isinstance(value, allowed) else [f"{place} is {value!r}"]
