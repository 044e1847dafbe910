"""Preparations: what a thief does to the protected model before he merges it, by itself or one after another.

Alignments and substitutions go through checkpoints, by the same code as `unmergeable attack`; the rest works on
tensors in memory. Each says what it needs, and which known case it has to solve before it is believed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UsageError
from . import attack_named

if TYPE_CHECKING:
    from ..merging import State

BASE, OTHER = "base", "other"
GROUP = 32  # weights that share a scale in four bits
BITS = (8, 4)
NOISE = 0.1  # of a tensor's change by fine-tuning
COPIES = 4


@dataclass(frozen=True)
class Preparation:
    """One way to prepare the protected model.

    Attributes:
        name: as rows call it. about: one line. needs: keys of `NEEDS`.
        steps: attacks on checkpoints with their options, in order.
        anchor: what they align to, BASE or OTHER: another fine-tune.
        change: of tensors in memory, instead of steps: (model, base, seed) -> model.
        solves: the known case, a key of `proof.CASES`; None if there is none to solve.
    """

    name: str
    about: str
    needs: tuple[str, ...]
    steps: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    anchor: str = BASE
    change: Callable[[State, State, int], dict[str, torch.Tensor]] | None = None
    solves: str | None = None
    access: int = field(default=1)

    @property
    def keeps_function(self) -> bool:
        """Whether the prepared model computes what the protected one does."""
        return self.change is None and all(attack_named(name).keeps_function for name, _ in self.steps)


def quantised(model: State, base: State, seed: int, *, bits: int) -> dict[str, torch.Tensor]:
    """Every matrix rounded to so many bits and back: by rows, or in groups of GROUP for four bits.

    A stack of matrices is one of their rows. What the base lacks is never merged, and stays as it is.
    """
    out = dict(model)
    top = 2 ** (bits - 1) - 1
    for name, tensor in model.items():
        if name in base and tensor.is_floating_point() and tensor.ndim >= 2 and tensor.numel():
            rows = tensor.float().flatten(0, 1) if tensor.ndim == 3 else tensor.float().flatten(1)
            width = rows.shape[1] if bits > 4 or rows.shape[1] % GROUP else GROUP
            grouped = rows.reshape(len(rows), -1, width)
            scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
            out[name] = ((grouped / scale).round().clamp(-top, top) * scale).reshape(tensor.shape).to(tensor)
    return out


def noised(model: State, base: State, seed: int) -> dict[str, torch.Tensor]:
    """The mean of noisy copies: noise of NOISE of each tensor's change, averaged over COPIES."""
    out = dict(model)
    for name, tensor in model.items():
        origin = base.get(name)
        if tensor.is_floating_point() and origin is not None and origin.shape == tensor.shape:
            # A stream of its own for every tensor: the order of names changes nothing.
            own = int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:7])
            generator = torch.Generator().manual_seed(own)
            size = NOISE * float((tensor.float() - origin.float()).square().mean().sqrt()) / COPIES**0.5
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
            out[name] = (tensor.float() + size * noise).to(tensor.dtype)
    return out


THEN = " > "  # between the names of preparations that are made one after another


def one_by_one(names: str | None) -> tuple[str, ...]:
    """Preparations that are made one after another, by their names with `THEN` between them; none for None."""
    return () if names is None else tuple(names.split(THEN))


_ORDERS: tuple[str, Mapping[str, Any]] = ("align-permutation", {})


def _quantised(bits: int) -> Callable[[State, State, int], dict[str, torch.Tensor]]:
    return lambda model, base, seed: quantised(model, base, seed, bits=bits)


# Suite v1, the most informative first.
PREPARATIONS: tuple[Preparation, ...] = (
    Preparation(
        "anchor-coupled", "undo every symmetry towards the base", ("base",),
        (("anchor-coupled", {}),), solves="gauge",
    ),
    Preparation(
        "anchor-coupled-other", "undo every symmetry towards another fine-tune", ("experts",),
        (("anchor-coupled", {}),), anchor=OTHER, solves="gauge",
    ),
    Preparation(
        "align-permutation", "match rows, heads and experts to the base's", ("base",),
        (_ORDERS,), solves="orders",
    ),
    Preparation(
        "align-procrustes", "match orders, then rotate heads to the base's", ("base",),
        (_ORDERS, ("align-procrustes", {"snap": True})), solves="rotations",
    ),
    Preparation(
        "align-canonical-polar", "match orders, then balanced forms of head products", ("base",),
        (_ORDERS, ("align-canonical", {"form": "polar", "snap": True})), solves="dense",
    ),
    Preparation(
        "align-canonical-svd", "match orders, then singular directions of head products", ("base",),
        (_ORDERS, ("align-canonical", {"form": "svd", "snap": True})), solves="dense",
    ),
    Preparation(
        "anchor-independent", "pull every matrix to the base by itself, as published", ("base",),
        (("anchor-independent", {}),), solves="published",
    ),
    Preparation(
        "substitute-attention", "the base's attention in all blocks", ("base",), (("substitute-attention", {}),),
    ),
    Preparation("substitute-mlp", "the base's MLPs in all blocks", ("base",), (("substitute-mlp", {}),)),
    *(
        Preparation(f"quantise-{bits}", f"round matrices to {bits} bits and back", (), change=_quantised(bits))
        for bits in BITS
    ),
    Preparation("noise", "the mean of noisy copies", ("base",), change=noised),
)  # fmt: skip
# Several releases of one model as one: their mean as they are, and after all were brought to one form.
COLLUDE, COLLUDE_ALIGNED = COLLUSIONS = ("collude", "collude-aligned")


def preparation(name: str) -> Preparation:
    """The preparation of this name.

    Raises:
        UsageError: no such preparation.
    """
    for found in PREPARATIONS:
        if found.name == name:
            return found
    expected = " | ".join(one.name for one in PREPARATIONS)
    raise UsageError("no such preparation", where=f"'{name}'", expected=expected)
