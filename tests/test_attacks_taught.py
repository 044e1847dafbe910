"""Attacks on unlabelled inputs: distillation, RegMean, Fisher."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import thief_cases
from thief_cases import CLASSES, OWN, PROTECTED, same
from unmergeable.attacks import distil, informed
from unmergeable.attacks.distil import TARGETS, Distil
from unmergeable.attacks.informed import WEIGHTS, Fisher, RegMean, normalised
from unmergeable.attacks.merges import PROBE
from unmergeable.attacks.thief import TRAIN, Thief
from unmergeable.audit.work import one_thread
from unmergeable.errors import InputError, UsageError
from unmergeable.merging import Merged, merge_method
from unmergeable.merging.statistics import REDUCTIONS, fisher_information, grams
from unmergeable.tasks.task import Examples

ONE = OWN[0]


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thief_cases.write(tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module")
def scene(folder: Path) -> thief_cases.Scene:
    """The protected model is the plain one under a gauge lock."""
    return thief_cases.scene(folder, OWN[:1], thief_cases.locked(folder, "gauge"))


def changed(thief: Thief, **changes: Any) -> Thief:
    """The same thief with other fields of all tasks."""
    tasks: dict[str, Any] = {}
    for name, task in thief.tasks.items():
        found: Any = task
        tasks[name] = replace(found, **{field: value(name, found) for field, value in changes.items()})
    return replace(thief, tasks=tasks)


def wrong(name: str, task: Any) -> Examples:
    return replace(task.training, labels=(task.training.labels + 1) % CLASSES[name])


# --- distillation ---------------------------------------------------------------------------------------------


SLOW = [pytest.param(target, marks=pytest.mark.slow) for target in ("soft-1", "soft-4", "hard")]


@pytest.mark.parametrize("target", ["soft-2", "features", *SLOW])
def test_every_target_teaches_what_a_locked_model_answers(
    target: str, scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "STEPS", 120)
    attack, thief = Distil(target, False), scene.thief("protected")
    explorer = scene.look(attack, thief)
    assert [(look.options["dose"], look.options["others"]) for look in explorer.looks] == list(PROBE)
    assert thief.bill.inputs == {PROTECTED: thief_cases.TRAIN}
    assert thief.bill.labelled == {}
    assert thief.bill.forwards == distil.STEPS * 64 * (TRAIN + 1)
    options, _ = scene.best(explorer)
    student: Any = attack.make(thief, {"dose": 1.0, "others": 0.0})
    assert scene.values(student)[0] > 0.6
    # The student is a fine-tune of the base; the lock moved the teacher much further away.
    far = {role: scene.bench.distances[role] for role in ("plain", "protected")}
    assert thief_cases.distance(scene.bench.base, student.shared) < 1.5 * far["plain"] < far["protected"]
    again = scene.thief("protected")
    own = again.mixer.mix({ONE: options["others"]})
    merged = {
        name: tensor + options["dose"] * (student.shared[name] - scene.bench.base[name])
        for name, tensor in own.shared.items()
    }
    assert thief.bill.forwards == distil.STEPS * 64 * (TRAIN + 1)  # one student, however many merges
    best = max(look.joint for look in explorer.looks)
    assert min(scene.values(again.whole(Merged(merged)), "screen")) == pytest.approx(best, abs=0.05)
    assert best > 0.4


def test_losses_of_all_temperatures_pull_alike(scene: thief_cases.Scene) -> None:
    """The gradient for T is about as large as for 1, and nothing pulls where both answer the same."""
    random = torch.Generator().manual_seed(0)
    batch = scene.thief("plain").unlabelled(PROTECTED, 32)
    taught: Any = scene.bench.tasks[PROTECTED]
    wanted = torch.randn(32, 4, generator=random)

    def pull(target: str, begin: torch.Tensor) -> float:
        logits = begin.clone().requires_grad_()
        answers: Any = [lambda found=found, **_: SimpleNamespace(logits=found) for found in (wanted, logits)]
        loss = Distil(target, False)._loss(taught, *answers, batch)
        (gradient,) = torch.autograd.grad(loss, logits)
        return float(gradient.norm())

    sizes = [pull(f"soft-{t:g}", torch.zeros(32, 4)) for t in distil.TEMPERATURES]
    assert max(sizes) < 1.5 * min(sizes)
    assert all(pull(f"soft-{t:g}", wanted) < 1e-6 for t in distil.TEMPERATURES)
    assert pull("hard", wanted) > 0.01


def test_a_lock_changes_no_student(scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the teacher its answers alone are used: what a lock does to its weights is all the same."""
    monkeypatch.setattr(distil, "STEPS", 15)
    for target in ("soft-2", "hard", "features"):
        for foreign in (False, True):
            attack = Distil(target, foreign)
            locked, plain = (attack._student(scene.thief(side)) for side in ("protected", "plain"))
            moved = thief_cases.distance(scene.bench.base, plain)
            assert moved > 0.003
            assert thief_cases.distance(plain, locked) < 0.02 * moved, (target, foreign)


def test_the_student_has_the_head_that_is_published(
    scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "STEPS", 5)
    thief = scene.thief("protected")
    student = Distil("soft-1", False)._student(thief)
    assert student.keys() == scene.bench.base.keys()
    assert not [name for name in student if name.startswith("classifier")]
    merged = Distil("soft-1", False).make(thief, {"dose": 1.0, "others": 0.45})
    assert all(same(merged.private[task], thief.heads[task]) for task in (PROTECTED, ONE))  # type: ignore[union-attr]


def test_targets_differ_and_labels_are_never_seen(
    scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "STEPS", 5)
    blind = changed(scene.thief("protected"), training=wrong)
    found = []
    for foreign in (False, True):
        for target in TARGETS:
            student = Distil(target, foreign)._student(scene.thief("protected"))
            assert same(student, Distil(target, foreign)._student(blind)), (target, foreign)
            assert not any(same(student, other) for other in found)
            found.append(student)


def test_foreign_inputs_need_none_of_the_protected_task(
    scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "STEPS", 5)
    bare = changed(
        scene.thief("protected"), training=lambda name, task: None if name == PROTECTED else task.training
    )
    Distil("soft-2", True)._student(bare)
    assert bare.bill.inputs == {ONE: thief_cases.TRAIN}
    with pytest.raises(InputError, match="no examples for a thief to learn from"):
        Distil("soft-2", False)._student(bare)


class Silent(torch.nn.Module):
    """A model that answers and gives nothing else away."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.vit, self.classifier = module.vit, module.classifier

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> Any:
        hidden = self.vit(pixel_values=pixel_values).last_hidden_state[:, 0]
        return SimpleNamespace(logits=self.classifier(hidden))


def test_features_need_hidden_states(scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "STEPS", 5)
    thief = scene.thief("protected")
    silent = {task: Silent(module) for task, module in thief.modules.items()}
    thief = replace(thief, modules=silent)
    with pytest.raises(InputError, match="gives no hidden states") as caught:
        scene.look(Distil("features", False), thief)
    assert caught.value.where == PROTECTED
    student = Distil("soft-2", False)._student(thief)
    assert same(student, Distil("soft-2", False)._student(scene.thief("protected")))


def test_features_are_asked_for_with_all_that_a_call_needs(
    scene: thief_cases.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments that are the same for all examples reach the model for every target."""
    monkeypatch.setattr(distil, "STEPS", 5)
    asked: list[dict[str, Any]] = []
    thief = changed(scene.thief("protected"), constants=lambda name, task: {"interpolate_pos_encoding": True})
    module = thief.modules[PROTECTED]
    handle = module.register_forward_pre_hook(
        lambda _, __, given: asked.append(dict(given)), with_kwargs=True
    )
    try:
        Distil("features", False)._student(thief)
    finally:
        handle.remove()
    assert asked
    assert all(given["interpolate_pos_encoding"] and given["output_hidden_states"] for given in asked)


def test_answers_that_are_none() -> None:
    with pytest.raises(UsageError, match="no such answers") as caught:
        distil.distil(answers="soft-3")
    assert caught.value.got == "soft-3"
    assert distil.distil(foreign=True) == Distil("soft-2", True)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fisher information of fewer inputs: a gradient for every class of each takes its time."""
    assert Fisher.count == informed.FISHER_INPUTS
    monkeypatch.setattr(Fisher, "count", 12)


# --- statistics -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few")
def test_statistics_are_of_the_model_and_not_of_what_the_module_holds(scene: thief_cases.Scene) -> None:
    """All tasks share one kind of module, in which the last merge may still lie."""
    thief = scene.thief("plain")
    for module in thief.modules.values():
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
    regmean, fisher = RegMean(), Fisher()
    found, known = regmean._statistics(thief), fisher._statistics(thief)
    for task in (PROTECTED, ONE):
        own = thief_cases.trained()[task]
        run: Any = lambda batch, own=own: own(**batch.inputs).logits  # noqa: E731
        inputs = thief.unlabelled(task, informed.INPUTS)
        fresh = grams(own, run, inputs.batches(64))
        assert found[task].keys() == fresh.keys()
        for name, gram in fresh.items():
            assert torch.allclose(found[task][name].matrix, gram.matrix, rtol=1e-5, atol=1e-5)
        few = thief.unlabelled(task, fisher.count)
        direct = fisher_information(own, run, few.batches(1))
        body = {name: direct[name] for name in direct if name in thief.base}
        expected = normalised(body)
        assert known[task].keys() == expected.keys()
        # Two runs of one computation may differ in the last bits, which some processors' kernels choose by alignment.
        assert all(torch.allclose(known[task][name], expected[name], rtol=1e-5) for name in expected)
    assert thief.bill.forwards == 2 * thief_cases.TRAIN + sum(
        fisher.count * (1 + (TRAIN - 1) * CLASSES[task]) for task in (PROTECTED, ONE)
    )


@pytest.mark.usefixtures("few")
def test_informed_merges_are_those_of_the_methods(scene: thief_cases.Scene) -> None:
    for side in ("plain", "without"):
        thief = scene.thief(side)
        regmean, fisher = RegMean(), Fisher()
        looks = scene.look(regmean, thief).looks
        assert [look.options for look in looks] == [{"reduction": one} for one in REDUCTIONS]
        assert [look.options["weight"] for look in scene.look(fisher, thief).looks] == (
            list(WEIGHTS) if thief.has else [1.0]
        )
        made = regmean.make(thief, json.loads(json.dumps(looks[0].options)))
        grammed = {task: regmean._statistics(thief)[task] for task in thief.experts}
        direct = merge_method("regmean")(thief.base, thief.experts, grams=grammed, reduction=REDUCTIONS[0])
        assert same(made.shared, direct.shared)  # type: ignore[union-attr]
        weights = {task: 4.0 if task == PROTECTED else 1.0 for task in thief.experts}
        known = fisher._statistics(thief)
        direct = merge_method("fisher")(thief.base, thief.experts, fishers=known, weight=weights)
        assert same(fisher.make(thief, {"weight": 4.0}).shared, direct.shared)


@pytest.mark.usefixtures("few")
def test_statistics_are_gathered_once_a_thief_and_forgotten_with_him(scene: thief_cases.Scene) -> None:
    for attack in (RegMean(), Fisher()):
        one, two = scene.thief("plain"), scene.thief("protected")
        first = attack._statistics(one)
        spent = one.bill.forwards
        assert attack._statistics(one) is first
        assert one.bill.forwards == spent > 0
        second = attack._statistics(two)
        name = "vit.layers.0.mlp.fc2.weight"  # a lock changes what its rows see, and what it depends on
        a, b = (
            getattr(found[PROTECTED][name], "matrix", found[PROTECTED][name]) for found in (first, second)
        )
        assert not torch.allclose(a, b, rtol=1e-3)
        assert attack._statistics(one) is first
        gone = weakref.ref(one)
        del one
        gc.collect()
        assert gone() is None  # the attack outlives every thief, and keeps none of them in memory


@pytest.mark.usefixtures("few")
def test_statistics_need_no_labels(scene: thief_cases.Scene) -> None:
    honest, blind = scene.thief("plain"), changed(scene.thief("plain"), training=wrong)
    for attack, options in ((RegMean(), {"reduction": 0.5}), (Fisher(), {"weight": 1.0})):
        one, two = (attack.make(thief, options).shared for thief in (honest, blind))  # type: ignore[union-attr]
        assert same(one, two)
    assert honest.bill.labelled == {}
    assert honest.bill.inputs == {PROTECTED: thief_cases.TRAIN, ONE: thief_cases.TRAIN}


@pytest.mark.usefixtures("few")
def test_a_model_that_is_unsure_does_not_take_over(scene: thief_cases.Scene) -> None:
    """Fisher information of all models is of one size, whatever the temperature of their answers."""
    thief = scene.thief("plain")
    known = Fisher()._statistics(thief)
    for found in known.values():
        squares = sum(float(tensor.double().square().sum()) for tensor in found.values())
        assert squares / sum(tensor.numel() for tensor in found.values()) == pytest.approx(1.0)
    louder = {name: 8 * tensor for name, tensor in known[ONE].items()}
    assert all(torch.allclose(normalised(louder)[name], known[ONE][name]) for name in louder)
    assert normalised({"a": torch.zeros(2)})["a"].tolist() == [0.0, 0.0]


# --- tasks that teach nothing ---------------------------------------------------------------------------------


def test_a_task_that_scores_by_itself_teaches_nothing(scene: thief_cases.Scene) -> None:
    from unmergeable.tasks.function import FunctionTask

    thief = scene.thief("protected")
    own = FunctionTask(PROTECTED, "python", "score", "0", 2, lambda *_: [0.0], "f.py:f", 10)
    thief = replace(thief, tasks={**thief.tasks, PROTECTED: own})
    for attack in (Distil("soft-2", True), Distil("hard", False), RegMean()):
        with pytest.raises(InputError, match="a function of its own has no inputs") as caught:
            scene.look(attack, thief)
        assert caught.value.where == PROTECTED
