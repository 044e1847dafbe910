"""A wide merge as a checkpoint of a wider configuration, which the stock class opens like any other.

Where a class lets heads and MLP rows grow without its width, y = x + Σ wᵢ fᵢ(x) is a model of that class:
heads and rows of all models one behind the other, what they write scaled by wᵢ, norms folded into what they
feed. Nothing is written that was not run in float64 against `WideModel`; what has no such checkpoint is
refused with the reason, and remains a module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from ..checkpoint import (
    Checkpoint,
    Staging,
    check_destination,
    copy_side_files,
    open_checkpoint,
    write_file,
)
from ..errors import InputError, UsageError
from ..match import Match, match_spec
from ..prove.inputs import InputSet, flatten_outputs, make_inputs
from ..specs import find_spec
from ..stock import load_module, module_state
from .wide import WideBlock, WideModel, block_lists
from .wide_config import Widened, widen
from .wide_files import open_written, stored_dtypes, write_weights
from .wide_tensors import HINT, Float64, State, linear_layers, wide_blocks

DOCUMENT, DOCUMENT_VERSION = "unmergeable.wide", 1
# Largest relative difference to the module that passes. All of it is computed in float64, where the order of
# sums makes 1e-13 or less; a head, norm or bias in a wrong place makes as much as models differ, 1e-4 and more.
BOUND = 1e-9

Path_ = str | os.PathLike[str]
Outputs: TypeAlias = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class WideReport:
    """What was put side by side and written; `as_dict` is the JSON document.

    Attributes:
        dst, models, weights, host: how to do it again.
        architecture: the class that opens it.
        fields: of config.json that were changed, by dotted path: before and after; None: it was not there.
        folded: norms that differ between the models and went into the layers behind them.
        private: names outside of blocks that are the host's alone.
        empty_heads: key-value heads of a layer that belong to no model, for a number that the class accepts.
        size_ratio: numbers in it over those of the host.
        error: of its outputs before rounding against the module's, in float64; `bound` is what was allowed.
        rounding: the same for the tensors as they were stored.
        dtype: what most of it is stored in.
    """

    dst: str
    models: tuple[str, ...]
    weights: tuple[float, ...]
    host: int
    architecture: str
    fields: Mapping[str, tuple[int | None, int]]
    folded: tuple[str, ...]
    private: tuple[str, ...]
    empty_heads: int
    size_ratio: float
    error: float
    bound: float
    rounding: float
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "document": DOCUMENT,
            "version": DOCUMENT_VERSION,
            "dst": self.dst,
            "models": list(self.models),
            "weights": list(self.weights),
            "host": self.host,
            "architecture": self.architecture,
            "fields": {name: list(values) for name, values in self.fields.items()},
            "folded": list(self.folded),
            "private": list(self.private),
            "empty_heads": self.empty_heads,
            "size_ratio": self.size_ratio,
            "error": self.error,
            "bound": self.bound,
            "rounding": self.rounding,
            "dtype": self.dtype,
        }


def wide_checkpoint(
    dst: Path_,
    models: Sequence[Path_],
    weights: Sequence[float],
    *,
    host: int = 0,
    private: Sequence[str] = (),
) -> WideReport:
    """Write models side by side as one checkpoint of their class.

    It computes what `WideModel(models, weights, host=host, private=private)` does, and can what its class can,
    such as decoding with a cache. The models are read in float32; what is stored is computed in float64 and
    rounded once to the host's dtype.

    Args:
        dst: the new folder; it appears whole or not at all.
        models: folders of one class, all of them in memory at once; one of them may be the base.
        weights: one for each.
        host: the index of the model whose configuration, other files and private tensors it gets.
        private: beginnings of names that are the host's although all models have them in one shape: heads.

    Raises:
        UsageError: not one weight for each model, weights that sum to zero, no such private tensors.
        InputError: models that do not fit together, or whose class has no such checkpoint, with the reason; a
            destination that exists.
        RunError: the disk is full or fails. Nothing is left at DST in any of these cases.
    """
    if len(models) < 2 or len(weights) != len(models) or not 0 <= host < len(models):
        got = f"{len(models)} models, {len(weights)} weights, host {host}"
        raise UsageError("a wide merge needs two models or more and one weight for each", got=got)
    if not np.isfinite(np.asarray(weights, dtype=np.float64)).all():
        raise UsageError("weights of a wide merge are numbers", got=list(weights))
    with open_checkpoint(models[host]) as like:
        for path in models:
            check_destination(path, dst, len(models) * like.nbytes)
        made = _make(like, models, [float(weight) for weight in weights], host, tuple(private))
        stored, common = stored_dtypes(like, made.tensors)
        with Staging(dst) as staged:
            side = [
                name
                for name in like.side_files
                if name != "config.json" and ".safetensors.index." not in name
            ]
            copy_side_files(like.root, side, like.side_folders, {}, staged.path)
            text = json.dumps(made.widened.config, indent=2, ensure_ascii=False) + "\n"
            write_file(staged.path / "config.json", text.encode())
            write_weights(staged.path, made.tensors, stored)
            rounding, error = _measured(staged.path, Path(dst), made)
            like.check_unchanged()
            staged.commit()
    return WideReport(
        dst=str(dst),
        models=tuple(str(path) for path in models),
        weights=tuple(float(weight) for weight in weights),
        host=host,
        architecture=made.architecture,
        fields=made.widened.fields,
        folded=made.folded,
        private=made.private,
        empty_heads=made.widened.empty,
        size_ratio=sum(tensor.numel() for tensor in made.tensors.values()) / made.numbers,
        error=error,
        bound=BOUND,
        rounding=rounding,
        dtype=common,
    )


@dataclass(frozen=True)
class _Made:
    """What is left of the models when they are side by side: tensors in float64, and what they must compute."""

    tensors: State
    widened: Widened
    entries: Sequence[InputSet]
    want: Outputs
    folded: tuple[str, ...]
    private: tuple[str, ...]
    architecture: str
    numbers: int  # of the host
    differing: tuple[str, ...]  # fields of the models' configurations


def _make(
    like: Checkpoint, paths: Sequence[Path_], weights: Sequence[float], host: int, private: tuple[str, ...]
) -> _Made:
    """Load models, run them side by side, and compute the tensors of one model that does the same."""
    modules = [load_module(path).double() for path in paths]
    own = modules[host]
    _check_alike(modules, paths, host)
    wide = WideModel(modules, weights, host=host, private=private)
    for name in private:
        if not any(known.startswith(name) for known in wide.private):
            raise UsageError("no tensor outside of blocks has such a name", got=name)
    config, canonical, match = _match(like, own)
    widened = widen(own, config, canonical, match, len(modules))
    entries, want = _wanted(wide, own)
    inside = tuple(f"{path}." for path in block_lists(own))
    layers = linear_layers(own, inside, entries[0].arguments)
    blocks = wide_blocks(modules, weights, widened.wider, layers, inside)
    outside = wide.model.state_dict()
    names = module_state(own)
    return _Made(
        tensors={name: blocks.tensors[name] if name in blocks.tensors else outside[name] for name in names},
        widened=widened,
        entries=entries,
        want=want,
        folded=blocks.folded,
        private=tuple(wide.private),
        architecture=type(own).__name__,
        numbers=sum(tensor.numel() for tensor in names.values()),
        differing=_differing(modules),
    )


def _check_alike(modules: Sequence[nn.Module], models: Sequence[Path_], host: int) -> None:
    """That models are of one class and tie the same tensors."""
    own = modules[host]
    for module, path in zip(modules, models, strict=True):
        if type(module) is not type(own):
            expected, got = type(own).__name__, type(module).__name__
            raise InputError("models of different classes", where=path, expected=expected, got=got)
        if _ties(module) != _ties(own):
            what = "some of the models tie tensors that others keep apart"
            got = ", ".join(sorted(_ties(module) ^ _ties(own)))
            raise InputError(what, where=path, got=got, hint="save them all tied or all apart")


def _ties(module: nn.Module) -> set[str]:
    """Names of tensors that are others' once more."""
    return module.state_dict().keys() - module_state(module).keys()


def _match(like: Checkpoint, own: nn.Module) -> tuple[dict[str, Any], dict[str, Any], Match]:
    """The host's config.json, the same as the spec reads it, and the spec laid over the module's tensors."""
    config = dict(like.config or {})
    shapes = {name: tuple(tensor.shape) for name, tensor in module_state(own).items()}
    named = {**config, "architectures": [type(own).__name__]}
    spec, canonical = find_spec(named, shapes, where=str(like.root))
    return config, canonical, match_spec(spec, shapes, canonical, str(like.root))


# --- running ------------------------------------------------------------------------------------------------


def _wanted(wide: WideModel, own: nn.Module) -> tuple[list[InputSet], Outputs]:
    """Inputs that the wide model takes, and what it makes of them.

    Raises:
        InputError: there are none, or a block is not the sum of its input and what its parts give.
    """
    config: Any = own.config
    entries: list[InputSet] = []
    want: Outputs = {}
    for number, entry in enumerate(make_inputs(own, config.to_dict())):
        try:
            want |= _outputs(wide, [entry])
        except (ValueError, TypeError, RuntimeError) as error:  # a class may refuse some kinds of inputs
            if number == 0:
                raise InputError("the models do not run", where=type(own).__name__, got=error) from error
            continue
        entries.append(entry)
    if not entries:
        raise InputError("no inputs are known for the models, so nothing is proven", where=type(own).__name__)
    for name, block in wide.named_modules():
        if isinstance(block, WideBlock) and not block.writers:
            what = "a block is not the sum of its input and what its parts give: it normalises or scales them"
            where = f"{type(own).__name__}: {name.removeprefix('model.')}"
            raise InputError(what, where=where, hint=HINT)
    return entries, want


def _outputs(model: nn.Module, entries: Sequence[InputSet]) -> Outputs:
    with torch.no_grad(), Float64():
        return {entry.label: flatten_outputs(model(**entry.arguments), entry.masks) for entry in entries}


def _difference(found: Outputs, want: Outputs) -> float:
    """Largest ‖found − want‖ / ‖want‖ of the output tensors; infinite where it is not a number."""
    worst = 0.0
    for label, tensors in want.items():
        for one, two in zip(found[label], tensors, strict=True):
            off = float((one - two).norm() / two.norm())
            worst = max(worst, off if off < float("inf") else float("inf"))
    return worst


def _measured(folder: Path, dst: Path, made: _Made) -> tuple[float, float]:
    """How far what was written is from the module: as it was rounded, and before that.

    Raises:
        InputError: it is another function.
    """
    module = open_written(folder, dst, made.tensors)
    rounding = _difference(_outputs(module, made.entries), made.want)
    for name, tensor in module_state(module).items():
        tensor.copy_(made.tensors[name])
    error = _difference(_outputs(module, made.entries), made.want)
    if not error <= BOUND:
        fields = ", ".join(made.differing)
        raise InputError(
            "the checkpoint would not compute what the models do side by side",
            where=dst,
            expected=f"a relative difference of at most {BOUND}",
            got=f"{error:.1e}" + (f"; their configurations differ in {fields}" if fields else ""),
            hint=HINT,
        )
    return rounding, error


def _differing(modules: Sequence[nn.Module]) -> tuple[str, ...]:
    """Fields that are not the same in the configurations of all models."""
    known: list[Any] = [module.config for module in modules]
    fields = [config.to_dict() for config in known]
    names = sorted({name for one in fields for name in one})
    return tuple(name for name in names if any(one.get(name) != fields[0].get(name) for one in fields))
