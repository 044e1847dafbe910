"""Identities of sites on stored tensors: they hold for every element of every group, and for nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity_specs import CASES, SIZES, H, site, slot, spec_of
from identity_toys import compare, held, locked, made, swapped
from unmergeable.engine import HALF_ULP
from unmergeable.errors import InputError
from unmergeable.match import match_spec

# --- hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scales", [False, True])
def test_exact_locks_hold_to_1e_10(case: str, scales: bool) -> None:
    match, values = made(case, dtype="BF16")
    for salt in range(3):
        after = locked(match, values, "exact", "BF16", scales=scales, salt=salt)
        assert any(not np.array_equal(after[name], values[name]) for name in values)
        findings = compare(match, values, after, "BF16")
        assert held(findings), findings
        assert max(finding.measured for finding in findings) < 1e-13
        assert {finding.site for finding in findings} == set(range(len(match.sites)))


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "latent"])
def test_dense_locks_hold_to_the_noise_of_rounding(case: str, dtype: str) -> None:
    match, values = made(case, dtype=dtype)
    for salt in range(3):
        findings = compare(match, values, locked(match, values, "gauge", dtype, salt=salt), dtype, dense=True)
        assert held(findings), findings


def test_twice_locked_holds() -> None:
    match, values = made("grouped")
    after = locked(match, locked(match, values, "exact", salt=1), "exact", salt=2)
    assert held(compare(match, values, after))


@given(st.sampled_from(sorted(CASES)), st.integers(0, 2**31), st.integers(0, 255), st.booleans())
@settings(max_examples=30, deadline=None)
def test_any_weights_and_any_salt_hold(case: str, seed: int, salt: int, scales: bool) -> None:
    match, values = made(case, seed, "BF16")
    assert held(
        compare(match, values, locked(match, values, "exact", "BF16", scales=scales, salt=salt), "BF16")
    )


# --- fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_one_altered_element_of_any_tensor_fails(case: str) -> None:
    match, values = made(case)
    after = locked(match, values, "exact")
    rng = np.random.default_rng(5)
    for name in values:
        at = tuple(int(rng.integers(size)) for size in values[name].shape)
        for change in (lambda x: x * (1 + 1e-6), lambda x: -x, lambda x: 0.0):
            altered = after[name].copy()
            altered[at] = change(altered[at])
            findings = compare(match, values, {**after, name: altered})
            assert not held(findings), (name, at)
            numbers = {part.site for part in match.parts[name]}
            assert numbers & {finding.site for finding in findings if not finding.held}, name


@pytest.mark.parametrize("case", ["grouped", "normed", "spanning", "rows", "latent"])
@pytest.mark.parametrize("lock", ["exact", "gauge"])
def test_two_heads_swapped_in_one_tensor_alone_fail(case: str, lock: str) -> None:
    if (case, lock) == ("latent", "gauge"):
        pytest.skip("exchanged columns are still one order there")
    match, values = made(case)
    after = locked(match, values, lock)
    count = 0
    for number, matched in enumerate(match.sites):
        if matched.site.group not in ("permutation", "monomial", "positive_monomial"):
            continue
        for k in range(len(matched.site.slots)):
            count += 1
            findings = compare(match, values, swapped(match, after, number, k), dense=lock == "gauge")
            assert not held(findings), (matched.site.name, matched.site.slots[k].tensor)
            everywhere = dict(after)
            for each in range(len(matched.site.slots)):
                everywhere = swapped(match, everywhere, number, each)
            assert held(compare(match, values, everywhere, dense=lock == "gauge")), matched.site.name
    assert count


def test_groups_fail_for_elements_of_larger_groups() -> None:
    rng = np.random.default_rng(2)
    larger = {
        "complex": lambda: np.array(
            [[1.0, 0.0], [0.0, -1.0]]
        ),  # a reflection does not commute with rotations
        "rotation": lambda: 2.0 * np.eye(2),
        "orthogonal": lambda: np.diag(np.exp(rng.normal(size=8))),
        "sign": lambda: np.diag(np.r_[2.0, np.ones(7)]),
        "negation": lambda: np.diag(np.r_[-1.0, np.ones(7)]),
        "scalar": lambda: np.diag(np.r_[-1.0, np.ones(7)]),
        "diagonal": lambda: np.eye(8)[[1, 0, *range(2, 8)]],
    }
    for group, matrix in larger.items():
        match, values = made(group)
        n = match.sites[0].acted
        a = matrix()
        inverse = np.linalg.inv(a).T
        after = {
            "q": (inverse @ values["q"].reshape(5, n, H)).reshape(-1, H),
            "k": (a @ values["k"].reshape(5, n, H)).reshape(-1, H),
            "k.bias": (values["k.bias"].reshape(5, n) @ a.T).reshape(-1),
        }
        assert not held(compare(match, values, after)), group
        if group not in ("diagonal",):  # the general linear group has them all
            general, _ = made("general_linear") if n == 8 else (None, None)
            assert general is None or held(compare(general, values, after)), group


def test_a_positive_scale_is_not_a_negative_one() -> None:
    match, values = made("rows")
    after = {name: value.copy() for name, value in values.items()}
    after["l.0.x.1.up"][3] *= -1
    assert not held(compare(match, values, after))
    after = {name: value.copy() for name, value in values.items()}
    after["l.0.x.1.up"][3] *= 2
    after["l.0.x.1.down"][:, 3] /= 4
    assert held(compare(match, values, after))


def test_the_first_difference_is_named() -> None:
    match, values = made("grouped")
    after = locked(match, values, "exact")
    after["l.10.v"][0, 0] += 1
    after["l.1.o"][0, 47] += 1
    failed = [finding for finding in compare(match, values, after) if not finding.held]
    assert failed[0].label.startswith("l.1.vo [g = "), failed
    assert any(finding.label.startswith("l.10.vo") for finding in failed)
    assert not any(finding.label.startswith("l.0.") for finding in failed)


def test_rows_that_no_site_acts_on_must_not_change() -> None:
    match, values = made("grouped")
    after = locked(match, values, "gauge")
    after["l.1.k"][25, 3] *= 1 + 1e-6
    failed = [finding for finding in compare(match, values, after, dense=True) if not finding.held]
    assert [finding.label for finding in failed] == ["l.1.k [axis 0 = 25]"]
    assert failed[0].bound == 1e-10


# --- hard weights -------------------------------------------------------------------------------------------


def test_zeros_constants_and_copies_neither_fool_nor_fail_it() -> None:
    match, values = made("rows")
    for n in range(2):
        values[f"l.{n}.gu"][:, :, 4:8] = 0.0  # dead rows
        values[f"l.{n}.down"][:, 5] = 0.0
        values[f"l.{n}.fc1"][2:6] = 1.0  # rows that are the same constant, and columns that are not
        values[f"l.{n}.fc1.bias"][2:6] = 0.5
        for e in range(4):  # experts that are copies of one, told apart by their router
            values[f"l.{n}.x.{e}.up"] = values[f"l.{n}.x.0.up"]
            values[f"l.{n}.x.{e}.down"] = values[f"l.{n}.x.0.down"]
    after = locked(match, values, "exact")
    assert held(compare(match, values, after))
    assert held(compare(match, values, locked(match, values, "gauge"), dense=True))
    for name, at in (
        ("l.0.fc2", (0, 3)),
        ("l.1.fc1", (3, 0)),
        ("l.0.x.2.up", (0, 0)),
        ("l.1.x.router", (2, 2)),
    ):
        altered = after[name].copy()
        altered[at] += 1e-3
        assert not held(compare(match, values, {**after, name: altered})), name


def test_all_zero_weights_hold_and_one_that_is_not_fails() -> None:
    match, values = made("grouped")
    values = {name: np.zeros_like(value) for name, value in values.items()}
    assert held(compare(match, values, values))
    after = {name: value.copy() for name, value in values.items()}
    after["l.0.sinks"][0] = 1e-30
    assert not held(compare(match, values, after))


@pytest.mark.parametrize("case", ["grouped", "normed", "spanning", "rows"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_must_be_in_both(case: str, bad: float) -> None:
    match, values = made(case, dtype="F32")
    after = locked(match, values, "exact", "F32")
    rng = np.random.default_rng(7)
    for name in values:
        if name.startswith(("l.1.", "l.2.", "l.10.")):  # one layer is enough
            continue
        at = tuple(int(rng.integers(size)) for size in values[name].shape)
        altered = after[name].copy()
        altered[at] = bad
        assert not held(compare(match, values, {**after, name: altered}, "F32")), name
        spoilt = {**values, name: values[name].copy()}
        spoilt[name][at] = bad
        # alone in its row, it has no scale that a power of two could be seen by
        relocked = locked(match, spoilt, "exact", "F32", scales="bias" not in name)
        assert held(compare(match, spoilt, relocked, "F32")), name
        assert not held(compare(match, spoilt, after, "F32")), name
        # the same number elsewhere in its tensor
        there = next(other for other, value in relocked.items() if not np.isfinite(value).all())
        moved = relocked[there].copy()
        flat = moved.reshape(-1)
        where = int(np.flatnonzero(~np.isfinite(flat))[0])
        flat[where], flat[where - 1] = flat[where - 1], flat[where]
        assert not held(compare(match, spoilt, {**relocked, there: moved}, "F32")), name


def test_inf_is_not_minus_inf_and_not_nan() -> None:
    match, values = made("rows", dtype="F32")
    values["l.0.fc1"][2, 3] = np.inf
    for other in (-np.inf, np.nan, 3.0):
        after = {name: value.copy() for name, value in values.items()}
        after["l.0.fc1"][2, 3] = other
        assert not held(compare(match, values, after, "F32"))


def test_dense_noise_beyond_four_half_ulps_fails() -> None:
    match, values = made("grouped", dtype="F32")
    after = locked(match, values, "gauge", "F32")
    rng = np.random.default_rng(3)
    for factor, holds in ((0.5, True), (60.0, False)):
        shaken = {
            name: v * (1 + factor * HALF_ULP["F32"] * rng.normal(size=v.shape)) for name, v in after.items()
        }
        shaken |= {
            f"l.{n}.k": after[f"l.{n}.k"] for n in (0, 1, 10)
        }  # some of its rows must not change at all
        assert held(compare(match, values, shaken, "F32", dense=True)) is holds


# --- what cannot be checked is refused ----------------------------------------------------------------------


def test_specs_without_identities_are_refused() -> None:
    shapes = {"a": (40, H), "b": (40, H)}
    values = {name: np.ones(shape) for name, shape in shapes.items()}
    a, b = slot("a", {"0": "h j"}, -1), slot("b", {"0": "h j"})
    bad = {
        "counterpart": [site("s", "qk", "j", ["h"], "general_linear", b)],
        "another counterpart": [site("s", "mlp", "j", ["h"], "monomial", b)],
        "cannot act on": [site("s", "qk", "j", ["h"], "general_linear", a, replaced(b, power=0))],
        "two sites act on the same rows": [
            site("s", "qk", "j", ["h"], "general_linear", a, b),
            site("t", "qk", "j", ["h"], "sign", a, b),
        ],
    }
    for what, sites in bad.items():
        spec = spec_of(*sites)
        used = {entry.tensor: values[entry.tensor] for each in spec.sites for entry in each.slots}
        match = match_spec(spec, {name: value.shape for name, value in used.items()}, SIZES)
        with pytest.raises(InputError, match=what.removeprefix("another ")):
            compare(match, used, used)


def replaced(entry: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**entry, **fields}


def test_an_outer_site_with_other_dims_is_refused() -> None:
    spec = spec_of(
        site("vo", "vo", "j", ["h"], "general_linear", slot("v", {"0": "h j"}), slot("o", {"1": "h j"}, -1)),
        site("odd", "heads", "j", ["n"], "permutation", slot("v", {"0": "n j k"}), slot("o", {"1": "n j k"})),
    )
    sizes = {**SIZES, "h": 3, "j": 8, "n": 3, "k": 1}
    values = {"v": np.ones((24, H)), "o": np.ones((H, 24))}
    match = match_spec(spec, {name: value.shape for name, value in values.items()}, sizes)
    assert held(compare(match, values, values))  # j is gone from the products: there is nothing to order
    spec = spec_of(
        site("vo", "mlp", "j", ["h"], "diagonal", slot("v", {"0": "h j"}), slot("o", {"1": "h j"}, -1)),
        site("odd", "heads", "j", ["n"], "permutation", slot("v", {"0": "n j k"}), slot("o", {"1": "n j k"})),
    )
    match = match_spec(spec, {name: value.shape for name, value in values.items()}, sizes)
    with pytest.raises(InputError, match="dims n are not those"):
        compare(match, values, values)
