"""The loop that a thief trains in: its rates, its gradients, and what a step is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import thief_cases
from thief_cases import OWN, PROTECTED, same
from unmergeable.attacks.training import sampler, supervised, train
from unmergeable.attacks.wide import fill
from unmergeable.audit.work import one_thread
from unmergeable.errors import InputError, RunError
from unmergeable.tasks.task import Examples

ONE = OWN[0]


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> thief_cases.Scene:
    return thief_cases.scene(thief_cases.write(tmp_path_factory.mktemp("training")), OWN[:1])


# --- the loop -------------------------------------------------------------------------------------------------


def line(steps: int, rate: float = 0.1, every: int = 1000, **more: Any) -> list[tuple[int, Any]]:
    """Training of one number towards 3, from 0."""
    state = {"w": torch.zeros(1), "n": torch.tensor(7), **more}

    def loss(weights: Any) -> torch.Tensor:
        total: torch.Tensor = ((weights["w"] - 3) ** 2).sum()
        return total

    return [
        (s, {k: v.clone() for k, v in w.items()})
        for s, w in train(state, loss, steps=steps, rate=rate, every=every)
    ]


def test_training_moves_floating_point_weights_alone() -> None:
    start = {"w": torch.zeros(1, dtype=torch.float16), "mask": torch.tensor([True, False])}
    (last,) = line(60, **start)
    assert last[0] == 60
    assert last[1]["w"].dtype == torch.float32
    assert float(last[1]["w"]) > 2
    assert int(last[1]["n"]) == 7
    assert last[1]["mask"].tolist() == [True, False]
    assert float(start["w"]) == 0.0  # what it began with is as it was


def test_the_rate_rises_and_falls_and_weights_are_yielded_on_the_way() -> None:
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    try:
        seen = [step for step, _ in line(50, every=20)]
    finally:
        hook.remove()
    assert seen == [20, 40, 50]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1, rel=1e-3)
    assert 3 <= peak <= 5
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 1e-5


@pytest.mark.parametrize("steps", [3, 5, 10, 11])
def test_a_few_steps_rise_and_fall_as_well(steps: int) -> None:
    (last,) = line(steps)
    assert last[0] == steps
    assert 0 < float(last[1]["w"]) < 3


def test_gradients_are_clipped_over_all_weights_together() -> None:
    norms: list[float] = []

    def look(optimizer: Any, *_: Any) -> None:
        squares = sum(float(w.grad.square().sum()) for w in optimizer.param_groups[0]["params"])
        norms.append(squares**0.5)

    hook = register_optimizer_step_pre_hook(look)
    try:
        state = {"a": torch.ones(3), "b": torch.ones(2)}
        for factor in (100.0, 0.01):
            for _ in train(
                state, lambda w, f=factor: f * (w["a"].sum() + 2 * w["b"].sum()), steps=3, rate=0.1, every=3
            ):
                pass
    finally:
        hook.remove()
    assert norms[:3] == pytest.approx([1.0] * 3, rel=1e-4)
    assert norms[3:] == pytest.approx([0.01 * (3 + 8) ** 0.5] * 3, rel=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_no_number_is_said(bad: float) -> None:
    calls: list[int] = []

    def loss(weights: Any) -> torch.Tensor:
        calls.append(1)
        value: torch.Tensor = weights["w"].sum() * (bad if len(calls) == 4 else 1.0)
        return value

    with pytest.raises(RunError, match="the loss is not finite") as caught:
        list(train({"w": torch.ones(2)}, loss, steps=20, rate=0.1, every=5))
    assert caught.value.where == "step 4"


# --- what a step is made of -----------------------------------------------------------------------------------


def test_batches_are_drawn_by_their_generator(scene: thief_cases.Scene) -> None:
    thief = scene.thief("plain")
    few = thief.unlabelled(PROTECTED, 100)
    draws = [
        sampler(thief, PROTECTED, few, torch.Generator().manual_seed(seed), price=5) for seed in (1, 1, 2)
    ]
    first, again, other = (draw() for draw in draws)
    assert len(first) == 64
    assert same(first.inputs, again.inputs)
    assert not same(first.inputs, other.inputs)
    assert thief.bill.forwards == 3 * 5 * 64
    assert not same(first.inputs, draws[0]().inputs)
    # Pictures are changed a little at random, their labels are not.
    assert not any(torch.equal(first.inputs["pixel_values"][0], one) for one in few.inputs["pixel_values"])
    small = few[:10]
    assert len(sampler(thief, PROTECTED, small, torch.Generator())()) == 10


def test_every_task_is_trained_under_its_head(scene: thief_cases.Scene) -> None:
    thief = scene.thief("plain")
    calls: list[str] = []

    def draw(task: str) -> Any:
        def batch() -> Examples:
            calls.append(task)
            return thief.unlabelled(task, 32)

        return batch

    state = thief.mixer.mix(dict.fromkeys(thief.experts, 0.4)).shared
    loss = supervised(thief, {task: draw(task) for task in thief.tasks}, thief.heads)(state)
    assert calls == [PROTECTED, ONE]
    want = 0.0
    for task in thief.tasks:
        found: Any = thief.tasks[task]
        module = thief.modules[task]
        fill(module, {**state, **thief.heads[task]})
        with torch.no_grad():
            want += float(found.loss(module, thief.unlabelled(task, 32)))
    assert float(loss) == pytest.approx(want, rel=1e-5)


def test_a_call_never_takes_what_a_module_was_left_with(scene: thief_cases.Scene) -> None:
    thief = scene.thief("plain")
    state = {name: t for name, t in thief.base.items() if "layers.1.mlp.fc1" not in name}
    with pytest.raises(InputError, match="lacks a tensor of its class") as caught:
        thief.call(PROTECTED, state)
    assert "layers.1.mlp.fc1" in str(caught.value.expected)
