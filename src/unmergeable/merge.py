"""The verb `merge`: with a key, of locked models (`authorised`); without one, off the shelf (`merging`).

What belongs to the other of the two is refused, and so is an option that the method does not have, before a
model is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from .errors import UsageError
from .merging import METHODS

if TYPE_CHECKING:
    from . import authorised
    from .engine import Progress
    from .keys import Key
    from .merging import write

    Path_ = str | os.PathLike[str]

__all__ = ["merge"]

# Keywords that belong to one of the two alone, and the options of the command line.
_WITH_KEY = {
    "lock_method": "--lock",
    "scales": "--scales",
    "condition": "condition",
    "domain": "--domain",
    "salt": "salt",
    "jobs": "--jobs",
}
_WITHOUT_KEY = {"options": "--set", "template": "--template", "seed": "--seed", "force": "--force"}
_MEANS = ("linear", "mergekit:linear")  # without weights these are the mean of the models


@overload
def merge(
    models: Sequence[Path_],
    dst: Path_,
    *,
    key: Key | Path_,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    base: Path_ | None = None,
    density: float | None = None,
    lock_method: str = "exact",
    scales: bool = False,
    condition: float | None = None,
    domain: str | None = None,
    jobs: int = 2,
    progress: Progress | None = None,
    salt: bytes | None = None,
) -> authorised.MergeReport: ...


@overload
def merge(
    models: Sequence[Path_],
    dst: Path_,
    *,
    key: None = None,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    base: Path_ | None = None,
    density: float | None = None,
    options: Mapping[str, Any] | None = None,
    template: Path_ | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> write.MergeReport: ...


def merge(
    models: Sequence[Path_], dst: Path_, *, key: Key | Path_ | None = None, **given: Any
) -> authorised.MergeReport | write.MergeReport:
    """Merge models into a checkpoint that stock loaders open.

    With a key, models that were locked with it are undone, merged and locked afresh, and `lock_method`,
    `scales`, `condition`, `domain`, `salt` and `jobs` say how: see `authorised.merge`. Without one, plain
    models and LoRA adapters are merged as anybody can merge them.

    Args:
        models: folders or .safetensors files; options by model call them by the last part of their path.
        dst: the new folder or file; it appears whole or not at all.
        key: the key that all models were locked with, or its file.
        method: without a key one of `merging.METHODS`, with one of `authorised.METHODS`.
        weights: of each model in turn; without a key also one for all. With a key 1 if not given; without,
            `linear` is the mean then, and other methods that need weights say so.
        base: the model that they were fine-tuned from, for methods that need it.
        density: part of each task vector that is kept, for methods that have this option.
        options: more of the method's own, by name.
        template: the model whose configuration, dtypes and private tensors the result gets: one of the
            models, or the base, which it is by default.
        seed: of methods that draw.
        force: write the result also if it is not a merge of the models.
        progress: called with work done, work in all, and a label: bytes with a key, steps without.

    Raises:
        UsageError: no such method or option, one that is missing or that belongs to the other way to merge.
        InputError: models that cannot be used or do not fit together, a destination that exists.
        ClaimError: the result is not a merge of the models (copied from one of them, tensors dropped, not
            finite), or its lock fails.
        RunError: the disk is full or fails. Nothing is left at DST in any of these cases.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, flag in (_WITH_KEY if key is None else _WITHOUT_KEY).items():
        if name in given:
            which, hint = (
                ("with a key", "give -k KEY, or leave it out")
                if key is None
                else ("without a key", "leave out this, or -k")
            )
            raise UsageError(f"{flag} belongs to merging {which}", hint=hint)
    if key is None:
        return _plain(models, dst, **given)
    from . import authorised

    method = given.get("method", "linear")
    if method in METHODS and method not in authorised.METHODS:
        expected = " | ".join(authorised.METHODS)
        raise UsageError(
            f"{method} does not merge with a key",
            expected=expected,
            hint="unlock, merge without -k, and lock",
        )
    return authorised.merge(models, dst, key=key, **given)


def _plain(
    models: Sequence[Path_],
    dst: Path_,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    base: Path_ | None = None,
    density: float | None = None,
    options: Mapping[str, Any] | None = None,
    template: Path_ | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> write.MergeReport:
    """Merge without a key; see `merge`."""
    from .merging.catalogue import check_options, options_of

    options_of(method)  # says that there is no such method, or no torch, before the next line fails
    from .merging.write import merge_checkpoints, model_names

    names = list(model_names(models))
    settings: dict[str, Any] = {"weight": _weights(weights, names), "density": density}
    settings = {name: value for name, value in settings.items() if value is not None}
    if twice := sorted(settings.keys() & (options or {}).keys()):
        raise UsageError("an option is given twice", where=twice[0], hint="leave one out")
    settings |= options or {}
    if method in _MEANS:
        settings.setdefault("weight", 1.0)
    check_options(method, settings, names)
    return merge_checkpoints(
        method, models, base, dst, settings, seed, template=template, must_mix=not force, progress=progress
    )


def _weights(weights: Sequence[float] | None, names: list[str]) -> float | dict[str, float] | None:
    """Weights as the option `weight`: one for all, or by model."""
    if weights is None:
        return None
    if len(weights) == 1:
        return float(weights[0])
    if len(weights) != len(names):
        raise UsageError("one weight for all models, or one for each", expected=len(names), got=len(weights))
    return dict(zip(names, map(float, weights), strict=True))
