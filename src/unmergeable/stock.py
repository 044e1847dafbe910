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
from .errors import InputError, RunError

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


def saved_names(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a class calls its tensors in memory, and what its checkpoints call them, where those are the same tensors.

    Classes that transformers 5 renamed are saved by their earlier names; adapters are saved by the names in memory.
    No weights are read.

    Args:
        path: a checkpoint's folder.

    Returns: {name in memory: name in the files}; empty where transformers is not there, or has no such class.
    """
    held, saved = _on_meta(path, keep_vars=False)
    # What is cut or put together on the way is another tensor.
    known = {id(tensor): name for name, tensor in held.items()}
    return {known[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in known}


def class_tensors(path: str | os.PathLike[str]) -> list[tuple[str, ...]]:
    """The names of all tensors that a checkpoint's class has in its files; those of one and the same tensor together.

    No weights are read.

    Args:
        path: a checkpoint's folder, or a file by itself, of which nothing is known.

    Returns: empty where transformers is not there, or has no such class.
    """
    if not (Path(path) / "config.json").is_file():
        return []
    _, saved = _on_meta(path, keep_vars=True)
    found: dict[int, list[str]] = {}
    for name, tensor in saved.items():
        found.setdefault(id(tensor), []).append(name)
    return [tuple(names) for names in found.values()]


def _on_meta(
    path: str | os.PathLike[str], *, keep_vars: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state dict of a checkpoint's class, without memory: by the names in memory, and by those of files.

    Both empty where transformers is not there, or has no such class. keep_vars: tied tensors are one object.
    """
    try:
        import torch
        import transformers
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}, {}
    config = load_json(Path(path) / "config.json")
    found = model_class(config)
    if found is None:
        return {}, {}
    with quiet(), torch.device("meta"):
        try:
            settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            model = found(settings)
            held = model.state_dict(keep_vars=keep_vars)
            return held, revert_weight_conversion(model, dict(held))
        except Exception:  # a class may refuse a configuration in any way; then nothing is known of its names
            return {}, {}


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


@contextmanager
def memory(device: object, needs: str, hint: str) -> Iterator[None]:
    """A device that is full says so in our words: what needs the memory, and what helps.

    Raises:
        RunError: it is full. Tasks wrap whatever a model raises: what is behind that counts.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, RunError) as error:
        full = error.__cause__ if isinstance(error, RunError) else error
        if not isinstance(full, torch.OutOfMemoryError):
            raise
        said = str(full).partition("\n")[0][:200]
        raise RunError(f"not enough memory for {needs}", where=str(device), got=said, hint=hint) from error
