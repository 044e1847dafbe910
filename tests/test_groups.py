"""Groups: every element has an inverse, composes, keeps pairings, and belongs to its group."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmergeable.derive import Key
from unmergeable.errors import InputError
from unmergeable.groups import GROUPS, Dense, Element, Monomial, group

NAMES = sorted(GROUPS)
SALT = bytes(32)


def stream(label: str):  # type: ignore[no-untyped-def]
    return Key(bytes(range(32))).stream(SALT, label)


def sizes(name: str) -> st.SearchStrategy[int]:
    return st.just(2) if GROUPS[name].size == 2 else st.integers(1, 17)


@st.composite
def elements(draw: st.DrawFn, names: tuple[str, ...] = tuple(NAMES)) -> tuple[str, Element]:
    name = draw(st.sampled_from(names))
    b, n, label = draw(st.integers(1, 4)), draw(sizes(name)), draw(st.text("abc", min_size=1, max_size=4))
    if draw(st.booleans()):
        return name, group(name).draw_exact(stream(label), b, n, scales=draw(st.booleans()))
    return name, group(name).draw_dense(stream(label), b, n, 10.0)


@given(elements())
def test_the_inverse_undoes(drawn: tuple[str, Element]) -> None:
    _, element = drawn
    eye = np.broadcast_to(np.eye(element.n), (element.batch, element.n, element.n))
    assert np.allclose(element.inverse().matrix() @ element.matrix(), eye, atol=1e-12)
    twice = element.inverse().inverse()
    assert np.allclose(twice.matrix(), element.matrix(), atol=1e-12)


@given(elements())
def test_the_two_sides_keep_every_pairing(drawn: tuple[str, Element]) -> None:
    _, element = drawn
    eye = np.broadcast_to(np.eye(element.n), (element.batch, element.n, element.n))
    assert np.allclose(element.matrix(-1).transpose(0, 2, 1) @ element.matrix(1), eye, atol=1e-12)


@given(elements(), st.text("xyz", min_size=1, max_size=3))
def test_composition_is_the_product(drawn: tuple[str, Element], label: str) -> None:
    name, first = drawn
    second = group(name).draw_exact(stream(label), first.batch, first.n)
    if isinstance(first, Monomial):
        assert np.allclose(second.compose(first).matrix(), second.matrix() @ first.matrix(), atol=1e-12)
    else:
        other = group(name).draw_dense(stream(label), first.batch, first.n, 10.0)
        assert isinstance(other, Dense)
        assert np.allclose(other.compose(first).matrix(-1), other.matrix(-1) @ first.matrix(-1), atol=1e-11)


@given(elements())
def test_elements_belong_to_their_group(drawn: tuple[str, Element]) -> None:
    name, element = drawn
    a, n = element.matrix(), element.n
    eye = np.eye(n)
    signs = np.abs(np.abs(a[a != 0]) - 1) < 1e-12
    off_diagonal = np.abs(a * (1 - eye)).max()
    if name in ("orthogonal", "rotation", "sign", "negation", "permutation"):
        assert np.allclose(a @ a.transpose(0, 2, 1), eye, atol=1e-12)
    if name in ("complex", "rotation"):
        turn = np.array([[0.0, -1.0], [1.0, 0.0]])
        assert np.allclose(a @ turn, turn @ a, atol=1e-12)
    if name in ("diagonal", "sign", "negation", "scalar"):
        assert off_diagonal == 0
    if name in ("negation", "scalar"):
        assert np.allclose(a, a[:, :1, :1] * eye, atol=1e-12)
    if name in ("sign", "negation"):
        assert signs.all()
    if name in ("permutation", "positive_monomial"):
        assert (a >= 0).all()
    if name in ("permutation", "monomial", "positive_monomial"):
        assert ((a != 0).sum(axis=1) == 1).all()
        assert ((a != 0).sum(axis=2) == 1).all()


@given(elements())
def test_exact_elements_are_signed_powers_of_two(drawn: tuple[str, Element]) -> None:
    name, element = drawn
    exact = group(name).draw_exact(stream("scaled"), element.batch, element.n, scales=True)
    assert exact.exact
    plain = group(name).draw_exact(stream("plain"), element.batch, element.n)
    assert np.all(np.abs(plain.scale) == 1)


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from([2, 8, 33, 64]), st.sampled_from([1.0, 4.0, 10.0]))
def test_condition_numbers_are_capped(name: str, n: int, condition: float) -> None:
    n = GROUPS[name].size or n
    element = group(name).draw_dense(stream("c"), 2, n, condition)
    assert np.linalg.cond(element.matrix()).max() <= condition * (1 + 1e-9)


def test_dense_elements_mix_every_coordinate() -> None:
    matrix = np.abs(group("orthogonal").draw_dense(stream("mix"), 4, 64, 10.0).matrix())
    assert (matrix > 1e-6).mean() > 0.99
    assert matrix.max() < 0.9


def test_the_same_words_give_the_same_dense_element_for_ever() -> None:
    """Pinned to 1e-12: built from + − × ÷ √ in a fixed order, so every machine draws this one."""
    matrix = group("general_linear").draw_dense(stream("pinned"), 1, 3, 10.0).matrix()[0]
    assert np.allclose(matrix, PINNED, rtol=0, atol=1e-12)


PINNED = np.array(
    [
        [0.07150908795934822, 1.5512494336225293, 1.7003548545887797],
        [-0.023706225585759716, 0.03133968027394807, 0.755411827733908],
        [1.8892914894479114, -1.2039608956877086, 0.9429417986612807],
    ]
)


def test_dense_elements_act_with_powers_of_one_alone() -> None:
    element = group("orthogonal").draw_dense(stream("p"), 1, 4, 1.0)
    with pytest.raises(ValueError, match="power"):
        element.matrix(0)


def test_monomial_powers() -> None:
    element = Monomial(np.array([[1, 0]]), np.array([[2.0, -4.0]]))
    assert element.factors(0).tolist() == [[1, 1]]
    assert element.factors(1).tolist() == [[2, -4]]
    assert element.factors(-1).tolist() == [[0.5, -0.25]]
    assert element.factors(-2).tolist() == [[0.25, 0.0625]]


@given(elements(("permutation", "monomial", "sign", "negation", "general_linear", "orthogonal")))
def test_movement_is_what_random_weights_move(drawn: tuple[str, Element]) -> None:
    _, element = drawn
    a = element.matrix()
    expected = np.sqrt(((a - np.eye(element.n)) ** 2).sum() / (element.batch * element.n))
    assert element.moved() == pytest.approx(expected, abs=1e-12)


def test_unknown_groups_and_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="no such group"):
        group("spin")
    with pytest.raises(InputError, match="acts on 2"):
        group("complex").check(3, "somewhere")
