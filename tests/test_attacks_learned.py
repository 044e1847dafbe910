"""Attacks with data: learnt coefficients, repair, un-trapping. What they find, make again, and put on the bill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import thief_cases
from thief_cases import CLASSES, OWN, PROTECTED, same
from unmergeable.attacks import coefficients, repair
from unmergeable.attacks.coefficients import Coefficients
from unmergeable.attacks.merges import PROBE_MERGE
from unmergeable.attacks.repair import Repair, Untrap
from unmergeable.attacks.thief import TRAIN, Thief, detached
from unmergeable.attacks.training import labelled
from unmergeable.audit.work import one_thread
from unmergeable.errors import InputError, RunError, UsageError
from unmergeable.merging.learned import GRANULARITIES, OBJECTIVES

ONE = OWN[0]  # the thief's only task here


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> thief_cases.Scene:
    """The protected model is spoilt in its first block; the plain one is not."""
    made = thief_cases.scene(thief_cases.write(tmp_path_factory.mktemp("learned")), OWN[:1])
    made.bench.models["protected"] = thief_cases.spoilt(made.bench, 0)
    return made


def grid(scene: thief_cases.Scene, side: str, dose: float, others: float) -> Any:
    options = {"dose": dose, "others": others}
    return detached(PROBE_MERGE.make(scene.thief(side), options))


def equal(one: Any, two: Any) -> bool:
    """Bit for bit, under the same heads."""
    assert one.private.keys() == two.private.keys()
    assert all(same(one.private[task], two.private[task]) for task in one.private)
    return same(one.shared, two.shared)


def relabelled(thief: Thief) -> Thief:
    """The same thief with wrong labels in all training examples."""
    tasks: dict[str, Any] = {}
    for name, task in thief.tasks.items():
        found: Any = task
        wrong = (found.training.labels + 1) % CLASSES[name]
        tasks[name] = replace(found, training=replace(found.training, labels=wrong))
    return replace(thief, tasks=tasks)


# --- learnt coefficients --------------------------------------------------------------------------------------


FAST = {("block", "labels"), ("row", "labels"), ("block", "entropy")}


@pytest.mark.parametrize(
    ("granularity", "objective"),
    [
        pytest.param(*both, marks=() if both in FAST else pytest.mark.slow)
        for both in product(GRANULARITIES, OBJECTIVES)
    ],
)
def test_coefficients_leave_out_what_is_spoilt(
    granularity: str, objective: str, scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coefficients, "STARTS", ((0.4, 0.4),))
    monkeypatch.setattr(coefficients, "STEPS", 30)
    attack, thief = Coefficients(granularity, objective), scene.thief("protected")
    (look,) = (explorer := scene.look(attack, thief)).looks
    before = scene.values(grid(scene, "protected", 0.4, 0.4), "screen")
    options, merged = scene.best(explorer)
    after = scene.values(merged)
    bad, good = thief_cases.dose(scene.bench, "protected", merged.shared, 0)
    # One coefficient of a model is for what is spoilt and what is not; one of every row has so many ways to be
    # sure of the answers that few of them are right.
    if granularity != "model" and (granularity, objective) != ("row", "entropy"):
        assert look.joint > min(before) + 0.1
        assert min(after) > 0.7
        assert bad < good - 0.1
    assert look.joint >= min(before)
    again = attack.make(scene.thief("protected"), json.loads(json.dumps(options)))
    assert equal(again, merged)


def test_a_start_is_of_the_protected_model_and_the_others(scene: thief_cases.Scene) -> None:
    for granularity in GRANULARITIES:
        attack = Coefficients(granularity, "labels")
        merged: Any = attack.make(scene.thief("protected"), {"start": [1.0, 0.2], "step": 0})
        want = grid(scene, "protected", 1.0, 0.2)
        assert all(torch.allclose(merged.shared[name], want.shared[name], atol=1e-6) for name in want.shared)
        alone: Any = attack.make(scene.thief("without"), {"start": [0.3, 0.3], "step": 0})
        own = scene.thief("without").mixer.mix({ONE: 0.3}).shared
        assert all(torch.allclose(alone.shared[name], own[name], atol=1e-6) for name in own)


def test_the_bill_of_coefficients(scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes one batch of every task: all that there is of each, here."""
    monkeypatch.setattr(coefficients, "STEPS", 10)
    thief = scene.thief("plain")
    explorer = scene.look(Coefficients("block", "labels"), thief)
    few = {PROTECTED: 16 * CLASSES[PROTECTED], ONE: 16 * CLASSES[ONE]}
    assert thief.bill.labelled == few
    assert thief.bill.inputs == {}
    starts, steps = 3, 10
    assert thief.bill.forwards == starts * steps * TRAIN * sum(few.values())
    assert len(explorer.looks) == starts
    screen = sum(len(index["screen"]) for index in scene.bench.index.values())
    assert explorer.forwards == starts * (1 + steps // 5 + 1) * screen
    assert len(explorer.kept) <= len(explorer.looks)


def test_entropy_never_sees_a_label(scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coefficients, "STEPS", 10)
    honest, wrong = scene.thief(), relabelled(scene.thief())
    for objective, blind in (("entropy", True), ("labels", False)):
        options = {"start": [0.4, 0.4], "step": 10}
        attack = Coefficients("tensor", objective)
        assert equal(attack.make(honest, options), attack.make(wrong, options)) == blind
    assert honest.bill.inputs == {PROTECTED: thief_cases.TRAIN, ONE: thief_cases.TRAIN}


def test_without_the_model_coefficients_are_of_his_own(
    scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coefficients, "STEPS", 20)
    attack, thief = Coefficients("row", "labels"), scene.thief("without")
    explorer = scene.look(attack, thief)
    assert [look.options["start"] for look in explorer.looks] == [[0.3, 0.3], [0.4, 0.4]]
    options, merged = scene.best(explorer)
    assert merged.private.keys() == {PROTECTED, ONE}  # heads are published
    assert equal(attack.make(scene.thief("without"), options), merged)
    for name, tensor in merged.shared.items():
        change = scene.bench.models[ONE][name] - scene.bench.base[name]
        assert torch.equal(tensor[change == 0], scene.bench.base[name][change == 0])


def test_a_start_that_diverges_does_not_cost_the_others(
    scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coefficients, "STEPS", 5)
    monkeypatch.setattr(coefficients, "STARTS", ((1e38, 1.0), (0.4, 0.4)))
    attack = Coefficients("model", "labels")
    (look,) = scene.look(attack, scene.thief()).looks
    assert look.options["start"] == [0.4, 0.4]
    monkeypatch.setattr(coefficients, "STARTS", ((1e38, 1.0),))
    with pytest.raises(RunError, match="the objective is not finite"):
        scene.look(attack, scene.thief())


def test_few_labels_come_in_random_order(scene: thief_cases.Scene) -> None:
    """A batch of a few classes alone makes every step forget the others."""
    thief = scene.thief()
    few = labelled(thief, PROTECTED, 16)
    assert len(few) == 64
    assert torch.bincount(few.labels).tolist() == [16, 16, 16, 16]
    assert all(len(set(few.labels[start : start + 16].tolist())) == 4 for start in (0, 16, 32, 48))
    assert torch.equal(few.labels, labelled(thief, PROTECTED, 16).labels)


def test_what_cannot_be_learnt_is_refused() -> None:
    for options in ({"granularity": "layer"}, {"objective": "loss"}):
        with pytest.raises(UsageError, match="no such coefficients"):
            coefficients.coefficients(**options)
    with pytest.raises(UsageError, match="a repair needs examples"):
        repair.repair(each=0)
    assert coefficients.coefficients() == Coefficients("row", "labels")
    assert repair.repair() == Repair(16)


def test_tasks_without_examples_are_named(scene: thief_cases.Scene) -> None:
    thief = scene.thief(starts=[({}, grid(scene, "plain", 0.4, 0.4))])
    bare: dict[str, Any] = {name: replace(task, training=None) for name, task in thief.tasks.items()}  # type: ignore[type-var]
    for attack in (Coefficients("row", "labels"), Coefficients("row", "entropy"), Repair(4), Untrap()):
        with pytest.raises(InputError, match="no examples for a thief to learn from") as caught:
            scene.look(attack, replace(thief, tasks=bare))
        assert caught.value.where == PROTECTED
        assert "train:" in str(caught.value.hint)


# --- repair ---------------------------------------------------------------------------------------------------


def test_a_repair_mends_a_broken_merge(scene: thief_cases.Scene) -> None:
    broken = grid(scene, "protected", 1.0, 0.3)
    assert min(scene.values(broken)) < 0.3
    thief = scene.thief("protected", starts=[({"attack": "full_dose"}, broken)])
    explorer = scene.look(Repair(16), thief)
    each = [(rate, step) for rate in repair.RATES for step in (20, 40, 60)]
    assert [(look.options["rate"], look.options["steps"]) for look in explorer.looks] == each
    options, merged = scene.best(explorer)
    assert min(scene.values(merged)) > 0.7
    assert thief.bill.labelled == {PROTECTED: 64, ONE: 48}
    assert thief.bill.forwards == len(repair.RATES) * repair.STEPS * TRAIN * (64 + 48)
    assert all(same(merged.private[task], head) for task, head in thief.heads.items())
    assert not [name for name in merged.shared if name.startswith("classifier")]
    again = Repair(16).make(thief, json.loads(json.dumps(options)))
    assert equal(again, merged)
    assert min(scene.values(broken)) < 0.3  # the start itself is as it was


def test_a_repair_without_the_model_mends_what_labels_alone_can(scene: thief_cases.Scene) -> None:
    start = detached(scene.thief("without").mixer.mix({ONE: 0.5}))
    thief = scene.thief("without", starts=[({}, start)])
    explorer = scene.look(Repair(4), thief)
    assert thief.bill.labelled == {PROTECTED: 16, ONE: 12}
    before = scene.values(thief.whole(start), "screen")
    assert max(look.joint for look in explorer.looks) > min(before) + 0.2
    assert equal(Repair(4).make(thief, scene.best(explorer)[0]), scene.best(explorer)[1])


def test_a_rate_that_diverges_does_not_cost_the_others(
    scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    thief = scene.thief(starts=[({}, grid(scene, "plain", 0.4, 0.4))])
    monkeypatch.setattr(repair, "RATES", (1e38, 3e-4))
    assert {look.options["rate"] for look in scene.look(Repair(4), thief).looks} == {3e-4}
    monkeypatch.setattr(repair, "RATES", (1e38,))
    with pytest.raises(RunError, match="the loss is not finite"):
        scene.look(Repair(4), thief)


# --- un-trapping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["protected", "without"])
def test_untrapping_is_training_and_then_merging(
    side: str, scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "STEPS", 30)
    thief = scene.thief(side)
    explorer = scene.look(Untrap(), thief)
    doses = repair.DOSES if thief.has else (0.0,)
    assert [look.options["start"] for look in explorer.looks] == [
        one for one in doses for _ in PROBE_MERGE.points
    ]
    options, _ = scene.best(explorer)
    merged = detached(Untrap().make(thief, json.loads(json.dumps(options))))
    assert equal(detached(Untrap().make(scene.thief(side), options)), merged)
    assert thief.bill.labelled == {PROTECTED: 64}
    assert thief.bill.forwards == len(doses) * repair.STEPS * TRAIN * 64  # trained once, however many merges
    untouched = scene.look(PROBE_MERGE, thief) if thief.has else None
    before = max(look.joint for look in untouched.looks) if untouched else 0.2
    assert max(look.joint for look in explorer.looks) > before
    assert all(same(merged.private[task], head) for task, head in thief.heads.items())
    # dose · (student − base) + others · their task vectors, with a student that moved on from where it began
    student = Untrap()._student(thief, options["start"])
    name = "vit.layers.1.mlp.fc1.weight"
    origin, own = scene.bench.base[name], scene.bench.models[ONE][name]
    want = origin + options["dose"] * (student[name] - origin) + options["others"] * (own - origin)
    assert torch.allclose(merged.shared[name], want, atol=1e-6)


def test_untrapping_begins_from_a_part_of_the_task_vector(
    scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "STEPS", 3)
    monkeypatch.setattr(repair, "RATES", (1e-9,))
    for side, doses in (("protected", repair.DOSES), ("without", (0.0,))):
        for dose in doses:
            thief = scene.thief(side)
            student = Untrap()._student(thief, dose)
            start = scene.thief("protected").mixer.mix({PROTECTED: dose}).shared
            assert all(torch.allclose(student[name], start[name], atol=1e-6) for name in start)


# --- on the embedded zoo --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_locked_model_of_the_embedded_zoo_is_repaired(tmp_path: Path) -> None:
    """A lock breaks the merge, and labels mend some of it."""
    scene = thief_cases.zoo_scene(tmp_path, "gauge")
    broken = grid(scene, "protected", 0.6, 0.3)
    assert min(scene.values(broken, "validation")) < 0.1
    thief = scene.thief("protected", starts=[({}, broken)])
    options, merged = scene.best(scene.look(Repair(16), thief))
    assert min(scene.values(merged, "validation")) > 0.25
    assert equal(Repair(16).make(thief, options), merged)
