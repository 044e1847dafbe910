"""Lock a fine-tuned model so that merges of it fail, without changing what it computes, and undo it.

    import unmergeable as um

    key = um.generate_key("owner.key")
    um.lock("my-model", "my-model-locked", key=key)
    um.verify("my-model", "my-model-locked", key=key)
    um.unlock("my-model-locked", "my-model-again", key=key)

Every verb mirrors a command of the command line. Importing this package imports nothing else: a verb is
looked up when it is first used, so that `unmergeable --help` needs neither numpy nor torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# public name -> module that defines it
_PUBLIC = {
    "generate_key": "keys",
    "load_key": "keys",
    "Key": "keys",
    "inspect": "inspection",
    "Inspection": "inspection",
    "lock": "lock",
    "lock_module": "module",
    "verify": "verify",
    "unlock": "unlock",
    "merge": "merge",
    "audit": "audit",
    "attack": "attack",
    "harden": "harden",
    "demo": "demo",
    "model_card": "modelcard",
    "UnmergeableError": "errors",
    "InputError": "errors",
    "ClaimError": "errors",
    "UsageError": "errors",
    "RunError": "errors",
}

__all__ = [
    "ClaimError",
    "InputError",
    "Inspection",
    "Key",
    "RunError",
    "UnmergeableError",
    "UsageError",
    "__version__",
    "attack",
    "audit",
    "demo",
    "generate_key",
    "harden",
    "inspect",
    "load_key",
    "lock",
    "lock_module",
    "merge",
    "model_card",
    "unlock",
    "verify",
]

if TYPE_CHECKING:
    from .attack import attack
    from .audit import audit
    from .demo import demo
    from .errors import ClaimError, InputError, RunError, UnmergeableError, UsageError
    from .harden import harden
    from .inspection import Inspection, inspect
    from .keys import Key, generate_key, load_key
    from .lock import lock
    from .merge import merge
    from .modelcard import model_card
    from .module import lock_module
    from .unlock import unlock
    from .verify import verify


class _Package(ModuleType):
    """A package whose public names win over modules of the same name: `um.lock` is the function, always."""

    def __getattr__(self, name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_PUBLIC[name]}", self.__name__), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a module to its package once it is loaded: bind the verb instead.
        if isinstance(value, ModuleType) and _PUBLIC.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_PUBLIC})


sys.modules[__name__].__class__ = _Package
