"""Audit: the honest judge. Merges and attacks a protected model as thieves would, and reports what each gets.

    audit("audit.yaml", "results", workers=2)

Data flows one way: configuration -> bench (models and tasks in memory) -> jobs -> rows -> scores -> results.json
and report.html. A row is one attack on one side; rows are kept by the hash of all that they depend on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["AuditResult", "audit", "init"]

_MODULES = {"audit": ".run", "AuditResult": ".results", "init": ".init"}

if TYPE_CHECKING:
    from .init import init
    from .results import AuditResult
    from .run import audit


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
