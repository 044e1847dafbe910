"""Wide merges as an attack: one module a task, the same under every lock, and as large as it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import thief_cases
from thief_cases import CLASSES, OWN, PROTECTED
from unmergeable.attacks.merges import PROBE_MERGE
from unmergeable.attacks.thief import Thief
from unmergeable.attacks.wide import WITH_BASE, WITHOUT_BASE, Wide, fill
from unmergeable.audit.work import one_thread
from unmergeable.errors import InputError


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thief_cases.write(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> thief_cases.Scene:
    return thief_cases.scene(folder)


def outputs(scene: thief_cases.Scene, side: str, options: dict[str, object]) -> dict[str, torch.Tensor]:
    """Of the module of every task, on its own pictures, float64."""
    made = Wide().make(scene.thief(side), options)
    assert isinstance(made, dict)
    with torch.no_grad():
        return {
            task: made[task].double()(pixel_values=thief_cases.pictures(task, 20, 7)[0].double()).logits
            for task in made
        }


def test_every_weight_is_tried_and_made_once_more(plain: thief_cases.Scene) -> None:
    thief = plain.thief()
    explorer = plain.look(Wide(), thief)
    options = [look.options for look in explorer.looks]
    with_base = [{"dose": a, "others": b, "base": True} for a, b in WITH_BASE]
    assert options == [*with_base, *({"dose": a, "others": (1 - a) / 2, "base": False} for a in WITHOUT_BASE)]
    for look in explorer.looks:
        made = Wide().make(thief, json.loads(json.dumps(look.options)))
        assert plain.values(made, "screen") == (look.protected, look.own)


def test_it_beats_a_grid_of_plain_merges(plain: thief_cases.Scene) -> None:
    thief = plain.thief()
    wide = max(look.joint for look in plain.look(Wide(), thief).looks)
    assert wide > max(look.joint for look in plain.look(PROBE_MERGE, thief).looks)
    assert wide > 0.6


def test_heads_are_private_and_the_size_is_on_the_bill(plain: thief_cases.Scene) -> None:
    thief = plain.thief()
    options = {"dose": 0.5, "others": 0.3, "base": True}
    made = Wide().make(thief, options)
    assert isinstance(made, dict)
    assert list(made) == list(CLASSES)
    for task, module in made.items():
        head = plain.bench.heads[task if task in OWN else "plain"]
        state = module.state_dict()
        assert torch.equal(state["model.classifier.weight"], head["classifier.weight"])
        with torch.no_grad():
            logits = module(pixel_values=thief_cases.pictures(task, 3, 7)[0]).logits
        assert logits.shape == (3, CLASSES[task])
    size = max(module.size_ratio for module in made.values())
    assert thief.bill.size == size
    assert 3.8 < size < 4.0  # four models' blocks, one model's embeddings and head
    Wide().make(thief, {"dose": 0.5, "others": 0.25, "base": False})
    assert thief.bill.size == size  # the largest
    assert "base" in Wide().needs


def test_heads_of_one_shape_are_private_too(plain: thief_cases.Scene) -> None:
    """Two tasks with as many classes: nothing but that they are heads keeps them apart."""
    module, own = plain.bench.modules[PROTECTED], plain.bench.models
    random = torch.Generator().manual_seed(0)
    heads = {PROTECTED: dict(plain.bench.heads["plain"])}
    heads["twin"] = {name: torch.randn(t.shape, generator=random) for name, t in heads[PROTECTED].items()}
    body = {name: own[OWN[0]][name] for name in plain.bench.base}
    experts = {PROTECTED: own["plain"], "twin": {**body, **heads["twin"]}}
    tasks: Any = dict.fromkeys(heads)
    thief = Thief(plain.bench.base, experts, PROTECTED, tasks, dict.fromkeys(heads, module), heads)
    for base in (True, False):
        made = Wide().make(thief, {"dose": 0.5, "others": 0.5, "base": base})
        assert isinstance(made, dict)
        for task, head in heads.items():
            state = made[task].state_dict()
            assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in head.items())


def test_one_model_with_weight_one_is_that_model(plain: thief_cases.Scene) -> None:
    found = outputs(plain, "plain", {"dose": 1.0, "others": 0.0, "base": False})
    module = thief_cases.trained()[PROTECTED]
    with torch.no_grad():
        want = module(pixel_values=thief_cases.pictures(PROTECTED, 20, 7)[0]).logits
    assert torch.allclose(found[PROTECTED].float(), want, atol=1e-5)


def test_the_base_has_what_is_left_of_one(plain: thief_cases.Scene) -> None:
    """With all models alike it is that model, whatever the weights: they sum to one."""
    scene = plain
    before = dict(scene.bench.models)
    try:
        for role in scene.bench.models:
            scene.bench.models[role] = {**scene.bench.base, **scene.bench.heads[role]}
        found = outputs(scene, "plain", {"dose": 1.0, "others": 0.6, "base": True})
        fill(scene.bench.modules[PROTECTED], {**scene.bench.base, **scene.bench.heads["plain"]})
        with torch.no_grad():
            want = scene.bench.modules[PROTECTED](
                pixel_values=thief_cases.pictures(PROTECTED, 20, 7)[0]
            ).logits
        assert torch.allclose(found[PROTECTED].float(), want, atol=1e-5)
    finally:
        scene.bench.models.update(before)


@pytest.mark.parametrize("method", [pytest.param("exact", marks=pytest.mark.slow), "gauge"])
def test_no_lock_changes_what_it_computes(method: str, folder: Path) -> None:
    scene = thief_cases.scene(folder, model=thief_cases.locked(folder, method))
    assert scene.bench.distances["protected"] > 2 * scene.bench.distances["plain"]
    options = {"dose": 0.5, "others": 0.3, "base": True}
    found, want = outputs(scene, "protected", options), outputs(scene, "plain", options)
    for task in CLASSES:
        assert torch.allclose(found[task], want[task], rtol=0, atol=1e-4 * float(want[task].abs().max()))
    thief = scene.thief("protected")
    wide, plain = (max(look.joint for look in scene.look(one, thief).looks) for one in (Wide(), PROBE_MERGE))
    assert plain + 0.15 < wide


def test_weights_that_are_missing_are_named(plain: thief_cases.Scene) -> None:
    state = {name: t for name, t in plain.bench.models["plain"].items() if name != "vit.layernorm.bias"}
    with pytest.raises(InputError, match="lacks a tensor of its class") as caught:
        fill(plain.bench.modules[PROTECTED], state)
    assert caught.value.expected == "vit.layernorm.bias"
