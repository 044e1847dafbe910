"""Options by name: what a function declares, and what NAME=VALUE on a command line means to it.

A merge method or an attack is a function, and its keywords are its options: their defaults and annotations say
which values make sense. So a misspelt option is refused by name, and a value is read as what it has to be.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from .errors import UsageError

__all__ = ["REQUIRED", "SEEDS", "Option", "assign", "check_seed", "declared", "unknown"]

SEEDS = 2**63 - 10  # more than torch takes: some parts draw with a few seeds after the one that is given
REQUIRED = inspect.Parameter.empty  # the default of an option that has none
_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
_SEVERAL = {"Sequence", "Iterable", "Collection", "tuple", "list"}


def check_seed(seed: int) -> None:
    """Refuse what no generator takes.

    Raises:
        UsageError: not a whole number from 0 to `SEEDS`.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise UsageError("no seed", where="seed", expected="0 to 2⁶³ − 11", got=seed)


@dataclass(frozen=True)
class Option:
    """One option of a merge method or an attack.

    Attributes:
        name: its name.
        kinds: what a value may be, of bool, int, float and str; empty if only Python can give one.
        default: its default, or `REQUIRED`.
        several: whether it is a list of such values.
        each: whether it may also be given by model, as a mapping.
    """

    name: str
    kinds: tuple[str, ...]
    default: Any = REQUIRED
    several: bool = False
    each: bool = False

    @property
    def value(self) -> str:
        """What a value may be, in words."""
        words = " or ".join(_WORDS[kind] for kind in self.kinds) or "only from Python"
        return f"{words}, or several" if self.several else words

    def read(self, text: str) -> Any:
        """The value that a text stands for: "0.5", "true", "0,1" for several, "a:0.5,b:1" by model.

        Raises:
            UsageError: the text is no value of this option.
        """
        if not self.kinds:
            raise UsageError("this option can be given from Python alone", where=self.name)
        if self.each and ":" in text:
            pairs = [part.rpartition(":") for part in text.split(",")]
            found = {model: self._one(value) for model, _, value in pairs}
            if len(found) < len(pairs):
                raise UsageError("a model is named twice", where=self.name, got=text)
            return found
        return tuple(map(self._one, text.split(","))) if self.several else self._one(text)

    def _one(self, text: str) -> Any:
        for kind in self.kinds:
            if kind == "bool" and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if kind == "int" and re.fullmatch(r"[+-]?\d+", text):
                return int(text)
            if kind == "float" and (number := _number(text)) is not None:
                return number
            if kind == "str" and text:
                return text
        raise UsageError("not a value of this option", where=self.name, expected=self.value, got=f"'{text}'")


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def declared(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a function, by name: its keyword-only parameters, as they are annotated."""
    return {
        parameter.name: _declared(parameter)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _declared(parameter: inspect.Parameter) -> Option:
    text = parameter.annotation
    if not isinstance(text, str):
        text = inspect.formatannotation(text)
    plain = re.sub(r"Mapping\[str, (bool|int|float|str)\]", r"\1", text)
    words = set(re.findall(r"\w+", plain))
    # A mapping to anything else, or a function, is nothing that can be typed.
    kinds = () if words & {"Mapping", "Callable", "Any"} else tuple(kind for kind in _WORDS if kind in words)
    return Option(parameter.name, kinds, parameter.default, bool(words & _SEVERAL), plain != text)


def assign(what: str, known: Mapping[str, Option], pairs: Iterable[str]) -> dict[str, Any]:
    """Options from a command line's NAME=VALUE.

    Args:
        what: the method or attack, for messages.
        known: its options.
        pairs: the texts.

    Raises:
        UsageError: no pair, no such option, one that is given twice, or a value that it cannot have.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError("an option needs a value", where=f"--set {pair}", expected="NAME=VALUE")
        if name not in known:
            raise unknown(what, name, known)
        if name in found:
            raise UsageError("an option is given twice", where=f"--set {pair}")
        found[name] = known[name].read(text)
    return found


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for an option that a method or attack does not have."""
    known = list(known)
    near = get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else None
    expected = " | ".join(known) or "none"
    return UsageError(f"{what} has no such option", expected=expected, got=name, hint=hint)
