"""Solves for matrices that align two models at a site: closed forms, and Gauss-Newton where there is none.

At a site the attacked model has rows x with power +1 and rows z with power −1, the anchor y and w in their
places. Wanted is one matrix A for both sides,

    min ‖A x − y‖² + ‖A⁻ᵀ z − w‖²,

so that applying it leaves the function as it is. Everything is batched over the instances of a site, and works
on n × n products of the rows alone: n is the size of a head, however wide the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..groups import Dense, Floats

ITERATIONS = 60
SETTLED = 1e-11  # relative decrease of the objective at which an instance is done
RIDGE = 1e-10  # of the mean square of the rows: decides only what the data leaves open
GRID, GOLDEN = 49, 40


@dataclass(frozen=True)
class Side:
    """Products of one side's rows, x of the attacked model and y of the anchor: all float64.

    gram: x xᵀ [b, n, n]. cross: y xᵀ [b, n, n]. other: y yᵀ [b, n, n].
    """

    gram: Floats
    cross: Floats
    other: Floats

    @classmethod
    def of(cls, x: Floats, y: Floats) -> Side:
        """From rows [b, n, width] of both models."""
        return cls(x @ _t(x), y @ _t(x), y @ _t(y))

    @classmethod
    def none(cls, b: int, n: int) -> Side:
        """A side without rows."""
        return cls(np.zeros((b, n, n)), np.zeros((b, n, n)), np.zeros((b, n, n)))

    def error(self, a: Floats) -> Floats:
        """‖a x − y‖² for a batch of matrices, [b]."""
        quadratic = np.einsum("bij,bjk,bik->b", a, self.gram, a, optimize=True)
        return quadratic - 2.0 * np.einsum("bij,bij->b", a, self.cross) + np.einsum("bii->b", self.other)


def _t(a: NDArray[Any]) -> Floats:
    return np.asarray(a.transpose(0, 2, 1), dtype=np.float64)


def as_dense(a: Floats) -> Dense:
    """The element of a batch of invertible matrices."""
    return Dense(np.ascontiguousarray(a), np.ascontiguousarray(_t(np.linalg.inv(a))))


def polar(cross: Floats) -> Floats:
    """The orthogonal matrices nearest to `cross`: argmax tr(Qᵀ cross), the Procrustes problem, [b, n, n]."""
    left, _, right = np.linalg.svd(cross)
    return left @ right


def procrustes(plus: Side, minus: Side) -> Floats:
    """The orthogonal matrix for both sides, in closed form: it is its own inverse transpose."""
    return polar(plus.cross + minus.cross)


def balance(plus: Floats, minus: Floats) -> Floats:
    """The symmetric P with P plus P = P⁻¹ minus P⁻¹, for batches of positive matrices: both sides alike.

    P² is the geometric mean of minus and plus⁻¹. It is what a general matrix can change of a product's two
    factors apart from a rotation.
    """
    root, back = _powers(plus)
    middle, _ = _powers(root @ minus @ root)
    mean = back @ middle @ back
    half, _ = _powers(_symmetric(mean))
    return half


def _powers(a: Floats) -> tuple[Floats, Floats]:
    """Square root and its inverse of symmetric positive matrices; what is null is lifted to a small floor."""
    values, vectors = np.linalg.eigh(a)
    floor = np.maximum(values[:, -1:], np.finfo(np.float64).tiny) * 1e-12
    root = np.sqrt(np.maximum(values, floor))
    return (vectors * root[:, None]) @ _t(vectors), (vectors / root[:, None]) @ _t(vectors)


def canonical(plus: Side, minus: Side, *, form: str = "polar") -> Floats:
    """Both models to a canonical form of the product xᵀ z, and back from the anchor's, [b, n, n].

    Both forms balance the two factors first, x xᵀ = z zᵀ, by P and P_anchor; A = P_anchor⁻¹ Q P.
    "polar": Q is the Procrustes rotation between the balanced forms. "svd": the coordinates are the product's
    singular directions, in descending order; Q takes the first to the first, with the sign that fits.
    """
    own = balance(plus.gram, minus.gram)
    other = balance(plus.other, minus.other)
    away = np.linalg.inv(other)
    cross = other @ plus.cross @ own + away @ minus.cross @ np.linalg.inv(own)
    if form == "polar":
        return away @ polar(cross) @ own
    mine = np.linalg.eigh(_symmetric(own @ plus.gram @ own))[1]
    theirs = np.linalg.eigh(_symmetric(other @ plus.other @ other))[1]
    along = np.einsum("bij,bik,bkj->bj", theirs, cross, mine, optimize=True)
    return away @ (theirs * np.where(along < 0, -1.0, 1.0)[:, None]) @ _t(mine) @ own


def _symmetric(a: Floats) -> Floats:
    return (a + _t(a)) / 2.0


def general_linear(plus: Side, minus: Side) -> Floats:
    """One invertible matrix for both sides, [b, n, n].

    Starts are the identity, the canonical forms, and the closed form of ‖A x − y‖² + ‖z − Aᵀ w‖², a Sylvester
    equation; from the best of them Gauss-Newton steps A ← (1 + tE) A, where E solves the linearised problem,
    again a Sylvester equation, and t is halved until the objective falls.
    """
    b, n, _ = plus.gram.shape
    eye = np.broadcast_to(np.eye(n), (b, n, n))
    best, error = np.array(eye), objective(plus, minus, eye)
    for start in (canonical(plus, minus), closed_form(plus, minus)):
        best, error = _better(best, error, start, objective(plus, minus, start))
    active = np.arange(b)
    for _ in range(ITERATIONS):
        a, p, m = best[active], _pick(plus, active), _pick(minus, active)
        trial, value = _step(a, error[active], p, m)
        gain = error[active] - value
        best[active], error[active] = trial, value
        scale = np.einsum("bii->b", p.other) + np.einsum("bii->b", m.other)
        active = active[gain > SETTLED * scale]
        if not len(active):
            break
    return best


def closed_form(plus: Side, minus: Side) -> Floats:
    """The minimum of ‖A x − y‖² + ‖z − Aᵀ w‖², the second side measured in the attacked model, [b, n, n]."""
    floor = RIDGE * (_mean(plus.gram) + _mean(minus.other)) + np.finfo(np.float64).tiny
    ridge = floor[:, None, None] * np.eye(plus.gram.shape[1])
    return _sylvester(minus.other + ridge, plus.gram, plus.cross + minus.cross + ridge)


def objective(plus: Side, minus: Side, a: Floats) -> Floats:
    """‖A x − y‖² + ‖A⁻ᵀ z − w‖², [b]; infinite where A is singular."""
    singular = ~(np.abs(np.linalg.slogdet(a)[1]) < 1e4)
    safe = np.where(singular[:, None, None], np.eye(a.shape[1]), a)
    value = plus.error(safe) + minus.error(_t(np.linalg.inv(safe)))
    return np.where(singular | ~np.isfinite(value), np.inf, value)


def _mean(gram: Floats) -> Floats:
    return np.einsum("bii->b", gram) / gram.shape[1]


def _pick(side: Side, index: np.ndarray) -> Side:
    return Side(side.gram[index], side.cross[index], side.other[index])


def _better(a: Floats, error: Floats, trial: Floats, value: Floats) -> tuple[Floats, Floats]:
    wins = value < error
    return np.where(wins[:, None, None], trial, a), np.where(wins, value, error)


def _step(a: Floats, error: Floats, plus: Side, minus: Side) -> tuple[Floats, Floats]:
    """One Gauss-Newton step with halving; where nothing helps A stays."""
    contra = _t(np.linalg.inv(a))
    first = a @ plus.gram @ _t(a)  # rows as A leaves them, on both sides
    second = contra @ minus.gram @ _t(contra)
    right = plus.cross @ _t(a) - first + second - _t(minus.cross @ _t(contra))
    eye = np.broadcast_to(np.eye(a.shape[1]), a.shape)
    ridge = (RIDGE * (_mean(first) + _mean(second)) + np.finfo(np.float64).tiny)[:, None, None] * eye
    move = _sylvester(second + ridge, first, right)
    best, value = a, error
    open_ = np.ones(len(a), dtype=bool)
    for halvings in range(12):
        trial = (eye + 0.5**halvings * move) @ a
        tried = np.where(open_, objective(plus, minus, trial), np.inf)
        best, value = _better(best, value, trial, tried)
        open_ &= ~(tried < error)
        if not open_.any():
            break
    return best, value


def _sylvester(left: Floats, right: Floats, known: Floats) -> Floats:
    """E with left E + E right = known, for batches of symmetric matrices with a positive sum."""
    l_values, l_vectors = np.linalg.eigh(left)
    r_values, r_vectors = np.linalg.eigh(right)
    turned = _t(l_vectors) @ known @ r_vectors
    total = l_values[:, :, None] + np.maximum(r_values, 0.0)[:, None, :]
    return l_vectors @ (turned / np.maximum(total, np.finfo(np.float64).tiny)) @ _t(r_vectors)


# --- the plane, and one number ------------------------------------------------------------------------------


def planar(plus: Side, minus: Side, *, scaled: bool, canonical_form: bool = False) -> Floats:
    """A scaled rotation of the plane for both sides (a rotation unless `scaled`), [b, 2, 2].

    As a complex number z = ρ e^{iφ} it acts on one side, and z / |z|² on the other. The best φ for a given ρ
    is in closed form; ρ is found on the line, or with `canonical_form` from the sizes of both sides alone.
    """
    g, h = np.einsum("bii->b", plus.gram), np.einsum("bii->b", minus.gram)
    c, d = _complex(plus.cross), _complex(minus.cross)
    u = np.zeros(len(g))
    if scaled and canonical_form:
        sizes = [np.einsum("bii->b", s) for s in (plus.gram, minus.gram, plus.other, minus.other)]
        u = 0.25 * (_log(sizes[1]) - _log(sizes[0]) + _log(sizes[2]) - _log(sizes[3]))
        u = np.where(np.min(sizes, axis=0) > 0, u, 0.0)
    elif scaled:
        low, high = bracket(
            [(1, g, np.einsum("bii->b", plus.other)), (-1, h, np.einsum("bii->b", minus.other))]
        )

        def cost(u: Floats) -> Floats:
            rho = np.exp(u)
            return rho**2 * g + h / rho**2 - 2.0 * np.abs(rho * c + d / rho)

        u = minimise(cost, low, high)
    rho = np.exp(u)
    total = rho * c + d / rho
    phase = np.where(np.abs(total) > 0, total / np.where(np.abs(total) > 0, np.abs(total), 1.0), 1.0)
    z = rho * phase
    return np.stack([np.stack([z.real, -z.imag], -1), np.stack([z.imag, z.real], -1)], -2)


def _complex(cross: Floats) -> np.ndarray:
    """Σ conj(x) y from y xᵀ."""
    real = cross[:, 0, 0] + cross[:, 1, 1]
    return np.asarray(real + 1j * (cross[:, 1, 0] - cross[:, 0, 1]))


def _log(a: Floats) -> Floats:
    return np.log(np.maximum(a, np.finfo(np.float64).tiny))


def bracket(sides: list[tuple[int, Floats, Floats]]) -> tuple[Floats, Floats]:
    """Where log |s| can lie: between what the sizes of the sides ask for, and a little beyond.

    Args:
        sides: power, ‖x‖² and ‖y‖² of each.
    """
    found = []
    for power, own, other in sides:
        if power:
            known = (own > 0) & (other > 0)
            found.append(np.where(known, (_log(other) - _log(own)) / (2.0 * power), np.nan))
    if not found:
        zero = np.zeros_like(sides[0][1])
        return zero, zero
    every = np.stack(found)
    none = np.isnan(every).all(axis=0)
    low = np.where(none, 0.0, np.nanmin(np.where(none, 0.0, every), axis=0) - 1.0)
    high = np.where(none, 0.0, np.nanmax(np.where(none, 0.0, every), axis=0) + 1.0)
    return low, high


def minimise(cost: Callable[[Floats], Floats], low: Floats, high: Floats) -> Floats:
    """The minimum of a function of one number, for arrays of them at once: a grid, then golden section."""
    steps = np.linspace(0.0, 1.0, GRID)
    best, least = low, cost(low)
    for step in steps[1:]:
        at = low + step * (high - low)
        value = cost(at)
        best, least = np.where(value < least, at, best), np.minimum(value, least)
    width = (high - low) / (GRID - 1)
    a, b = np.maximum(best - width, low), np.minimum(best + width, high)
    ratio = (np.sqrt(5.0) - 1.0) / 2.0
    for _ in range(GOLDEN):
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        left = cost(c) < cost(d)
        a, b = np.where(left, a, c), np.where(left, d, b)
    return np.asarray((a + b) / 2.0)
