"""What every merge method takes: a base or none, how many models, which options.

Read from the functions of this package and from the table of mergekit's, so that a command line can list it
and a call that makes no sense is refused before a model is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UsageError
from ..options import REQUIRED, Option, declared, unknown
from . import _OWN, METHODS, merge_method

if TYPE_CHECKING:
    from .kit import Method

__all__ = ["check_options", "describe", "options_of"]

_HINTS = {
    "weight": "give -w W, one for all or one for each model in turn",
    "protected": "give --set protected=NAME, the last part of the path of one of the models",
    "grams": "gather them in Python: unmergeable.merging.statistics.grams",
    "fishers": "gather them in Python: unmergeable.merging.statistics.fisher_information",
}


def options_of(method: str) -> dict[str, Option]:
    """The options of a merge method of `merging.METHODS`, by name.

    Raises:
        UsageError: no such method.
        InputError: torch is missing.
    """
    if method not in METHODS:
        raise UsageError("no such merge method", where=f"'{method}'", expected=" | ".join(METHODS))
    try:
        import torch  # noqa: F401
    except ImportError as error:
        hint = "pip install 'unmergeable[merge]'"
        raise InputError("torch cannot be imported", expected="torch >= 2.6", got=error, hint=hint) from error
    table = _table(method)
    if table is None:
        return declared(merge_method(method))
    from . import kit

    found = {}
    for name, default in table.options.items():
        # Options without a default, and the one whose default is None, are numbers.
        kind = type(default).__name__ if isinstance(default, bool | int | float) else "float"
        default = REQUIRED if default is kit.REQUIRED else default
        found[name] = Option(name, (kind,), default, each=name in table.each)
    if table.base == "optional":
        found["with_base"] = Option("with_base", ("bool",), True)
    return found


def describe(method: str | None = None) -> dict[str, Any]:
    """All merge methods with one line each, or all about one: the JSON document of `merge --methods`.

    Raises:
        UsageError: no such method. InputError: torch is missing.
    """
    document: dict[str, Any] = {"document": "unmergeable.merge-methods", "version": 1}
    if method is None:
        bare = {name: name.removeprefix("mergekit:") for name in METHODS}
        same = {name: short for name, short in bare.items() if short != name and short not in _OWN}
        listed = [{"name": n, "about": about, "same_as": same.get(n)} for n, about in METHODS.items()]
        return {**document, "methods": listed}
    options = options_of(method)
    table = _table(method)
    return {
        **document,
        "methods": [
            {
                "name": method,
                "about": METHODS[method],
                "base": "required" if table is None else table.base,
                "models": [1 if table is None else table.least, None if table is None else table.most],
                "options": [
                    {
                        "name": option.name,
                        "value": option.value,
                        "required": option.default is REQUIRED,
                        "default": None if option.default is REQUIRED else option.default,
                        "by_model": option.each,
                    }
                    for option in options.values()
                ],
            }
        ],
    }


def _table(method: str) -> Method | None:
    """What mergekit's method of this name takes; None for a method of this package."""
    from .kit import TABLE

    function = merge_method(method)  # mergekit's are one function, bound to a name
    return TABLE[function.args[0]] if isinstance(function, partial) else None


def check_options(method: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse what would only be seen after all models were read.

    Args:
        method: one of `merging.METHODS`.
        given: its options.
        names: of the models.

    Raises:
        UsageError: an option that the method does not have, that is missing or out of range, values by model
            where one is for all or for other models; a wrong number of models.
        InputError: torch is missing.
    """
    known = options_of(method)
    for name, value in given.items():
        if name not in known:
            raise unknown(method, name, known)
        where = f"{method}: {name}"
        if isinstance(value, Mapping) and known[name].kinds:
            if not known[name].each:
                raise UsageError("this option is one for all models", where=where, hint=_one(method, name))
            if value.keys() != set(names):
                expected, got = ", ".join(names), ", ".join(value)
                raise UsageError("values and models differ", where=where, expected=expected, got=got)
        values = list(value.values()) if isinstance(value, Mapping) else [value]
        if not all(math.isfinite(one) for one in values if isinstance(one, float)):
            raise UsageError("not a finite number", where=where, got=value)
        if name == "density" and not all(isinstance(one, float | int) and 0 < one <= 1 for one in values):
            raise UsageError("out of range", where=where, expected="above 0, at most 1", got=value)
    for name, option in known.items():
        if option.default is REQUIRED and name not in given:
            hint = _HINTS.get(name, f"give --set {name}=VALUE")
            raise UsageError(f"{method} needs an option", expected=name, hint=hint)
    table = _table(method)
    least, most = (1, None) if table is None else (table.least, table.most)
    if len(names) < least or (most is not None and len(names) > most):
        expected = (
            str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        )
        raise UsageError(f"a wrong number of models for {method}", expected=expected, got=len(names))


def _one(method: str, name: str) -> str:
    """A hint for an option that was given by model: mergekit's method of the same name may take it so."""
    other = f"mergekit:{method}"
    by_model = other in METHODS and name in (known := options_of(other)) and known[name].each
    return f"give one value; {other} takes {name} by model" if by_model else "give one value"
