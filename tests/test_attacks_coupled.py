"""Attacks in memory on the toy network: each undoes what it must, and no more than it can."""

from __future__ import annotations

import numpy as np
import pytest

import attack_cases as cases
from unmergeable.attacks import ATTACKS, NEEDS, Case, attack_named
from unmergeable.attacks.recover import recover, undo
from unmergeable.attacks.tables import Layout, tables
from unmergeable.errors import InputError, UsageError
from unmergeable.groups import Monomial

LOCKS = [
    ("exact", {}),
    ("exact", {"scales": True}),
    ("gauge", {}),
    ("mergelock", {}),
    ("params", {}),
    ("params", {"form": "nonsymmetric", "condition": 400.0}),
]


@pytest.fixture(scope="module")
def world():
    base, tuned, other = cases.models()
    return base, tuned, other, cases.toy_match(base)


@pytest.mark.parametrize(("name", "options"), LOCKS)
@pytest.mark.parametrize("to", ["base", "expert"])
@pytest.mark.parametrize("snap", [True, False])
def test_coupled_undoes_every_lock(world, name: str, options: dict, to: str, snap: bool) -> None:
    base, tuned, other, match = world
    anchor = base if to == "base" else other
    elements = cases.draw(match, tuned, name, options)
    locked = cases.apply(match, elements, tuned)
    case = Case(match, locked, anchor)
    outcome = attack_named("anchor-coupled").run(case, snap=snap)
    attacked = outcome.tensors(case)
    assert cases.distance(match, locked, tuned) > 0.8
    # the toy's heads are 8 rows of 25 to 49 numbers: more of the difference looks like a symmetry than in a model
    assert cases.distance(match, attacked, tuned) < 0.25 * cases.distance(match, tuned, anchor)
    assert cases.moved(attacked, tuned) <= 1e-9
    if name == "exact" and snap:
        assert all(np.array_equal(attacked[tensor], tuned[tensor]) for tensor in tuned)


@pytest.mark.parametrize("options", [{}, {"scales": True}])
def test_the_elements_of_an_exact_lock_are_found(world, options: dict) -> None:
    """What `recover` returns are the lock's own elements: the secret is gone."""
    base, tuned, _, match = world
    elements = cases.draw(match, tuned, "exact", options)
    found = recover(match, cases.apply(match, elements, tuned), base)
    assert found.keys() == elements.keys()
    for key, element in elements.items():
        back = found[key]
        assert isinstance(back, Monomial)
        assert isinstance(element, Monomial)
        assert np.array_equal(back.perm, element.perm)
        assert np.array_equal(back.scale, element.scale)


def test_an_unlocked_model_is_left_as_it_is(world) -> None:
    base, tuned, _, match = world
    attacked = undo(match, recover(match, tuned, base), tuned)
    assert all(np.array_equal(attacked[name], tuned[name]) for name in tuned)


@pytest.mark.parametrize(
    "name", ["align-permutation", "align-procrustes", "align-canonical", "anchor-coupled"]
)
@pytest.mark.parametrize("anchor", ["base", "noise"])
def test_alignments_never_change_the_function(world, name: str, anchor: str) -> None:
    """Even towards a model that has nothing to do with this one."""
    base, tuned, _, match = world
    random = np.random.default_rng(3)
    towards = base if anchor == "base" else {k: random.standard_normal(v.shape) for k, v in base.items()}
    locked = cases.apply(match, cases.draw(match, tuned, "gauge"), tuned)
    case = Case(match, locked, towards)
    attack = attack_named(name)
    assert attack.keeps_function
    assert cases.moved(attack.run(case).tensors(case), tuned) <= 1e-9


def test_permutations_undo_orders_alone(world) -> None:
    base, tuned, _, match = world
    kinds = ("mlp", "heads", "experts")
    orders = cases.unsigned(cases.only(match, cases.draw(match, tuned, "exact"), kinds))
    case = Case(match, cases.apply(match, orders, tuned), base)
    attacked = attack_named("align-permutation").run(case).tensors(case)
    assert all(np.array_equal(attacked[name], tuned[name]) for name in tuned)
    locked = cases.apply(match, cases.draw(match, tuned, "mergelock"), tuned)
    case = Case(match, locked, base)
    assert cases.distance(match, attack_named("align-permutation").run(case).tensors(case), locked) == 0.0


def test_blocks_are_told_apart_under_any_lock_inside(world) -> None:
    """Heads, groups and experts are found though every matrix inside of them was changed."""
    base, tuned, _, match = world
    elements = cases.draw(match, tuned, "gauge")
    case = Case(match, cases.apply(match, elements, tuned), base)
    found = attack_named("align-permutation").run(case).elements
    assert found is not None
    for key, element in cases.only(match, elements, ("heads", "experts")).items():
        assert np.array_equal(found[key].perm, element.perm)


def test_what_blocks_are_told_apart_by_never_changes(world) -> None:
    _, tuned, _, match = world
    elements = cases.draw(match, tuned, "gauge")
    inside = cases.only(match, elements, ("qk", "vo", "mlp"))
    locked = cases.apply(match, inside, tuned)
    layout = Layout(match)
    seen = 0
    for number, matched in enumerate(match.sites):
        for instance in matched.instances if layout.outer(number) else ():
            before, after = (list(tables(layout, number, instance, state, 0)) for state in (tuned, locked))
            for a, b in zip(before, after, strict=True):
                seen += 1
                assert a.dims == b.dims
                np.testing.assert_allclose(a.values, b.values, atol=1e-9 * np.abs(a.values).max())
    assert seen >= 2 * (2 + 2 + 2)


def test_procrustes_undoes_rotations_alone(world) -> None:
    base, tuned, _, match = world
    dense = cases.only(match, cases.draw(match, tuned, "mergelock"), ("qk", "vo"))
    reached = {}
    for label, elements in (("rotations", cases.rotations(dense)), ("general", dense)):
        case = Case(match, cases.apply(match, elements, tuned), base)
        attacked = attack_named("align-procrustes").run(case).tensors(case)
        reached[label] = cases.distance(match, attacked, tuned)
    whole = cases.distance(match, tuned, base)
    assert reached["rotations"] < 0.25 * whole
    assert reached["general"] > 2 * whole


@pytest.mark.parametrize(("form", "most"), [("polar", 0.4), ("svd", 8.0)])
def test_canonical_forms_undo_general_matrices(world, form: str, most: float) -> None:
    """Singular directions of the toy's random products are mixed up by noise; balanced forms are not."""
    base, tuned, _, match = world
    locked = cases.apply(match, cases.draw(match, tuned, "mergelock"), tuned)
    case = Case(match, locked, base)
    attacked = attack_named("align-canonical").run(case, form=form).tensors(case)
    assert cases.distance(match, attacked, tuned) < most * cases.distance(match, tuned, base)
    assert cases.distance(match, attacked, tuned) < cases.distance(match, locked, tuned)


def test_orders_then_canonical_forms_undo_an_exact_lock(world) -> None:
    base, tuned, _, match = world
    state = cases.apply(match, cases.draw(match, tuned, "exact"), tuned)
    before = cases.distance(match, state, tuned)
    for name in ("align-permutation", "align-canonical"):
        case = Case(match, state, base)
        state = attack_named(name).run(case).tensors(case)
    # signs of rows behind a gate are left: neither of the two knows them
    names = [n for n in match.parts if ".q." in n or ".k." in n or ".v." in n or ".o." in n]
    squares = [sum(((a[n] - b[n]) ** 2).sum() for n in names) for a, b in ((state, tuned), (tuned, base))]
    assert np.sqrt(squares[0] / squares[1]) < 0.4
    assert cases.distance(match, state, tuned) < before


def test_independent_breaks_the_model(world) -> None:
    base, tuned, _, match = world
    locked = cases.apply(match, cases.draw(match, tuned, "mergelock"), tuned)
    case = Case(match, locked, base)
    attack = attack_named("anchor-independent")
    attacked = attack.run(case).tensors(case)
    assert not attack.keeps_function
    assert cases.moved(attacked, tuned) > 1e-3
    assert cases.distance(match, attacked, base) < cases.distance(match, locked, base)


def test_every_attack_says_what_it_needs() -> None:
    for name in ATTACKS:
        attack = attack_named(name)
        assert attack.about
        assert attack.cost
        assert attack.needs
        assert set(attack.needs) <= NEEDS.keys()
        assert attack.access == 1


def test_what_is_missing_or_wrong_is_refused(world) -> None:
    base, tuned, _, match = world
    case = Case(match, tuned)
    for name in ATTACKS:
        with pytest.raises(UsageError, match=r"needs (an anchor|the base)"):
            attack_named(name).run(case)
    with pytest.raises(UsageError, match="no such attack"):
        attack_named("align-everything")
    with pytest.raises(UsageError, match="no such option"):
        attack_named("anchor-coupled").run(Case(match, tuned, base), strength=3)
    with pytest.raises(UsageError, match="canonical form"):
        attack_named("align-canonical").run(Case(match, tuned, base), form="jordan")
    name = "l.0.v.weight"
    for broken, message in (
        ({**base, name: base[name][:, :-1]}, "another shape"),
        ({k: v for k, v in base.items() if k != name}, "lacks a tensor"),
        ({**base, name: np.full_like(base[name], np.nan)}, "NaN or infinity in the anchor"),
    ):
        with pytest.raises(InputError, match=message):
            recover(match, tuned, broken)


def test_the_seed_decides(world) -> None:
    base, tuned, _, match = world
    locked = cases.apply(match, cases.draw(match, tuned, "gauge"), tuned)
    runs = [recover(match, locked, base, seed=4) for _ in range(2)]
    for key in runs[0]:
        assert np.array_equal(runs[0][key].matrix(1), runs[1][key].matrix(1))
