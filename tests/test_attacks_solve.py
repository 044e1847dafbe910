"""The solver of every group: it undoes what its group draws, keeps to the group, and finds the minimum."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

import toy
from unmergeable.attacks import rows
from unmergeable.attacks.dense import Side, canonical, closed_form, general_linear, objective, planar
from unmergeable.attacks.solve import Aim, snap, solve
from unmergeable.groups import GROUPS, Dense, Element, Monomial

B, WIDTH = 5, 40


def problem(group: str, n: int, noise: float, *, exact: bool = False, powers: tuple[int, ...] = (1, -1)):
    """Rows of an anchor, and of a noisy copy that an element of the group was applied to."""
    random = np.random.default_rng(n)
    stream = toy.key(3).stream(bytes(32), group)
    kind = GROUPS[group]
    element = kind.draw_exact(stream, B, n, True) if exact else kind.draw_dense(stream, B, n, 10.0)
    pairs = []
    for power in powers:
        y = random.standard_normal((B, n, WIDTH))
        x = y + noise * random.standard_normal(y.shape)
        if isinstance(element, Monomial):
            x = np.take_along_axis(x, element.perm[:, :, None], axis=1) * element.factors(power)[:, :, None]
        else:
            x = element.matrix(power) @ x
        pairs.append((power, x, y))
    return element, pairs


def after(found: Element, element: Element) -> np.ndarray:
    """found · element, as matrices."""
    return found.matrix(1) @ element.matrix(1)


@pytest.mark.parametrize("group", sorted(GROUPS))
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_every_group_is_undone(group: str, noise: float) -> None:
    n = GROUPS[group].size or 12
    element, pairs = problem(group, n, noise)
    found = solve(group, pairs)
    assert found is not None
    error = np.sqrt(((after(found, element) - np.eye(n)) ** 2).sum((1, 2)) / n)
    # noise of .15 on 80 numbers a row, and n free numbers a row at most
    assert error.max() < (1e-5 if noise == 0 else 0.15)
    np.testing.assert_allclose(
        found.matrix(1) @ found.matrix(-1).transpose(0, 2, 1), np.tile(np.eye(n), (B, 1, 1)), atol=1e-9
    )


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_exact_elements_come_back_to_the_bit(group: str) -> None:
    n = GROUPS[group].size or 12
    element, pairs = problem(group, n, 0.1, exact=True)
    found = solve(group, pairs)
    assert found is not None
    back = snap(found).inverse()
    assert isinstance(back, Monomial)
    assert isinstance(element, Monomial)
    assert np.array_equal(back.perm, element.perm)
    assert np.array_equal(back.scale, element.scale)


@pytest.mark.parametrize(
    "group", ["general_linear", "orthogonal", "complex", "rotation", "diagonal", "monomial"]
)
def test_other_elements_are_not_taken_for_exact_ones(group: str) -> None:
    stream = toy.key(5).stream(bytes(32), group)
    element = GROUPS[group].draw_dense(
        stream, 64 if GROUPS[group].size else 8, GROUPS[group].size or 16, 10.0
    )
    assert snap(element) is element


def test_general_linear_finds_what_lbfgs_finds() -> None:
    """The objective is that of the paper's attack; a general optimiser finds nothing better."""
    n = 6
    _, pairs = problem("general_linear", n, 0.3)
    plus, minus = Side.of(*pairs[0][1:]), Side.of(*pairs[1][1:])
    value = objective(plus, minus, general_linear(plus, minus))
    for e in range(B):
        (x, y), (z, w) = ((pair[1][e], pair[2][e]) for pair in pairs)

        def cost(flat: np.ndarray, x=x, y=y, z=z, w=w) -> tuple[float, np.ndarray]:
            a = flat.reshape(n, n)
            contra = np.linalg.inv(a).T
            r, s = a @ x - y, contra @ z - w
            return float((r**2).sum() + (s**2).sum()), (2 * r @ x.T - 2 * contra @ z @ s.T @ contra).ravel()

        start = general_linear(plus, minus)[e] + 0.05 * np.random.default_rng(e).standard_normal((n, n))
        best = minimize(cost, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
        assert value[e] <= best.fun * (1 + 1e-6)
        assert value[e] == pytest.approx(cost(general_linear(plus, minus)[e].ravel())[0], rel=1e-9)


def test_the_plane_has_no_better_scaled_rotation() -> None:
    _, pairs = problem("complex", 2, 0.5)
    plus, minus = Side.of(*pairs[0][1:]), Side.of(*pairs[1][1:])
    found = objective(plus, minus, planar(plus, minus, scaled=True))
    for rho in np.geomspace(0.1, 10, 60):
        for phi in np.linspace(0, 2 * np.pi, 90):
            a = rho * np.array([[np.cos(phi), -np.sin(phi)], [np.sin(phi), np.cos(phi)]])
            assert np.all(found <= objective(plus, minus, np.tile(a, (B, 1, 1))) + 1e-9)


def test_the_closed_form_is_right_without_noise() -> None:
    element, pairs = problem("general_linear", 6, 0.0)
    a = closed_form(Side.of(*pairs[0][1:]), Side.of(*pairs[1][1:]))
    np.testing.assert_allclose(a @ element.matrix(1), np.tile(np.eye(6), (B, 1, 1)), atol=1e-6)


@pytest.mark.parametrize("form", ["polar", "svd"])
def test_canonical_forms_undo_a_general_matrix(form: str) -> None:
    element, pairs = problem("general_linear", 6, 1e-6)
    a = canonical(Side.of(*pairs[0][1:]), Side.of(*pairs[1][1:]), form=form)
    np.testing.assert_allclose(a @ element.matrix(1), np.tile(np.eye(6), (B, 1, 1)), atol=1e-3)


def test_a_scale_seen_squared() -> None:
    """Rows of power −2, as a squared activation has them."""
    element, pairs = problem("positive_monomial", 9, 0.05, powers=(1, -2))
    found = solve("positive_monomial", pairs)
    assert found is not None
    np.testing.assert_allclose(after(found, element), np.tile(np.eye(9), (B, 1, 1)), atol=0.1)


def test_aims_use_a_part_of_the_group_only() -> None:
    _, pairs = problem("general_linear", 6, 0.1)
    assert solve("general_linear", pairs, Aim.ORDER) is None
    turned = solve("general_linear", pairs, Aim.LENGTHS)
    assert isinstance(turned, Dense)
    np.testing.assert_allclose(turned.matrix(1), turned.matrix(-1), atol=1e-9)
    _, pairs = problem("monomial", 6, 0.1)
    order = solve("monomial", pairs, Aim.ORDER)
    assert isinstance(order, Monomial)
    assert np.all(order.scale == 1.0)


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(ValueError, match="no solver"):
        solve("affine", [(1, np.ones((1, 2, 3)), np.ones((1, 2, 3)))])


def test_rows_without_weight_stay() -> None:
    """Dead rows, heads of zeros: nothing to go by, and nothing breaks."""
    zero = np.zeros((2, 4, 7))
    for group in GROUPS:
        n = GROUPS[group].size or 4
        found = solve(group, [(1, zero[:, :n], zero[:, :n]), (-1, zero[:, :n], zero[:, :n])])
        assert found is not None
        assert np.isfinite(found.matrix(1)).all()
        assert np.isfinite(found.matrix(-1)).all()


def test_many_rows_are_paired_in_two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = (
        np.random.default_rng(0).standard_normal((60, 60))
        + 6 * np.eye(60)[np.random.default_rng(1).permutation(60)]
    )
    whole = rows.assign(similarity)
    monkeypatch.setattr(rows, "EXACT", 10)
    assert np.array_equal(rows.assign(similarity), whole)
