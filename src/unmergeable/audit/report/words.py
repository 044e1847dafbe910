"""The words of the report: what keys of the document are called, and what its terms mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from ...attacks import NEEDS
from ..rows import LEVELS
from ..scores import MARGIN
from ..separation import SEPARATION
from .numerals import setting

SIDE = {"protected": "protected model", "plain": "unprotected model", "without": "neither"}
# What a model is there for, in the order in which they are named.
ROLES = {
    "protected": "Protected model",
    "plain": "Before protection",
    "base": "Base",
    "own": "The thief's own",
}
# Figures of the protected model by itself, in the order in which they are shown.
STANDALONE = {
    "plain": "score before protection",
    "protected": "score after it",
    "difference": "difference",
    "interval": "95 % interval of the difference",
    "same_answers": "share of the same answers",
    "alone": "value of the worst of the thief's tasks, unmerged",
}
HEADERS = {
    "sha256": "SHA-256",
    "plain": "fine-tune",
    "standard_error": "standard error",
    "separation": "standard errors apart",
    "distance": "distance to the base",
    "memory_gib": "memory, GiB",
    "to_anchor": "to the anchor",
}
# What stands under "What the scores mean": a term, and what it is.
TERMS: tuple[tuple[str, str], ...] = (
    ("score", "accuracy, or minus the loss: of every example, and higher is better."),
    (
        "value",
        "a score on the scale on which the base is 0 and the task's own unprotected fine-tune is 1. It may be "
        f"below 0 or above 1. Tasks whose base and fine-tune are less than {SEPARATION:g} standard errors "
        "apart are refused.",
    ),
    ("own", "the least value among the thief's tasks: he wants to keep all of them."),
    ("joint", "the worse of two values: that of the protected task, and own."),
    (
        "floor",
        "what a thief insists on for his own tasks. With a floor q he takes the merge with the largest value of "
        f"the protected task among those with own ≥ q. A floor is at least {MARGIN:g} above what the fine-tune "
        "by itself has of his tasks: a merge that gives him no more than that is no theft by merging.",
    ),
    (
        "gain, G(q)",
        "the value of the protected task that he gets with a floor q, less what thieves at that level get "
        "without the protected model.",
    ),
    (
        "recovered",
        "the sum of the gains over all floors with the protected model, over the same sum with the unprotected "
        "one; in both, the best of all attacks. 0 %: the model is of no use to a thief. 100 %: as good as "
        "without protection. Protection is what is missing to 100 %.",
    ),
    (
        "interval",
        "95 %, from a paired bootstrap over validation and test examples: merges are chosen anew on every draw of "
        "the former and measured on the latter, with both models on the same ones. A requirement holds when the "
        "lower limit of protection reaches it.",
    ),
    (
        "control",
        "the same attack on the model as it was before protection. Where the control gets nothing either, the "
        "attack is weak, and its failure says nothing about the protection. Where an error kept an attack from "
        "being tried on the protected model alone, its control is not counted either.",
    ),
)

# What no audit of a lock can find otherwise, whatever its figures say.
LIMITS = (
    "A lock stops merges off the shelf. Whoever aligns the locked model to the base, or to any other fine-tune "
    "of it, solves for the symmetries and undoes it.",
    "A router of two models, or the protected model served beside another, is out of reach of any lock: both "
    "work as ever, at twice the size. So is a wide merge, which puts models side by side block by block.",
    "Whoever has labelled data, or the protected model's outputs, can train on them.",
    "The audit tries what is in its suite, with the coefficients and the budget given here. What it did not try, "
    "it did not measure: a figure here is a lower bound of what a better thief gets.",
)


def header(key: str) -> str:
    """A key of the document as the header of a column."""
    return HEADERS.get(key.lower(), key.replace("_", " "))


def title(name: str, model: Mapping[str, Any]) -> str:
    """What people call a model: its name, or its folder's where the name is only what it is there for."""
    return (PurePath(str(model.get("path", ""))).name or name) if name in ROLES else name


def by_itself(found: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """The figures of the protected model by itself: key, what it is, and the figure."""
    keys = [*(key for key in STANDALONE if key in found), *(key for key in found if key not in STANDALONE)]
    return [(key, STANDALONE.get(key) or header(key), found[key]) for key in keys]


def role(name: Any) -> str:
    """What a model is there for."""
    text = str(name)
    return ROLES.get(text, text[:1].upper() + text[1:])


def level(number: Any) -> str:
    """A level of access, by number and name."""
    return f"Level {number}: {LEVELS[number]}" if number in LEVELS else f"Level {number}"


def needs(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Everything that an attack in these rows needs, and what it is."""
    named = {need for row in rows for need in row["needs"]}
    return [(need, NEEDS[need]) for need in NEEDS if need in named]


def options(row: Mapping[str, Any]) -> str:
    """The options of a row's best merge, as one line."""
    return ", ".join(f"{name} {setting(value)}" for name, value in (row["options"] or {}).items())
