"""Stock models: the class of transformers that opens a checkpoint, and the module that it makes of it.

Only what the library itself knows is opened: code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.files import load_json
from .errors import InputError

if TYPE_CHECKING:
    import torch

_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def model_class(config: Mapping[str, Any]) -> Any:
    """The stock class that config.json names, else the base class of its type; None if there is none."""
    import transformers

    known = transformers.CONFIG_MAPPING
    if config.get("model_type") not in known:
        return None
    for name in config.get("architectures") or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if found is not None and hasattr(found, "from_pretrained"):
            return found
    return transformers.AutoModel if known[config["model_type"]] in transformers.MODEL_MAPPING else None


@contextmanager
def quiet() -> Iterator[None]:
    """Loading reports and warnings of transformers are not ours to print."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def load_module(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> torch.nn.Module:
    """A checkpoint folder as its stock module: float32, in evaluation mode, every tensor accounted for.

    Args:
        path: a folder as `save_pretrained` writes it.
        device: where its weights are put.

    Raises:
        InputError: no stock class opens it, or tensors are missing, left over or of another shape.
    """
    import torch

    folder = Path(path)
    config = load_json(folder / "config.json")
    found = model_class(config)
    if found is None:
        raise InputError(
            "transformers has no class for the model",
            where=folder,
            got=f"model_type {config.get('model_type')!r}",
            hint="only stock classes are run: code that comes with a checkpoint never is",
        )
    with quiet():
        try:
            model, report = found.from_pretrained(
                str(folder),
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            text = str(error).strip().partition("\n")[0][:300]
            raise InputError("the stock class does not open the model", where=folder, got=text) from error
    for problem in _PROBLEMS:
        names = sorted(str(name) for name in report[problem])
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            what = f"tensors are {problem.removesuffix('_keys')}"
            raise InputError(what, where=folder, expected=f"those of {type(model).__name__}", got=shown)
    module: torch.nn.Module = model.to(device).eval()
    return module


def module_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module's state dict by name, each once: of tied ones the first name.

    They share their memory with the module.
    """
    saved = module.state_dict(keep_vars=True)
    found: dict[int, str] = {}
    for name, tensor in saved.items():
        found.setdefault(id(tensor), name)
    return {name: saved[name].detach() for name in found.values()}


def base_prefix(module: torch.nn.Module) -> str:
    """What the names of the body's tensors begin with, where the class has a head on a body; else empty."""
    prefix = getattr(module, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(module, prefix) else ""
