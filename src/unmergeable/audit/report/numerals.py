"""Numbers as people read them: rounded, with a true minus, a dash where there is none.

Everything that the report prints goes through one of these, so that a figure looks the same wherever it stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DASH, MINUS, SPACE = "–", "−", "\N{NO-BREAK SPACE}"
SHOWN = 12  # characters of a hash

_HASH = re.compile(r"[0-9a-f]{32,}")
_NEGATIVE = re.compile(r"(?<![\w.-])-(?=\.?\d)")
_NOTHING = re.compile(r"(?<![\w.-])-(?=0 ?%)")
_PERCENT = re.compile(r"(?<=\d) ?%")
_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"))


def known(value: Any) -> bool:
    """Whether it is a number at all: neither None nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def figure(value: Any, digits: int = 2) -> str:
    """A score, value or gain, to so many decimals."""
    if not known(value):
        return DASH
    if math.isinf(value):
        return f"{MINUS if value < 0 else ''}∞"
    text = f"{abs(value):,.{digits}f}"
    return f"{MINUS}{text}" if value < 0 and text.strip("0.") else text


def percent(value: Any) -> str:
    """A share, in whole percent."""
    return DASH if not known(value) else f"{figure(100 * value, 0)}{SPACE}%"


def count(value: Any) -> str:
    """How many: in full below a million, to three digits above it."""
    if not known(value) or math.isinf(value):
        return figure(value)
    for scale, name in _SCALES:
        if abs(value) >= scale:
            return f"{figure(value / scale, max(0, 2 - int(math.log10(abs(value) / scale))))}{SPACE}{name}"
    return figure(value, 0)


def duration(seconds: Any) -> str:
    """A time in its own unit."""
    if not known(seconds) or math.isinf(seconds):
        return figure(seconds)
    for most, unit, name in ((100, 1, "s"), (6000, 60, "min"), (math.inf, 3600, "h")):
        if seconds < most:
            return f"{figure(seconds / unit, 1 if seconds < 10 * unit else 0)}{SPACE}{name}"
    raise AssertionError(seconds)


def times(value: Any) -> str:
    """A size against one model's."""
    return DASH if not known(value) else f"{figure(value, 1)}{SPACE}×"


def setting(value: Any) -> str:
    """A coefficient, as short as it can be said."""
    return f"{value:g}".replace("-", MINUS) if known(value) else cell(value).text


def typeset(sentence: Any) -> str:
    """A sentence with its numbers as they are set elsewhere: a true minus, a space before the percent sign."""
    signed = _NEGATIVE.sub(MINUS, _NOTHING.sub("", str(sentence)))
    return _PERCENT.sub(f"{SPACE}%", signed)


def sentence(clause: Any) -> str:
    """A reason as a sentence of its own."""
    text = typeset(clause).strip()
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "?")) else ".")


@dataclass(frozen=True)
class Cell:
    """What stands in a table: text, the whole of it where it was cut, and whether it is a number."""

    text: str
    full: str | None = None
    number: bool = False


def cell(value: Any) -> Cell:
    """Any value of a JSON document, for a table."""
    if value is None:
        return Cell(DASH)
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int):
        return Cell(count(value), f"{value:,}" if abs(value) >= _SCALES[-1][0] else None, True)
    if isinstance(value, float):
        return Cell(_plain(value), None, True)
    if isinstance(value, Mapping):
        return Cell(", ".join(f"{key} {cell(one).text}" for key, one in value.items()) or DASH)
    if isinstance(value, list | tuple):
        return Cell(", ".join(cell(one).text for one in value) or DASH)
    text = str(value)
    if _HASH.fullmatch(text):
        return Cell(f"{text[:SHOWN]}…", text)
    return Cell(text or DASH)


def _plain(value: float) -> str:
    """A number whose meaning is not known: three decimals, or three digits where those say nothing."""
    if not known(value) or math.isinf(value) or value == 0 or 0.001 <= abs(value) < 1e6:
        whole = known(value) and not math.isinf(value) and value == int(value)
        return figure(value, 0 if whole else 3)
    return f"{value:.2e}".replace("-", MINUS)
