"""`params`: the rearrangement and the three forms of multi-head scaling."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from params_toy import (
    KEY,
    MLP_SPEC,
    SALT,
    Dictionary,
    apply,
    draw,
    toy_match,
    toy_output,
    toy_spec,
    toy_tensors,
    trained_pair,
)
from unmergeable.derive import Key
from unmergeable.errors import ClaimError, InputError, UsageError
from unmergeable.groups import GROUPS, Dense, Monomial
from unmergeable.match import match_spec
from unmergeable.methods import Context, method
from unmergeable.methods.rearrange import least_similar, pack, slot_rows, unpack
from unmergeable.methods.scaling import FORMS, condition_numbers, draw_form, factor_range, log_uniform


def stream(label="x"):
    return KEY.stream(SALT, label)


def mlp_match(tensors):
    return match_spec(MLP_SPEC, {n: v.shape for n, v in tensors.items()}, {"ff": len(tensors["bias"])})


def rows(w):
    return np.concatenate([w["up"], w["bias"][:, None], w["down"].T], axis=1)


# --- the whole method ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("qk", ["complex", "general_linear"])
@pytest.mark.parametrize("with_base", [False, True])
def test_keeps_the_function_and_is_undone(form, qk, with_base):
    tensors, rotate = toy_tensors(), qk == "complex"
    match = toy_match(toy_spec(qk), tensors)
    drawn = draw(match, tensors, toy_tensors(1) if with_base else None, form=form)
    locked = apply(match, drawn, tensors)
    for name in tensors:
        assert np.linalg.norm(locked[name] - tensors[name]) > 0.5 * np.linalg.norm(tensors[name]), name
    np.testing.assert_allclose(toy_output(locked, rotate), toy_output(tensors, rotate), atol=1e-11)
    back = apply(match, drawn, locked, undo=True)
    for name, value in tensors.items():
        if name.split(".")[2] in ("gu", "bias", "down"):  # rows are moved, nothing is computed
            assert np.array_equal(back[name].view(np.uint64), value.view(np.uint64))
        np.testing.assert_allclose(back[name], value, atol=1e-13)


def test_heads_stay_and_reports_conditions():
    tensors = toy_tensors()
    match = toy_match(toy_spec(), tensors)
    drawn = draw(match, tensors, form="nonsymmetric", condition=6)
    kinds = {match.sites[number].site.kind for number, _ in drawn.elements}
    assert kinds == {"qk", "vo", "mlp"}
    assert 1.5 < drawn.report["condition"]["vo"] <= 6 + 1e-9
    assert drawn.report["condition"]["mlp"] == 1.0
    json.dumps(drawn.report)


@pytest.mark.parametrize("form", FORMS)
def test_the_record_gives_the_same_elements_without_data(form):
    tensors = toy_tensors()
    match = toy_match(toy_spec(), tensors)
    drawn = draw(match, tensors, form=form)
    recorded = json.loads(json.dumps(drawn.recorded))
    again = draw(match, None, recorded=recorded, form=form)
    assert again.elements.keys() == drawn.elements.keys()
    assert json.loads(json.dumps(again.recorded)) == recorded
    for key, element in drawn.elements.items():
        other = again.elements[key]
        assert type(other) is type(element)
        np.testing.assert_array_equal(other.matrix(1), element.matrix(1))


def test_another_key_gives_another_order():
    tensors = toy_tensors()
    match = toy_match(toy_spec(), tensors)
    first = draw(match, tensors)
    second = method("params").draw(Context(match, Key(bytes(32)), SALT, Dictionary(tensors)))
    at = next(k for k in first.elements if match.sites[k[0]].site.kind == "mlp")
    assert (first.elements[at].perm != second.elements[at].perm).mean() > 0.5


# --- the rearrangement --------------------------------------------------------------------------------------


def test_least_similar_is_what_brute_force_finds():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 6):
        gram = rng.normal(size=(n, n))
        best = min(itertools.permutations(range(n)), key=lambda p: sum(gram[i, p[i]] for i in range(n)))
        assert least_similar(gram).tolist() == list(best)


def test_one_block_is_the_farthest_order_of_all():
    rng = np.random.default_rng(1)
    base = {"up": rng.normal(size=(6, 3)), "bias": rng.normal(size=6), "down": rng.normal(size=(3, 6))}
    tuned = {name: value + 0.1 * rng.normal(size=value.shape) for name, value in base.items()}
    match = mlp_match(tuned)
    perm = draw(match, tuned, base, rearrange_block=0).elements[0, ()].perm[0]
    far = [np.linalg.norm(rows(base) - rows(tuned)[list(p)]) for p in itertools.permutations(range(6))]
    assert np.linalg.norm(rows(base) - rows(tuned)[perm]) == pytest.approx(max(far))


@pytest.mark.parametrize("against", ["base", "itself"])
def test_it_is_farther_than_random_orders(against):
    base, tuned = trained_pair()
    match = mlp_match(tuned)
    reference = rows(base if against == "base" else tuned)

    def distance(perm):
        return np.linalg.norm(reference - rows(tuned)[perm])

    rng = np.random.default_rng(0)
    random = [distance(rng.permutation(96)) for _ in range(200)]
    blocks = draw(match, tuned, base if against == "base" else None).elements[0, ()].perm[0]
    best = draw(match, tuned, base if against == "base" else None, rearrange_block=0).elements[0, ()].perm[0]
    assert max(random) < distance(blocks) < distance(best)


def test_the_optimum_against_itself_is_no_secret_and_blocks_are_one():
    """Whoever solves the same problem on the locked rows finds the optimum's order again."""
    _, tuned = trained_pair()
    found = {}
    for block in (0, 24):
        drawn = draw(mlp_match(tuned), tuned, rearrange_block=block)
        locked = rows(tuned)[drawn.elements[0, ()].perm[0]]
        _, columns = linear_sum_assignment(locked @ locked.T)
        found[block] = (locked[columns] == rows(tuned)).all(axis=1).mean()
    assert found[0] > 0.9
    assert found[24] < 0.4


def test_rows_of_every_layout():
    tensors = toy_tensors()
    match = toy_match(toy_spec(), tensors)
    mlp = match.sites[2]
    gate, up, bias, down = mlp.site.slots
    gu = tensors["l.0.gu"]
    assert np.array_equal(slot_rows(gu, gate, mlp), gu[:, :, 0::2].transpose(0, 2, 1))
    assert np.array_equal(slot_rows(gu, up, mlp), gu[:, :, 1::2].transpose(0, 2, 1))
    assert np.array_equal(slot_rows(tensors["l.0.bias"], bias, mlp), tensors["l.0.bias"][:, :, None])
    assert np.array_equal(slot_rows(tensors["l.0.down"], down, mlp), tensors["l.0.down"])


@pytest.mark.parametrize("n", [1, 7, 65536, 70000])
def test_pack(n):
    perm = stream().permutation(n, 2)
    record = json.loads(json.dumps(pack(perm)))
    assert np.array_equal(unpack(record, (2, n), "x"), perm)
    for bad in (
        {**record, "shape": [1, n]},
        {**record, "rows": record["rows"][4:]},
        {**record, "rows": "?"},
        {**record, "rows": pack(np.zeros_like(perm) + n)["rows"]},
        {"shape": [2, n]},
    ):
        with pytest.raises(InputError, match="damaged"):
            unpack(bad, (2, n), "x")


# --- the scaling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(GROUPS))
def test_every_form_stays_in_the_group(form, name):
    n = GROUPS[name].size or 6
    element = draw_form(form, name, stream(), 5, n, 9.0)
    forward, back = element.matrix(1), element.inverse().matrix(1)
    eye = np.broadcast_to(np.eye(n), forward.shape)
    np.testing.assert_allclose(forward @ back, eye, atol=1e-13)
    np.testing.assert_allclose(forward @ element.matrix(-1).transpose(0, 2, 1), eye, atol=1e-13)
    assert np.linalg.cond(forward).max() <= 9.0 + 1e-9
    if name in ("orthogonal", "rotation", "sign", "negation", "permutation"):
        np.testing.assert_allclose(forward @ forward.transpose(0, 2, 1), eye, atol=1e-13)
    if name in ("complex", "rotation"):
        turn = np.array([[0.8, -0.6], [0.6, 0.8]])
        np.testing.assert_allclose(forward @ turn, turn @ forward, atol=1e-13)
    if name in ("diagonal", "sign", "negation", "scalar"):
        assert not (forward * (1 - np.eye(n))).any()
    if name in ("negation", "scalar"):
        np.testing.assert_array_equal(forward, forward[:, :1, :1] * eye)
    if form == "symmetric" and name != "permutation":
        np.testing.assert_allclose(forward, forward.transpose(0, 2, 1), atol=1e-13)
    if form == "diagonal" and name != "permutation":
        assert isinstance(element, Monomial)
        assert np.array_equal(element.perm, np.tile(np.arange(n), (5, 1)))
    if name in ("monomial", "positive_monomial", "permutation"):
        assert (np.count_nonzero(forward, axis=1) == 1).all()
    if name in ("positive_monomial", "permutation"):
        assert (forward >= 0).all()
    if name == "general_linear" and form == "nonsymmetric":
        assert isinstance(element, Dense)
        assert np.abs(forward - forward.transpose(0, 2, 1)).max() > 0.1


def test_the_papers_ranges_are_reached_and_not_left():
    assert factor_range("diagonal", 400) == pytest.approx((0.05, 20))
    assert factor_range("symmetric", 1e6) == (0.05, 20)
    assert factor_range("nonsymmetric", 400) == pytest.approx((0.1, 15))
    assert factor_range("diagonal", 4) == (0.5, 2)
    wide = draw_form("diagonal", "general_linear", stream(), 4, 500, 400.0)
    assert isinstance(wide, Monomial)
    assert 0.05 <= wide.scale.min() < 0.2
    assert 19.8 < wide.scale.max() <= 20
    assert abs(wide.scale.mean() - 10.025) < 0.6  # uniform, as in the paper


def test_log_uniform():
    drawn = log_uniform(stream(), (20_000,), 0.25, 4.0)
    assert 0.25 <= drawn.min() < 0.2503
    assert 3.99 < drawn.max() <= 4.0
    exponents = np.log(drawn) / np.log(4.0)
    assert abs(exponents.mean()) < 0.02
    assert abs(exponents.std() - 1 / np.sqrt(3)) < 0.01
    uniform = stream().uniform((20_000,))
    np.testing.assert_allclose(drawn, 0.25 * 16.0 ** (np.floor(uniform * 2**30) / 2**30), rtol=1e-13)


def test_an_mlp_that_cannot_be_permuted_is_scaled():
    tensors = toy_tensors()
    match = toy_match(toy_spec(mlp="diagonal"), tensors)
    drawn = draw(match, tensors)
    assert not drawn.recorded
    locked = apply(match, drawn, tensors)
    np.testing.assert_allclose(toy_output(locked), toy_output(tensors), atol=1e-11)
    assert condition_numbers(match, drawn.elements)["mlp"] > 2


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"form": "round"},
        {"condition": 0.5},
        {"condition": float("inf")},
        {"rearrange_block": -1},
        {"rearrange_block": 2.5},
        {"prune_rate": 1.0},
        {"prune_rate": -0.1},
        {"prune_rate": float("nan")},
        {"prune_rate": 1e-9},
        {"prune_rate": 0.1, "prune_target": "heads"},
    ],
)
def test_options_that_make_no_sense(options):
    tensors = toy_tensors()
    with pytest.raises(UsageError):
        draw(toy_match(toy_spec(), tensors), tensors, **options)


def test_errors_about_data():
    tensors = toy_tensors()
    match = toy_match(toy_spec(), tensors)
    with pytest.raises(InputError, match="not at hand"):
        draw(match, None)
    with pytest.raises(InputError, match="lacks a site"):
        draw(match, None, recorded={})
    with pytest.raises(InputError, match="another shape"):
        draw(match, tensors, {name: value[..., :-1] for name, value in tensors.items()})
    tensors["l.1.down"][0, 0, 0] = np.nan
    with pytest.raises(InputError, match="not finite"):
        draw(match, tensors)


def test_one_row_cannot_be_rearranged():
    tensors = {"up": np.ones((1, 3)), "bias": np.ones(1), "down": np.ones((3, 1))}
    with pytest.raises(ClaimError, match="too few rows"):
        draw(mlp_match(tensors), tensors)
