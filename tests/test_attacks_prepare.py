"""Preparations: what they do to a model, what they say they need, and the known cases that they have to solve."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

import proof_check
from merging_models import nudged, transformer, triple
from test_families import CASES as FAMILIES
from test_families import name_of
from unmergeable.attacks import ATTACKS, NEEDS, Case, attack_named, dense, solve
from unmergeable.attacks.prepare import (
    BITS,
    COPIES,
    GROUP,
    NOISE,
    OTHER,
    PREPARATIONS,
    Preparation,
    noised,
    preparation,
    quantised,
)
from unmergeable.attacks.proof import CASES, SOLVED, Solved, prove
from unmergeable.audit.work import one_thread
from unmergeable.errors import InputError, UsageError
from unmergeable.options import declared
from unmergeable.prove.child import in_child

PROVEN = {one.name: one for one in PREPARATIONS if one.solves is not None}
# The form mixes up singular directions of nearly equal weight, as its documentation says, and a fine-tune always
# has some: on models that are no more than a few numbers wide it may come through.
WEAK = "align-canonical-svd"


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    """One thread of torch and of numpy: on small matrices two that wait for each other take ten times as long."""
    with one_thread(), threadpool_limits(1):
        yield


# --- the table ------------------------------------------------------------------------------------------------


def test_every_step_is_an_attack_that_takes_its_options() -> None:
    names = [one.name for one in PREPARATIONS]
    assert len(set(names)) == len(names)
    for one in PREPARATIONS:
        assert preparation(one.name) is one
        assert bool(one.steps) != (one.change is not None), one.name
        assert set(one.needs) <= set(NEEDS)
        assert one.solves is None or one.solves in CASES
        assert one.access == max([attack_named(name).access for name, _ in one.steps], default=1)
        for name, options in one.steps:
            assert name in ATTACKS
            for option, value in options.items():
                known = declared(attack_named(name).run)[option]
                assert type(value).__name__ in known.kinds, (one.name, option)
    assert set(CASES) == {one.solves for one in PROVEN.values()}
    with pytest.raises(UsageError, match="no such preparation"):
        preparation("anchor")


def test_needs_are_what_is_used() -> None:
    """Whoever aligns to another fine-tune needs one; to the base, the base."""
    for one in PREPARATIONS:
        if one.steps:
            assert one.needs == (("experts",) if one.anchor == OTHER else ("base",)), one.name
            for name, _ in one.steps:
                assert set(attack_named(name).needs) <= {"anchor", "base"}
    assert {one.name: one.needs for one in PREPARATIONS if one.change} == {
        **dict.fromkeys((f"quantise-{bits}" for bits in BITS), ()),
        "noise": ("base",),
    }


def test_what_keeps_the_function() -> None:
    kept = {one.name for one in PREPARATIONS if one.keeps_function}
    assert kept == {name for name in PROVEN if name != "anchor-independent"}


# --- rounding and noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "levels"), [(8, 255), (4, 15)])
def test_quantising_by_rows_and_groups(bits: int, levels: int) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 64), "odd": (3, 40), "stack": (2, 3, 64), "kernel": (4, 2, 3, 3), "bias": (64,)}
    model = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    model |= {"zeros": torch.zeros(2, 64), "steps": torch.tensor(3), "half": model["matrix"].half()}
    model["matrix"][0, 3] = 50.0  # an outlier costs its own group or row alone
    base = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    head = {"head": torch.randn(3, 64, generator=random)}
    found = quantised({**model, **head}, base, 0, bits=bits)
    for name in ("bias", "steps", "zeros"):
        assert torch.equal(found[name], model[name])
    assert torch.equal(found["head"], head["head"])  # never merged: it is published as it is
    assert found["half"].dtype == torch.float16
    for name, rows in (("matrix", 3), ("odd", 3), ("stack", 6), ("kernel", 4)):
        values, before = found[name].reshape(rows, -1), model[name].reshape(rows, -1)
        width = GROUP if bits == 4 and before.shape[1] % GROUP == 0 else before.shape[1]
        for new, old in zip(values.reshape(-1, width), before.reshape(-1, width), strict=True):
            scale = float(old.abs().max()) / (levels // 2)
            steps = new / scale
            assert torch.allclose(steps, steps.round(), atol=1e-3)
            assert float((new - old).abs().max()) <= 0.5001 * scale
            assert float(new.abs().max()) == pytest.approx(float(old.abs().max()))
            assert len(new.unique()) <= levels
    again = quantised({**found, **head}, base, 7, bits=bits)
    assert all(torch.allclose(again[name].float(), found[name].float(), atol=1e-6) for name in found)


def test_noise_has_its_size_and_a_stream_for_every_tensor() -> None:
    base, experts = triple(1, ("p",), size=0.3)
    wide = {"wide.weight": torch.zeros(200, 300)}
    base, model = {**base, **wide}, {**experts["p"], "wide.weight": torch.full((200, 300), 0.5)}
    found = noised(model, base, 4)
    back = noised(dict(reversed(model.items())), dict(reversed(base.items())), 4)
    assert list(found) == list(model)
    assert all(torch.equal(found[name], back[name]) for name in found)
    assert not torch.equal(noised(model, base, 5)["wide.weight"], found["wide.weight"])
    noise = found["wide.weight"] - 0.5
    assert float(noise.std()) == pytest.approx(NOISE * 0.5 / COPIES**0.5, rel=0.02)
    for name, tensor in model.items():
        fixed = name == "head.weight" or not tensor.is_floating_point()
        assert torch.equal(found[name], tensor) == fixed, name
    one = found["body.0.down.weight"] - model["body.0.down.weight"]
    two = found["body.1.down.weight"] - model["body.1.down.weight"]
    assert float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]) < 0.5
    same = noised(base, base, 4)
    assert all(torch.equal(same[name], base[name]) for name in base)  # no change, no noise


# --- known cases ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """By family, a tiny base and two fine-tunes of it."""
    found = {}
    for kind in ("vit", "llama", "gpt2"):
        root, base = tmp_path_factory.mktemp(kind), transformer(kind)
        found[kind] = {name: root / name for name in ("base", "plain", "other")}
        for number, path in enumerate(found[kind].values()):
            made: Any = nudged(base, number, 0.02) if number else base
            made.save_pretrained(path)
    return found


def proof(one: Preparation, paths: dict[str, Path]) -> Solved:
    return prove(one, paths["plain"], paths["other" if one.anchor == OTHER else "base"], 0)


@pytest.mark.parametrize("kind", ["vit", "llama", "gpt2"])
@pytest.mark.parametrize("name", PROVEN)
def test_every_preparation_solves_its_case(name: str, kind: str, models: dict[str, dict[str, Path]]) -> None:
    found = proof(PROVEN[name], models[kind])
    assert found.case == PROVEN[name].solves
    assert found.locked > 4
    assert found.to_anchor < 0.5
    assert found.holds != (name == WEAK)
    assert (found.reason is None) == found.holds
    assert found.as_dict() == {**dataclasses.asdict(found), "holds": found.holds}


# What each solves beyond its own case, and what not. Known locks differ in which attack they take.
ALSO = {
    "anchor-coupled": ("orders", "rotations", "dense", "gauge"),
    "anchor-coupled-other": ("orders", "rotations", "dense", "gauge"),
    "align-permutation": ("orders",),
    "align-procrustes": ("orders", "rotations"),
    "align-canonical-polar": ("orders", "rotations", "dense"),
    "anchor-independent": (),
}


@pytest.mark.parametrize("name", ALSO)
def test_no_case_is_solved_by_an_attack_that_it_is_too_hard_for(
    name: str, models: dict[str, dict[str, Path]]
) -> None:
    """On a model with rotary positions: there a gauge lock does something at every site that orders cannot undo."""
    solved = [
        case
        for case in ("orders", "rotations", "dense", "gauge")
        if proof(dataclasses.replace(PROVEN[name], solves=case), models["llama"]).holds
    ]
    assert tuple(solved) == ALSO[name]


def test_what_stays_locked_is_not_believed(models: dict[str, dict[str, Path]]) -> None:
    idle = Preparation(
        "idle", "nothing at all", (), (("substitute-blocks", {"blocks": (0,)}),), solves="gauge"
    )
    found = proof(idle, models["vit"])
    assert not found.holds
    assert found.reason is not None
    assert found.reason.startswith("a known lock (gauge) is not undone: ")
    assert f"{found.locked:.2f} before" in found.reason


def test_weakened_attacks_are_not_believed(
    models: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the solves that make it strong, an attack fails on the case that it claims."""
    strong = {name: proof(PROVEN[name], models["vit"]).attacked for name in PROVEN}

    def idle(*sides: Any, **_: Any) -> Any:
        return np.broadcast_to(np.eye(sides[0].gram.shape[1]), sides[0].gram.shape)

    with monkeypatch.context() as patch:
        patch.setattr(solve, "general_linear", idle)
        for name in ("anchor-coupled", "anchor-coupled-other"):
            weak = proof(PROVEN[name], models["vit"])
            assert not weak.holds
            assert weak.attacked > 3 * strong[name]
    with monkeypatch.context() as patch:
        patch.setattr(solve, "procrustes", idle)
        assert not proof(PROVEN["align-procrustes"], models["vit"]).holds
    with monkeypatch.context() as patch:
        patch.setattr(solve.rows, "pair_rows", lambda pairs, **_: solve.rows.identity(*pairs[0][1].shape[:2]))
        assert not proof(PROVEN["align-permutation"], models["vit"]).holds
    with monkeypatch.context() as patch:  # no steps beyond the closed forms: they are good starts
        patch.setattr(dense, "ITERATIONS", 0)
        assert strong["anchor-coupled"] < proof(PROVEN["anchor-coupled"], models["vit"]).attacked <= SOLVED


def test_a_published_attack_has_to_come_nearer_and_no_more() -> None:
    """It does not keep the function, so that there is nothing that it could bring back."""
    assert Solved("published", 8.0, 3.0, 0.4).holds
    assert not Solved("published", 8.0, 0.1, 0.6).holds
    assert (
        Solved("published", 8.0, 3.0, 0.6).reason
        == "on a known lock it keeps 60% of the distance to the anchor"
    )
    assert not Solved("dense", 8.0, 0.6, 0.1).holds
    assert Solved("dense", 8.0, 0.5, 0.1).holds


def test_the_attack_never_sees_the_fine_tune(
    models: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the locked model and the anchor, by the names of the sites; the key and the true weights it does not."""
    seen: list[Case] = []
    chosen: Any = attack_named("anchor-coupled")

    def run(case: Case, **options: Any) -> Any:
        seen.append(case)
        return chosen.run(case, **options)

    monkeypatch.setattr(
        "unmergeable.attacks.proof.attack_named", lambda _: dataclasses.replace(chosen, run=run)
    )
    found = proof(PROVEN["anchor-coupled"], models["vit"])
    (case,) = seen
    assert case.anchor is not None
    far = sum(float(((case.target[n] - case.anchor[n]) ** 2).sum()) for n in case.match.parts) ** 0.5
    plain = sum(float((case.anchor[n] ** 2).sum()) for n in case.match.parts) ** 0.5
    assert far > 0.5 * plain  # locked
    assert set(case.target) == set(case.match.parts)
    assert found.holds


def test_seeds_lock_differently(models: dict[str, dict[str, Path]]) -> None:
    one = PROVEN["align-permutation"]
    paths = models["vit"]["plain"], models["vit"]["base"]
    first, again, other = (prove(one, *paths, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.locked != other.locked


def test_models_that_do_not_differ_measure_nothing(models: dict[str, dict[str, Path]]) -> None:
    paths = models["vit"]
    with pytest.raises(InputError, match="there is no distance to measure by"):
        prove(PROVEN["anchor-coupled"], paths["base"], paths["base"], 0)
    with pytest.raises(InputError):
        prove(PROVEN["anchor-coupled"], paths["plain"], models["gpt2"]["base"], 0)


def test_a_model_that_cannot_be_locked_is_refused(
    models: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups may be too small to hide anything: then there is no known case, and no claim that failed."""
    monkeypatch.setattr("unmergeable.methods.context.MIN_MOVE", 10.0)
    with pytest.raises(InputError, match="no lock can be made of this model") as caught:
        proof(PROVEN["align-permutation"], models["vit"])
    assert "too small to hide anything" in str(caught.value.got)


def test_the_embedded_zoo() -> None:
    from unmergeable import zoo

    paths = {
        "base": zoo.model_path("base"),
        "plain": zoo.model_path("fashion"),
        "other": zoo.model_path("digits"),
    }
    for name, one in PROVEN.items():
        if name != "anchor-coupled-other":  # seconds: see below
            found = proof(one, paths)
            assert found.holds != (name == WEAK), name
            assert found.case != "gauge" or found.attacked < 0.15


@pytest.mark.slow
def test_the_embedded_zoo_by_another_fine_tune() -> None:
    from unmergeable import zoo

    found = prove(PROVEN["anchor-coupled-other"], zoo.model_path("fashion"), zoo.model_path("digits"), 0)
    assert found.holds
    assert found.attacked < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES, ids=name_of)
def test_every_shipped_family(case: tuple[str, str, dict[str, Any], str], tmp_path: Path) -> None:
    architecture, model_type, fields, _ = case
    config = {"model_type": model_type, "architectures": [architecture], **fields}
    for name, found in in_child(proof_check.solved, config, str(tmp_path)).items():
        assert isinstance(found, dict), (name, found)
        assert found["holds"] or name == WEAK, (name, found)
