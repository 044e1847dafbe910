"""Methods: policies that pick an element of each site's group.

A method is a module with `draw(context) -> Drawn`. It is looked up by name and imported when used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from ..errors import UsageError
from .context import Context, Drawn

__all__ = ["METHODS", "Context", "Drawn", "Method", "method"]

METHODS = {
    "exact": "signed permutations at every site; no rounding, undone bit for bit (default)",
    "gauge": "the largest proven group at every site, with capped condition number",
    "mergelock": "random invertible matrices on query-key and value-output (arXiv 2509.01548)",
    "params": "MLP rearrangement, multi-head scaling and pruning (arXiv 2503.07661)",
}


class Method(Protocol):
    """What a method's module offers."""

    def draw(self, context: Context) -> Drawn: ...


def method(name: str) -> Method:
    """The method of this name.

    Raises:
        UsageError: no such method.
    """
    if name not in METHODS:
        raise UsageError("no such method", where=f"'{name}'", expected=" | ".join(METHODS))
    return cast(Method, import_module(f"{__name__}.{name}"))
