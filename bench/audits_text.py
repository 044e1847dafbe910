"""Figures and tables as Markdown has them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def page(*parts: str) -> str:
    """Parts with a blank line between them."""
    return "\n\n".join(part.strip("\n") for part in parts if part)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def number(value: float | None, digits: int = 2) -> str:
    """A figure with a true minus; nothing where there is none."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def share(level: Mapping[str, Any] | None) -> str:
    """What was recovered, with its interval."""
    if level is None:
        return ""
    if not level["reliable"]:
        return "not judged"
    low, high = level["interval"]
    return f"{number(level['recovered'])} [{number(low)}, {number(high)}]"


def level_of(result: Mapping[str, Any], level: int) -> Mapping[str, Any] | None:
    """What an audit found for a level; None if it was not audited."""
    return next((one for one in result["levels"] if one["level"] == level), None)


def flowing(text: str) -> str:
    """A paragraph whose lines are as long as any, whatever was filled in."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)
