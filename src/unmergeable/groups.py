"""Groups and their elements: which rewritings of an axis leave the function alone, and how to act by one.

An element is a batch of `b` invertible matrices A of size n × n, one for each instance of a site (a head, a
frequency pair, an expert). `Monomial` elements have one entry a row, y[j] = scale[j] · x[perm[j]], and are
applied by indexing; `Dense` ones are applied by multiplication. Tensors take part with a power: +1 sees A,
-1 sees A⁻ᵀ, so that ⟨A⁻ᵀ q, A k⟩ = ⟨q, k⟩; 0 sees the permutation alone.

Dense elements are built from + − × ÷ √ on whole arrays in a fixed order, never by a library's QR or matrix
product, so that two machines draw the same element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SCALE_EXPONENTS = 3  # `--scales` draws 2**e with |e| up to this


class Stream(Protocol):
    """The random words of one site, as `keys.Stream` gives them."""

    def words(self, n: int) -> NDArray[np.uint64]: ...
    def permutation(self, n: int, batch: int | None = None) -> Ints: ...
    def signs(self, shape: tuple[int, ...]) -> NDArray[np.int8]: ...
    def uniform(self, shape: tuple[int, ...]) -> Floats: ...
    def integers(self, bound: int, shape: tuple[int, ...]) -> Ints: ...


@dataclass(frozen=True)
class Monomial:
    """y[j] = scale[j] · x[perm[j]]: perm int64 [b, n], scale float64 [b, n], no zeros."""

    perm: Ints
    scale: Floats

    @property
    def n(self) -> int:
        return int(self.perm.shape[1])

    @property
    def batch(self) -> int:
        return int(self.perm.shape[0])

    @property
    def exact(self) -> bool:
        """Whether every scale is a signed power of two, so that floating point loses nothing."""
        return bool(np.all(np.abs(np.frexp(self.scale)[0]) == 0.5))

    def inverse(self) -> Monomial:
        back = np.argsort(self.perm, axis=1, kind="stable")
        return Monomial(back, 1.0 / np.take_along_axis(self.scale, back, axis=1))

    def compose(self, first: Monomial) -> Monomial:
        """`self` after `first`."""
        return Monomial(
            np.take_along_axis(first.perm, self.perm, axis=1),
            self.scale * np.take_along_axis(first.scale, self.perm, axis=1),
        )

    def factors(self, power: int) -> Floats:
        """What multiplies row j for a tensor of this power, [b, n]."""
        return np.asarray(self.scale ** float(power)) if power else np.ones_like(self.scale)

    def matrix(self, power: int = 1) -> Floats:
        """The action as dense matrices, [b, n, n]."""
        out = np.zeros((self.batch, self.n, self.n))
        np.put_along_axis(out, self.perm[:, :, None], self.factors(power)[:, :, None], axis=2)
        return out

    def moved(self) -> float:
        """‖A − 1‖ / ‖1‖ in the Frobenius norm over the whole batch: how far random weights move."""
        fixed = self.perm == np.arange(self.n)
        squares = np.where(fixed, (self.scale - 1.0) ** 2, 1.0 + self.scale**2)
        return float(np.sqrt(squares.mean())) if squares.size else 0.0


@dataclass(frozen=True)
class Dense:
    """y = matrix · x: matrix and its inverse transpose, float64 [b, n, n]."""

    forward: Floats
    contragredient: Floats

    @property
    def n(self) -> int:
        return int(self.forward.shape[1])

    @property
    def batch(self) -> int:
        return int(self.forward.shape[0])

    @property
    def exact(self) -> bool:
        return False

    def inverse(self) -> Dense:
        return Dense(
            np.ascontiguousarray(self.contragredient.transpose(0, 2, 1)),
            np.ascontiguousarray(self.forward.transpose(0, 2, 1)),
        )

    def compose(self, first: Dense) -> Dense:
        """`self` after `first`."""
        return Dense(self.forward @ first.forward, self.contragredient @ first.contragredient)

    def matrix(self, power: int = 1) -> Floats:
        """The action as dense matrices, [b, n, n].

        Raises:
            ValueError: a power other than +1 and −1, for which a dense matrix has no action.
        """
        if power not in (1, -1):
            raise ValueError(f"a dense element acts with power +1 or -1, not {power}")
        return self.forward if power == 1 else self.contragredient

    def moved(self) -> float:
        """‖A − 1‖ / ‖1‖ in the Frobenius norm over the whole batch: how far random weights move."""
        difference = self.forward - np.eye(self.n)
        return float(np.sqrt((difference**2).sum() / (self.batch * self.n)))


Element = Monomial | Dense


def _permutation(stream: Stream, b: int, n: int) -> Ints:
    return stream.permutation(n, b)


def _identity(b: int, n: int) -> Ints:
    return np.broadcast_to(np.arange(n, dtype=np.int64), (b, n)).copy()


def _signs(stream: Stream, b: int, n: int) -> Floats:
    return stream.signs((b, n)).astype(np.float64)


def _magnitudes(stream: Stream, shape: tuple[int, ...], condition: float) -> Floats:
    """Positive factors in [condition^-1/2, condition^1/2], as many below one as above."""
    grow = 1.0 + (np.sqrt(condition) - 1.0) * stream.uniform(shape)
    return np.where(stream.signs(shape) > 0, grow, 1.0 / grow)


def _angles(stream: Stream, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Points (cos, sin) of the unit circle, by the rational parametrisation and a random sign of each."""
    t = stream.uniform(shape)
    cos, sin = (1.0 - t * t) / (1.0 + t * t), 2.0 * t / (1.0 + t * t)
    return cos * stream.signs(shape), sin * stream.signs(shape)


def _rounds(stream: Stream, b: int, n: int) -> list[tuple[Ints, Floats, Floats]]:
    """A random orthogonal matrix as rounds of plane rotations on randomly paired rows."""
    return [
        (_permutation(stream, b, n), *_angles(stream, (b, n // 2)))
        for _ in range(2 * ceil(log2(max(n, 2))) + 2)
    ]


def _rotate(rounds: list[tuple[Ints, Floats, Floats]], matrix: Floats) -> Floats:
    for perm, cos, sin in rounds:
        matrix = np.take_along_axis(matrix, perm[:, :, None], axis=1)
        pairs = matrix.shape[1] // 2
        x, y = matrix[:, :pairs], matrix[:, pairs : 2 * pairs]
        c, s = cos[:, :, None], sin[:, :, None]
        matrix = np.concatenate([c * x - s * y, s * x + c * y, matrix[:, 2 * pairs :]], axis=1)
    return matrix


def _general(stream: Stream, b: int, n: int, condition: float) -> Dense:
    """O₁ · diag(s) · O₂ with condition number at most `condition`; for n = 1 a signed scale."""
    if n == 1:
        scale = _signs(stream, b, 1) * _magnitudes(stream, (b, 1), condition)
        return Dense(scale[:, :, None], 1.0 / scale[:, :, None])
    right, left = _rounds(stream, b, n), _rounds(stream, b, n)
    scale = _magnitudes(stream, (b, n), condition)[:, :, None]
    turned = _rotate(right, np.broadcast_to(np.eye(n), (b, n, n)).copy())
    return Dense(_rotate(left, scale * turned), _rotate(left, turned / scale))


def _orthogonal(stream: Stream, b: int, n: int, condition: float) -> Dense:
    if n == 1:
        return _general(stream, b, n, 1.0)
    turned = _rotate(_rounds(stream, b, n), np.broadcast_to(np.eye(n), (b, n, n)).copy())
    return Dense(turned, turned.copy())


def _planar(stream: Stream, b: int, condition: float) -> Dense:
    """Scaled rotations of the plane: what commutes with every rotation, so with RoPE."""
    cos, sin = _angles(stream, (b,))
    rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    scale = _magnitudes(stream, (b,), condition)[:, None, None]
    return Dense(scale * rotation, rotation / scale)


_QUARTER_PERM = np.array([[0, 1], [1, 0], [0, 1], [1, 0]], dtype=np.int64)
_QUARTER_SIGN = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=np.float64)


def _quarter_turns(stream: Stream, b: int, n: int) -> Monomial:
    turn = stream.integers(4, (b,))
    return Monomial(_QUARTER_PERM[turn], _QUARTER_SIGN[turn])


@dataclass(frozen=True)
class Group:
    """A group by name: how to draw from its signed permutations, and from all of it.

    `scales` says how it can be stretched by positive factors: each coordinate for itself, one factor for the
    whole instance, or not at all.
    """

    name: str
    about: str
    exact: Callable[[Stream, int, int], Monomial]
    dense: Callable[[Stream, int, int, float], Element]
    scales: str = "none"  # "each" | "whole" | "none"
    size: int | None = None  # the only n it exists for

    def check(self, n: int, where: str) -> None:
        if self.size is not None and n != self.size:
            raise InputError(
                f"the group '{self.name}' acts on {self.size} coordinates",
                where=where,
                expected=self.size,
                got=n,
            )

    def draw_exact(self, stream: Stream, b: int, n: int, scales: bool = False) -> Monomial:
        """A signed permutation of the group for each of b instances, with `scales` times powers of two."""
        element = self.exact(stream, b, n)
        if not scales or self.scales == "none":
            return element
        shape = (b, n) if self.scales == "each" else (b, 1)
        exponents = stream.integers(2 * SCALE_EXPONENTS + 1, shape) - SCALE_EXPONENTS
        return Monomial(element.perm, element.scale * np.ldexp(1.0, exponents.astype(np.int32)))

    def draw_dense(self, stream: Stream, b: int, n: int, condition: float) -> Element:
        """An element of the whole group for each of b instances, with capped condition number."""
        return self.dense(stream, b, n, condition)


def _signed_permutation(stream: Stream, b: int, n: int) -> Monomial:
    return Monomial(_permutation(stream, b, n), _signs(stream, b, n))


def _plain_permutation(stream: Stream, b: int, n: int) -> Monomial:
    return Monomial(_permutation(stream, b, n), np.ones((b, n)))


def _sign(stream: Stream, b: int, n: int) -> Monomial:
    return Monomial(_identity(b, n), _signs(stream, b, n))


def _negation(stream: Stream, b: int, n: int) -> Monomial:
    return Monomial(_identity(b, n), np.repeat(_signs(stream, b, 1), n, axis=1))


def _diagonal(stream: Stream, b: int, n: int, condition: float) -> Monomial:
    return Monomial(_identity(b, n), _signs(stream, b, n) * _magnitudes(stream, (b, n), condition))


def _scalar(stream: Stream, b: int, n: int, condition: float) -> Monomial:
    scale = _signs(stream, b, 1) * _magnitudes(stream, (b, 1), condition)
    return Monomial(_identity(b, n), np.repeat(scale, n, axis=1))


def _monomial(stream: Stream, b: int, n: int, condition: float) -> Monomial:
    scale = _signs(stream, b, n) * _magnitudes(stream, (b, n), condition)
    return Monomial(_permutation(stream, b, n), scale)


def _positive_monomial(stream: Stream, b: int, n: int, condition: float) -> Monomial:
    return Monomial(_permutation(stream, b, n), _magnitudes(stream, (b, n), condition))


def _unscaled(draw: Callable[[Stream, int, int], Monomial]) -> Callable[[Stream, int, int, float], Element]:
    return lambda stream, b, n, condition: draw(stream, b, n)


GROUPS: dict[str, Group] = {
    group.name: group
    for group in (
        Group("general_linear", "any invertible matrix", _signed_permutation, _general, "each"),
        Group("orthogonal", "any rotation or reflection", _signed_permutation, _orthogonal),
        Group(
            "complex",
            "scaled rotations of a pair: commutes with RoPE",
            _quarter_turns,
            lambda stream, b, n, condition: _planar(stream, b, condition),
            "whole",
            2,
        ),
        Group(
            "rotation",
            "rotations of a pair: commutes with RoPE, keeps norms",
            _quarter_turns,
            lambda stream, b, n, condition: _planar(stream, b, 1.0),
            "none",
            2,
        ),
        Group("diagonal", "a signed scale for each coordinate", _sign, _diagonal, "each"),
        Group("sign", "a sign for each coordinate", _sign, _unscaled(_sign)),
        Group("negation", "one sign for all coordinates", _negation, _unscaled(_negation)),
        Group("scalar", "one signed scale for all coordinates", _negation, _scalar, "whole"),
        Group("permutation", "any order", _plain_permutation, _unscaled(_plain_permutation)),
        Group("monomial", "any order, signed scales", _signed_permutation, _monomial, "each"),
        Group(
            "positive_monomial", "any order, positive scales", _plain_permutation, _positive_monomial, "each"
        ),
    )
}


def group(name: str) -> Group:
    """The group of this name.

    Raises:
        InputError: no such group.
    """
    try:
        return GROUPS[name]
    except KeyError:
        raise InputError("no such group", where=f"'{name}'", expected=" | ".join(GROUPS)) from None
