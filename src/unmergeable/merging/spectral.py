"""Merges that look at singular values, masks and subspaces of task vectors.

All are base + scale · f(task vectors), tensor by tensor, in float32. A matrix is a tensor of two dimensions,
or each of a stack of them (three dimensions), or a convolution flattened to (out, everything else).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError
from . import Merged
from .tensors import largest_entries, merge_deltas

if TYPE_CHECKING:
    from . import State

# Suite v1: what an audit tries of each. Names as in `merging.METHODS`.
SCALES = (0.3, 0.5, 0.8, 1.0, 1.3)
RANKS = (0.05, 0.1, 0.25, 0.5)
DENSITIES = (0.05, 0.1, 0.2, 0.5)
DOSES = ((0.5, 0.3), (1.0, 0.3), (1.0, 0.5), (1.0, 0.8))
GRIDS: dict[str, tuple[dict[str, float], ...]] = {
    "iso_c": tuple({"scale": scale} for scale in SCALES),
    "tsv_m": tuple({"scale": scale} for scale in SCALES),
    "consensus": tuple({"scale": s, "strictness": t} for s in (0.3, 0.5, 0.8) for t in (0.2, 0.4, 0.6)),
    "tall_mask": tuple({"dose": a, "others": b, "strictness": t} for a, b in DOSES for t in (0.2, 0.4, 0.6)),
    "svd_truncated": tuple({"dose": a, "others": b, "rank": r} for a, b in DOSES for r in RANKS),
    "top_k": tuple({"dose": a, "others": b, "density": d} for a, b in DOSES for d in DENSITIES),
    "projected": tuple({"dose": a, "others": b, "rank": r} for a, b in DOSES for r in RANKS),
}


def iso_c(base: State, experts: Mapping[str, State], *, scale: float = 1.0) -> Merged:
    """The sum of task vectors with every matrix's singular values replaced by their mean.

    What is no matrix is averaged. Source: Iso-C of Marczak et al., "No Task Left Behind", arXiv 2502.04959.

    Raises:
        InputError: models that do not fit together.
    """

    def mix(_: str, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
        total = torch.stack(list(deltas.values())).sum(0)
        if total.ndim < 2:
            return scale / len(deltas) * total
        matrix = as_matrix(total)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return scale * (s.mean(-1)[..., None, None] * (u @ vh)).reshape(total.shape)

    return merge_deltas(base, experts, mix)


def tsv_m(base: State, experts: Mapping[str, State], *, scale: float = 1.0) -> Merged:
    """The largest 1/T of every task's singular triples, with the vectors of all T tasks made orthogonal.

    What is no matrix is averaged. Source: TSV-M of Gargiulo et al., "Task Singular Vectors", arXiv 2412.00081:
    the concatenated singular vectors are replaced by the nearest orthonormal ones, their polar factors.

    Raises:
        InputError: models that do not fit together.
    """

    def mix(_: str, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
        tensors = list(deltas.values())
        if tensors[0].ndim < 2:
            return scale * torch.stack(tensors).mean(0)
        us, ss, vs = [], [], []
        for delta in tensors:
            u, s, vh = torch.linalg.svd(as_matrix(delta), full_matrices=False)
            keep = max(1, s.shape[-1] // len(tensors))
            us.append(u[..., :keep])
            ss.append(s[..., :keep])
            vs.append(vh[..., :keep, :])
        u, s, vh = torch.cat(us, -1), torch.cat(ss, -1), torch.cat(vs, -2)
        merged = _polar(u) * s[..., None, :] @ _polar(vh)
        return scale * merged.reshape(tensors[0].shape)

    return merge_deltas(base, experts, mix)


def consensus(
    base: State, experts: Mapping[str, State], *, scale: float = 0.5, strictness: float = 0.4, least: int = 2
) -> Merged:
    """Task arithmetic on the entries that at least `least` tasks' TALL masks keep.

    A task's mask keeps |τ| ≥ strictness · |Σ τ − τ|. Source: Wang et al., "Localizing Task Information for
    Improved Model Merging and Compression", arXiv 2405.07813.

    Raises:
        UsageError: fewer models than `least`. InputError: models that do not fit together.
    """
    if least > len(experts):
        raise UsageError("fewer models than must agree", where="consensus", expected=least, got=len(experts))

    def mix(_: str, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack(list(deltas.values()))
        total = stacked.sum(0)
        agree = tall_masks(stacked, strictness).sum(0) >= min(least, len(deltas))
        return scale * total * agree

    return merge_deltas(base, experts, mix)


def tall_mask(
    base: State,
    experts: Mapping[str, State],
    *,
    protected: str,
    dose: float = 1.0,
    others: float = 0.5,
    strictness: float = 0.4,
) -> Merged:
    """The protected model's update where its TALL mask says that it matters, the others' everywhere else.

    Raises:
        UsageError: no such expert. InputError: models that do not fit together.
    """
    _known(protected, experts)

    def mix(_: str, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
        own, rest = _apart(protected, deltas)
        if own is None or not len(rest):
            return _sum(own, dose, rest, others)
        mask = tall_masks(torch.stack([own, *rest]), strictness)[0]
        return torch.where(mask, dose * own, others * rest.sum(0))

    return merge_deltas(base, experts, mix)


def svd_truncated(
    base: State,
    experts: Mapping[str, State],
    *,
    protected: str,
    rank: float = 0.1,
    dose: float = 1.0,
    others: float = 0.5,
) -> Merged:
    """The protected model's update cut to the largest part of its rank, plus the others' updates.

    Args:
        base: the model that they were fine-tuned from.
        experts: state dicts by name.
        protected: the model whose update is cut.
        rank: the part of a matrix's singular values that is kept, at least one; vectors are kept whole.
        dose, others: coefficients.

    Raises:
        UsageError: no such expert, a part outside (0, 1]. InputError: models that do not fit together.
    """
    _known(protected, experts)
    _part(rank, "rank")

    def mix(_: str, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
        own, rest = _apart(protected, deltas)
        return _sum(None if own is None else truncate(own, rank), dose, rest, others)

    return merge_deltas(base, experts, mix)


def top_k(
    base: State,
    experts: Mapping[str, State],
    *,
    protected: str,
    density: float = 0.1,
    dose: float = 1.0,
    others: float = 0.5,
) -> Merged:
    """The entries of largest magnitude of the protected model's update, per tensor, plus the others' updates.

    Raises:
        UsageError: no such expert, a density outside (0, 1]. InputError: models that do not fit together.
    """
    _known(protected, experts)
    _part(density, "density")

    def mix(_: str, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
        own, rest = _apart(protected, deltas)
        return _sum(None if own is None else largest(own, density), dose, rest, others)

    return merge_deltas(base, experts, mix)


def projected(
    base: State,
    experts: Mapping[str, State],
    *,
    protected: str,
    rank: float = 0.1,
    dose: float = 1.0,
    others: float = 0.5,
) -> Merged:
    """The protected model's update, plus the others' without what lies in its leading subspaces.

    Of the others' Δ stays (I − U Uᵀ) Δ (I − V Vᵀ), U and V the leading singular vectors of the protected model's
    update; of a vector, what is orthogonal to the protected model's.

    Raises:
        UsageError: no such expert, a rank outside (0, 1]. InputError: models that do not fit together.
    """
    _known(protected, experts)
    _part(rank, "rank")

    def mix(_: str, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
        own, rest = _apart(protected, deltas)
        if own is None or not len(rest):
            return _sum(own, dose, rest, others)
        return dose * own + others * project_off(rest.sum(0), own, rank)

    return merge_deltas(base, experts, mix)


def tall_masks(stacked: torch.Tensor, strictness: float) -> torch.Tensor:
    """Which entries matter to each task, booleans of shape (tasks, …): |τ| ≥ strictness · |Σ τ − τ|, τ not 0."""
    return (stacked.abs() >= strictness * (stacked.sum(0) - stacked).abs()) & (stacked != 0)


def truncate(delta: torch.Tensor, rank: float) -> torch.Tensor:
    """The best approximation with a part of the singular values, at least one; a vector is returned whole."""
    if delta.ndim < 2:
        return delta
    u, s, vh = torch.linalg.svd(as_matrix(delta), full_matrices=False)
    keep = max(1, round(rank * s.shape[-1]))
    return ((u[..., :keep] * s[..., None, :keep]) @ vh[..., :keep, :]).reshape(delta.shape)


def largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """All but the entries of largest magnitude set to zero; at least one stays."""
    return torch.where(largest_entries(delta, round(density * delta.numel())), delta, 0)


def project_off(delta: torch.Tensor, away: torch.Tensor, rank: float) -> torch.Tensor:
    """A difference without its rows and columns in the leading subspaces of another."""
    if delta.ndim < 2:
        along = away.flatten()
        part = (delta.flatten() @ along) / (along @ along).clamp(min=1e-30)
        return delta - part * away
    u, s, vh = torch.linalg.svd(as_matrix(away), full_matrices=False)
    keep = max(1, round(rank * s.shape[-1]))
    u, vh = u[..., :keep], vh[..., :keep, :]
    matrix = as_matrix(delta)
    matrix = matrix - u @ (u.mT @ matrix)
    return (matrix - (matrix @ vh.mT) @ vh).reshape(delta.shape)


def as_matrix(delta: torch.Tensor) -> torch.Tensor:
    """A matrix or a stack of them as it is; of a convolution (out, everything else)."""
    return delta if delta.ndim <= 3 else delta.flatten(1)


def _polar(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns, or rows where it is wide."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def _apart(protected: str, deltas: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The protected model's difference, if it has the tensor, and the others' stacked."""
    rest = [delta for name, delta in deltas.items() if name != protected]
    some = next(iter(deltas.values()))
    return deltas.get(protected), torch.stack(rest) if rest else some.new_zeros(0, *some.shape)


def _sum(own: torch.Tensor | None, dose: float, rest: torch.Tensor, others: float) -> torch.Tensor:
    total = others * rest.sum(0)
    return total if own is None else total + dose * own


def _known(protected: str, experts: Mapping[str, State]) -> None:
    if protected not in experts:
        raise UsageError("no such expert", where=f"'{protected}'", expected=" | ".join(experts))


def _part(value: float, name: str) -> None:
    if not 0 < value <= 1:
        raise UsageError(f"the {name} is out of range", expected=f"0 < {name} <= 1", got=value)
