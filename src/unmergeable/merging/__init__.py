"""Merge methods behind one interface: `merge(name, base, models, **options) -> MergeResult`.

`METHODS` lists them. A method is looked up by name and its module is imported when it is used, so that the
list is free and a method may need packages that the others do not. What searches or learns has functions of
its own: `blocks.search`, `learned.learn`, `wide.WideModel`; grids that are merged in memory: `grids.Mixer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

    from .check import Facts

    State = Mapping[str, torch.Tensor]

__all__ = ["METHODS", "MergeMethod", "MergeResult", "Merged", "merge", "merge_method"]

_KIT = "mergekit:"
# Name -> the module below this package that has a function of this name, and what it does.
_OWN: dict[str, tuple[str, str]] = {
    "task_arithmetic": (".simple", "base + Σ weight · task vector"),
    "ties": (".simple", "trim, elect signs, mean of those that agree"),
    "full_dose": (".simple", "one model nearly whole, the others with a smaller weight"),
    "iso_c": (".spectral", "sum of task vectors with all singular values of a matrix made equal"),
    "tsv_m": (".spectral", "largest singular vectors of each task, made orthogonal to the others'"),
    "consensus": (".spectral", "task arithmetic on the entries that matter to several tasks"),
    "tall_mask": (".spectral", "the protected model's update where it matters, the others elsewhere"),
    "svd_truncated": (".spectral", "the protected model's update cut to a low rank, plus the others"),
    "top_k": (".spectral", "the protected model's largest updates, plus the others"),
    "projected": (".spectral", "the others without what lies in the protected model's subspace"),
    "regmean": (".statistics", "least squares on the inputs of every linear layer (needs grams=)"),
    "fisher": (".statistics", "mean weighted by diagonal Fisher information (needs fishers=)"),
    "substitute": (".grids", "blocks or kinds of tensors whole from one model, the rest merged"),
}
_MERGEKIT: dict[str, str] = {
    "passthrough": "one model as it is, or scaled",
    "linear": "weighted mean",
    "slerp": "spherical interpolation of two models",
    "nuslerp": "spherical interpolation of two models or task vectors",
    "multislerp": "spherical mean of models or task vectors",
    "karcher": "Karcher mean on the sphere",
    "model_stock": "mean pulled towards the base by the angle between task vectors",
    "arcee_fusion": "the most important part of one model's update",
    "nearswap": "values near the base swapped for a model's",
    "sce": "task vectors weighted by their variance, signs elected",
    "ram": "updates of one model kept, those of several averaged",
    "ramplus_tl": "the same, what only one model changes made larger",
    "task_arithmetic": "base + Σ weight · task vector",
    "ties": "trim, elect signs, weighted mean",
    "dare_ties": "random dropping with rescaling, then signs elected",
    "dare_linear": "random dropping with rescaling, then the sum",
    "breadcrumbs": "both tails of every update dropped, then the sum",
    "breadcrumbs_ties": "both tails of every update dropped, then signs elected",
    "della": "dropping by magnitude with rescaling, then signs elected",
    "della_linear": "dropping by magnitude with rescaling, then the sum",
}
# name -> what it does; mergekit's methods also without the prefix, where the name is not taken
METHODS: dict[str, str] = {
    **{name: text for name, (_, text) in _OWN.items()},
    **{name: text for name, text in _MERGEKIT.items() if name not in _OWN},
    **{_KIT + name: text for name, text in _MERGEKIT.items()},
}


@dataclass(frozen=True)
class Merged:
    """What came of a merge.

    Attributes:
        shared: the merged tensors, by name.
        private: by expert, its tensors that the base lacks or has in another shape (the head of its own
            task): they cannot be merged and stay with their task.
    """

    shared: State
    private: Mapping[str, State] = field(default_factory=dict)

    def for_task(self, expert: str) -> dict[str, torch.Tensor]:
        """The state dict to run on the task of an expert: what is shared, and what is its own."""
        return {**self.shared, **self.private.get(expert, {})}


@dataclass(frozen=True)
class MergeResult:
    """A merge, and what was found when it was compared with its inputs.

    Attributes:
        tensors: the merged tensors under the base's names.
        facts: whether they are a mix at all.
        private: by model, what stays with its task.
        method, options, seed: how to do it again.
    """

    tensors: State
    facts: Facts
    private: Mapping[str, State]
    method: str
    options: Mapping[str, Any]
    seed: int

    def for_task(self, expert: str) -> dict[str, torch.Tensor]:
        """The state dict to run on the task of an expert: what is shared, and what is its own."""
        return Merged(self.tensors, self.private).for_task(expert)


class MergeMethod(Protocol):
    """A merge method; its options are keywords of its own."""

    def __call__(self, base: State, experts: Mapping[str, State], **options: Any) -> Merged: ...


def merge_method(name: str) -> MergeMethod:
    """The merge method of this name.

    Raises:
        UsageError: no such method.
    """
    if name in _OWN:
        module = import_module(_OWN[name][0], __name__)
        return cast(MergeMethod, getattr(module, name))
    if name in METHODS:
        return cast(MergeMethod, partial(import_module(".kit", __name__).kit, name.removeprefix(_KIT)))
    raise UsageError("no such merge method", where=f"'{name}'", expected=" | ".join(METHODS))


def merge(
    name: str, base: State, models: Mapping[str, State], *, seed: int = 0, **options: Any
) -> MergeResult:
    """Merge models, and check for every tensor that the result is a mix of them.

    Args:
        name: one of `METHODS`.
        base: the model that they were fine-tuned from; for a method without a base, whichever of the models
            gives names and dtypes.
        models: state dicts by name.
        seed: of methods that draw; torch's own generator is left as it was.
        options: the method's own.

    Raises:
        UsageError: no such method or option, or a wrong number of models.
        InputError: models that do not fit together, or a package that is missing.
    """
    import torch

    from .check import facts

    method = merge_method(name)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            merged = method(base, models, **options)
    except TypeError as error:
        if "unexpected keyword argument" in str(error) or "required keyword-only" in str(error):
            raise UsageError("options that the method does not have", where=name, got=error) from None
        raise
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise InputError("a decomposition does not converge", where=name, got=error) from error
    found = facts(base, models, merged.shared)
    return MergeResult(merged.shared, found, merged.private, name, dict(options), seed)
