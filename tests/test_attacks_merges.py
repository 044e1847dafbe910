"""Merges off the shelf as attacks: which models and weights each method gets, on every side, and once more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merging_models import State, triple
from thief_cases import same, within_budget
from unmergeable.attacks.merges import PARTNER, PROBE_MERGE, Coefficients, Method, off_the_shelf
from unmergeable.attacks.thief import Subject, Thief, all_of
from unmergeable.audit.work import one_thread
from unmergeable.errors import InputError, RunError, UsageError
from unmergeable.merging import merge_method
from unmergeable.merging.grids import FULL_DOSE_GRID, LAMBDAS
from unmergeable.merging.kit import TABLE, WEIGHTS

SHELF = {attack.name: attack for attack in off_the_shelf()}
KIT = [name for name in SHELF if name.startswith("mergekit:")]
SIDES = ("plain", "without")


class Seen:
    """What an attack looks at: options, and a copy of the merge."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, Any], State]] = []
        self.private: list[Mapping[str, Any]] = []

    def __call__(
        self, options: Mapping[str, Any], subject: Any, *, kept: Subject | None = None
    ) -> tuple[float, float]:
        self.found.append((dict(options), {name: t.clone() for name, t in subject.shared.items()}))
        self.private.append(subject.private)
        return 0.0, 0.0

    def peek(self, subject: Subject) -> tuple[float, float]:
        return 0.0, 0.0


def thief(side: str, own: int, protected: str = "p", seed: int = 0) -> Thief:
    """With so many tasks of his own, and the protected model unless the side is "without"."""
    names = (protected, *("a", "b", "partner")[:own])
    base, experts = triple(3, names)
    head = {name: {"head.weight": state["head.weight"]} for name, state in experts.items()}
    del base["head.weight"]
    if side == "without":
        del experts[protected]
    tasks: Any = dict.fromkeys(names)  # merges ask for no more than their names
    return Thief(base, experts, protected, tasks, dict.fromkeys(names, torch.nn.Linear(1, 1)), head, seed)


def near(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor], error: float = 1e-6) -> bool:
    return one.keys() == two.keys() and all(
        torch.allclose(one[name].double(), two[name].double(), rtol=0, atol=error) for name in one
    )


def summed(one: Thief, weights: Mapping[str, float]) -> State:
    """base + Σ weight · task vector, in float64."""
    found = {}
    for name, origin in one.base.items():
        total = origin.double()
        if origin.is_floating_point():
            for model, weight in weights.items():
                total = total + weight * (one.experts[model][name].double() - origin.double())
        found[name] = total
    return found


def partnered(one: Thief, kept: list[str]) -> dict[str, State]:
    """Some models as they are, and the others merged into one partner."""
    rest = [name for name in one.experts if name not in kept]
    partner = {name: t.float() for name, t in summed(one, dict.fromkeys(rest, PARTNER)).items()}
    return {**{name: dict(one.experts[name]) for name in kept}, "partner": partner}


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    with one_thread():
        yield


def test_the_shelf_has_every_method_of_mergekit() -> None:
    assert {name.removeprefix("mergekit:") for name in KIT} == set(TABLE)
    assert len(KIT) == 20
    ours = {
        "task_arithmetic",
        "full_dose",
        "ties",
        "iso_c",
        "tsv_m",
        "consensus",
        "tall_mask",
        "svd_truncated",
    }
    assert set(SHELF) - set(KIT) == ours | {"top_k", "projected"}


@pytest.mark.filterwarnings("ignore")  # of packages that merge
@pytest.mark.parametrize("own", [1, 2, 3])
@pytest.mark.parametrize("side", SIDES)
def test_every_merge_is_made_once_more_from_its_options(side: str, own: int) -> None:
    one = thief(side, own)
    for name, attack in SHELF.items():
        if side == "without" and not attack.alone:
            continue
        seen = Seen()
        few = {"without": own, "plain": own + 1}[side]
        least = TABLE[name.removeprefix("mergekit:")].least if name in KIT else 2 * (name == "consensus")
        if few < least:
            with pytest.raises(InputError, match=r"number of models|fewer models"):
                attack.explore(one, seen)
            continue
        attack.explore(one, seen)
        assert seen.found, name
        within_budget(attack, one, len(seen.found))
        texts = [json.dumps(options) for options, _ in seen.found]
        assert len(set(texts)) == len(texts), name
        for place in {0, len(texts) - 1}:
            again = attack.make(one, json.loads(texts[place]))
            assert same(again.shared, seen.found[place][1]), (name, texts[place])
        for (
            private
        ) in seen.private:  # the published heads of all tasks, also of those that he has no model of
            assert private.keys() == one.tasks.keys()
            for task in one.tasks:
                assert same(private[task], one.heads[task])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", [1, 2, 3])
@pytest.mark.parametrize("side", SIDES)
def test_mergekit_gets_the_right_models_and_weights(side: str, own: int) -> None:
    one = thief(side, own)
    models = list(one.experts)
    for name in ("linear", "task_arithmetic"):
        seen = Seen()
        SHELF[f"mergekit:{name}"].explore(one, seen)
        weights = [{model: a if model == "p" else b for model in models} for a, b in WEIGHTS]
        assert [options["weight"] for options, _ in seen.found] == [
            w for n, w in enumerate(weights) if w not in weights[:n]
        ]
        for options, merged in seen.found:
            total = sum(options["weight"].values()) if name == "linear" else 1.0
            want = summed(one, {model: weight / total for model, weight in options["weight"].items()})
            assert near(merged, want), (name, options)
    seen = Seen()
    SHELF["mergekit:passthrough"].explore(one, seen)
    single = one.experts["p"] if side == "plain" else one.experts["a"] if own == 1 else None
    want = single or partnered(one, [])["partner"]
    assert near(seen.found[0][1], {name: want[name] for name in one.base})
    seen = Seen()
    SHELF["mergekit:slerp"].explore(one, seen)
    pair = dict(one.experts) if len(models) <= 2 else partnered(one, [models[0]])
    for options, merged in seen.found:
        direct = merge_method("mergekit:slerp")(one.base, pair, **options).shared
        assert near(merged, direct), options
        assert not near(merged, {name: pair[models[0]][name] for name in one.base}, 1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_partner_is_none_of_the_tasks() -> None:
    """A task may be called partner: its model and its head stay what they are."""
    for one in (thief("plain", 2, protected="partner"), thief("plain", 3)):
        seen = Seen()
        SHELF["mergekit:nuslerp"].explore(one, seen)
        for options, _ in seen.found:
            assert list(options["weight"]) == [one.protected, "partner_"]
        assert same(seen.private[0]["partner"], one.heads["partner"])


@pytest.mark.parametrize("own", [1, 3])
@pytest.mark.parametrize("side", SIDES)
def test_grids_are_those_merge_methods(side: str, own: int) -> None:
    one = thief(side, own)
    others = [f"{name}" for name in one.experts if name != "p"]
    for name, points in (("task_arithmetic", [(x, x) for x in LAMBDAS]), ("full_dose", FULL_DOSE_GRID)):
        attack, seen = SHELF[name], Seen()
        attack.explore(one, seen)
        if side == "plain":
            assert [(o["dose"], o["others"]) for o, _ in seen.found] == list(points)
        else:
            assert [o["others"] for o, _ in seen.found] == list(dict.fromkeys(b for _, b in points))
        for options, merged in seen.found:
            weights = dict.fromkeys(others, options["others"])
            if side == "plain":
                weights["p"] = options["dose"]
            assert near(merged, summed(one, weights))
    if side == "plain":
        for dose, other in FULL_DOSE_GRID[::7]:
            direct = merge_method("full_dose")(one.base, one.experts, protected="p", dose=dose, others=other)
            mixed = SHELF["full_dose"].make(one, {"dose": dose, "others": other})
            assert near(direct.shared, mixed.shared)
    direct = merge_method("task_arithmetic")(one.base, one.experts, weight=0.3)
    options = {"others": 0.3} | ({"dose": 0.3} if side == "plain" else {})
    assert near(direct.shared, SHELF["task_arithmetic"].make(one, options).shared)


def test_the_probe_is_part_of_no_thief_without_the_model() -> None:
    assert not PROBE_MERGE.alone
    assert set(PROBE_MERGE.points) & set(FULL_DOSE_GRID)


@pytest.mark.filterwarnings("ignore")
def test_seeds_decide_what_is_drawn() -> None:
    for name in ("mergekit:dare_ties", "mergekit:della"):
        attack: Any = SHELF[name]
        options = attack.grid("p", ("a",))[0]
        first, again, other = thief("plain", 1), thief("plain", 1), thief("plain", 1, seed=1)
        made = attack.make(first, options).shared
        torch.rand(7)
        state = torch.random.get_rng_state()
        assert same(made, attack.make(again, options).shared)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not same(made, attack.make(other, options).shared)


def digest() -> str:
    """Of the merges that draw, for the test that makes them in another process."""
    import hashlib

    found = hashlib.sha256()
    for name in ("mergekit:dare_ties", "mergekit:dare_linear", "mergekit:della", "mergekit:della_linear"):
        attack: Any = SHELF[name]
        for options in attack.grid("p", ("a", "b"))[:2]:
            shared = attack.make(thief("plain", 2), options).shared
            for tensor in (shared[key] for key in sorted(shared)):
                found.update(tensor.double().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_process_draws_the_same() -> None:
    code = "import test_attacks_merges as t; print(t.digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.strip() == digest()


def test_one_point_that_fails_does_not_cost_the_others() -> None:
    grid = [{"protected": "p", "rank": rank} for rank in (0.5, 2.0, 0.1)]
    attack = Method("svd_truncated", "cut", lambda task, others: grid)
    seen = Seen()
    attack.explore(thief("plain", 1), seen)
    assert [options["rank"] for options, _ in seen.found] == [0.5, 0.1]
    broken = Method("svd_truncated", "cut", lambda task, others: grid[1:2])
    with pytest.raises(InputError, match="the rank is out of range"):
        broken.explore(thief("plain", 1), Seen())


def test_weights_that_cannot_be_decomposed_are_refused_in_words() -> None:
    one = thief("plain", 1)
    one.experts["p"]["body.0.up.weight"].fill_(torch.nan)
    with pytest.raises(InputError, match="does not converge"):
        SHELF["iso_c"].explore(one, Seen())


def test_all_of_makes_every_attempt() -> None:
    done: list[int] = []

    def attempt(number: int, error: Exception | None) -> None:
        done.append(number)
        if error is not None:
            raise error

    all_of(lambda n=n, e=e: attempt(n, e) for n, e in enumerate([RunError("one"), None, InputError("two")]))
    assert done == [0, 1, 2]
    with pytest.raises(RunError, match="first"):
        all_of(lambda e=e: attempt(9, e) for e in [RunError("first"), InputError("second")])
    with pytest.raises(UsageError):  # what is wrong with the call, not with the models
        all_of(lambda e=e: attempt(9, e) for e in [UsageError("no"), None])
    all_of([])


def test_coefficients_are_a_grid_by_value() -> None:
    """Two grids with the same points are the same attack: nothing else is in it."""
    one, two = (Coefficients("x", "y", ((0.5, 0.2),), alone=True) for _ in range(2))
    assert one == two
