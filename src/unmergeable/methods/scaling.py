"""Multi-head scaling in the three forms of PaRaMS (arXiv 2503.07661), each within the group of its site.

Query and key of a head see A and A⁻ᵀ, value and output B and B⁻¹. The forms of A, with positive factors s:

    diagonal       diag(s), s uniform
    symmetric      O diag(s) Oᵀ, O orthogonal, s log-uniform
    nonsymmetric   O₁ diag(s) O₂, s log-uniform

The authors' factors lie in .05–20, for the last form in .1–15, a condition number of up to 400, and their
non-symmetric matrix is a Gaussian one times diag(s), of any condition. Here s also lies between c^-½ and c^½
for a cap c, so no condition number exceeds it. Where the group of a site is smaller than all invertible
matrices, a form is what the group has of it: scaled identities for pairs under RoPE (with a turn if
non-symmetric), signs, reflections or rotations where lengths must be kept. A group of permutations has the
identity alone in common with the diagonals; there, and only there, the form is a permutation.

Built from + − × ÷ √ in a fixed order, like every element (see `groups`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt

import numpy as np

from ..groups import Dense, Element, Floats, Monomial, Stream, _rotate, _rounds, group
from ..match import Instance, Match

FORMS = ("diagonal", "symmetric", "nonsymmetric")
RANGES = {"diagonal": (0.05, 20.0), "symmetric": (0.05, 20.0), "nonsymmetric": (0.1, 15.0)}

_EACH = ("general_linear", "diagonal", "monomial", "positive_monomial")  # a factor for each coordinate
_WHOLE = ("complex", "scalar")  # one for all of an instance
_BITS = 30  # of the exponent of a log-uniform draw


def factor_range(form: str, condition: float) -> tuple[float, float]:
    """Where the factors of a form lie: the paper's range, within the square root of the cap around one."""
    low, high = RANGES[form]
    return max(low, 1.0 / sqrt(condition)), min(high, sqrt(condition))


def draw_form(form: str, name: str, stream: Stream, b: int, n: int, condition: float) -> Element:
    """A batch of b elements of the group `name` on n coordinates, in one of the FORMS, condition capped."""
    if name == "permutation":
        return group(name).draw_exact(stream, b, n)
    if form == "nonsymmetric":
        special = _NONSYMMETRIC.get(name)
    else:
        special = _SYMMETRIC.get(name) if form == "symmetric" else None
    if special is not None:
        return special(stream, b, n, factor_range(form, condition))
    perm = np.tile(np.arange(n, dtype=np.int64), (b, 1))
    if name in _EACH or name in _WHOLE:
        drawn = _factors(form, stream, (b, n if name in _EACH else 1), factor_range(form, condition))
        return Monomial(perm, np.ascontiguousarray(np.broadcast_to(drawn, (b, n))))
    # Of the groups that keep lengths, diagonal matrices are signs; negations and rotations have one for all.
    signs = stream.signs((b, n if name in ("orthogonal", "sign") else 1)).astype(np.float64)
    return Monomial(perm, np.ascontiguousarray(np.broadcast_to(signs, (b, n))))


def _factors(form: str, stream: Stream, shape: tuple[int, ...], limits: tuple[float, float]) -> Floats:
    low, high = limits
    if form == "diagonal":
        return low + (high - low) * stream.uniform(shape)
    return log_uniform(stream, shape, low, high)


def log_uniform(stream: Stream, shape: tuple[int, ...], low: float, high: float) -> Floats:
    """low · (high / low)^u for uniform u of 30 bits, by square roots: no library's exp has a part in it."""
    exponent = (stream.uniform(shape) * 2.0**_BITS).astype(np.int64)
    out, root = np.full(shape, low), high / low
    for bit in range(_BITS - 1, -1, -1):
        root = sqrt(root)
        out = np.where(exponent >> bit & 1, out * root, out)
    return out


Special = Callable[[Stream, int, int, tuple[float, float]], Element]


def _eye(b: int, n: int) -> Floats:
    return np.broadcast_to(np.eye(n), (b, n, n)).copy()


def _conjugated(stream: Stream, b: int, n: int, limits: tuple[float, float]) -> Element:
    """O diag(s) Oᵀ."""
    rounds = _rounds(stream, b, n)
    turned = _rotate(rounds, _eye(b, n)).transpose(0, 2, 1)
    scale = log_uniform(stream, (b, n), *limits)[:, :, None]
    return Dense(_rotate(rounds, scale * turned), _rotate(rounds, turned / scale))


def _reflection(stream: Stream, b: int, n: int, limits: tuple[float, float]) -> Element:
    """O diag(±1) Oᵀ: the orthogonal matrices that are symmetric."""
    rounds = _rounds(stream, b, n)
    signs = stream.signs((b, n)).astype(np.float64)[:, :, None]
    flipped = _rotate(rounds, signs * _rotate(rounds, _eye(b, n)).transpose(0, 2, 1))
    return Dense(flipped, flipped.copy())


def _general(stream: Stream, b: int, n: int, limits: tuple[float, float]) -> Element:
    """O₁ diag(s) O₂."""
    right, left = _rounds(stream, b, n), _rounds(stream, b, n)
    scale = log_uniform(stream, (b, n), *limits)[:, :, None]
    turned = _rotate(right, _eye(b, n))
    return Dense(_rotate(left, scale * turned), _rotate(left, turned / scale))


def _orthogonal(stream: Stream, b: int, n: int, limits: tuple[float, float]) -> Element:
    return group("orthogonal").draw_dense(stream, b, n, 1.0)


def _turn(stream: Stream, b: int, n: int, limits: tuple[float, float]) -> Element:
    return group("rotation").draw_dense(stream, b, n, 1.0)


def _scaled_turn(stream: Stream, b: int, n: int, limits: tuple[float, float]) -> Element:
    rotation = group("rotation").draw_dense(stream, b, n, 1.0).matrix(1)
    scale = log_uniform(stream, (b,), *limits)[:, None, None]
    return Dense(scale * rotation, rotation / scale)


def _scaled_permutation(stream: Stream, b: int, n: int, limits: tuple[float, float]) -> Element:
    return Monomial(stream.permutation(n, b), log_uniform(stream, (b, n), *limits))


_SYMMETRIC: dict[str, Special] = {"general_linear": _conjugated, "orthogonal": _reflection}
_NONSYMMETRIC: dict[str, Special] = {
    "general_linear": _general,
    "orthogonal": _orthogonal,
    "complex": _scaled_turn,
    "rotation": _turn,
    "monomial": _scaled_permutation,
    "positive_monomial": _scaled_permutation,
}


def condition_numbers(match: Match, elements: Mapping[tuple[int, Instance], Element]) -> dict[str, float]:
    """The largest condition number of any element, by kind of site."""
    worst: dict[str, float] = {}
    for (number, _), element in elements.items():
        if isinstance(element, Monomial):
            sizes = np.abs(element.scale)
            found = float((sizes.max(axis=1) / sizes.min(axis=1)).max())
        else:
            found = float(np.linalg.cond(element.forward).max())
        kind = match.sites[number].site.kind
        worst[kind] = max(worst.get(kind, 1.0), found)
    return worst
