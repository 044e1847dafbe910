"""A strength that follows what merges keep, and the options that came with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hardened
from hardened import PROTECTED
from test_harden_objectives import step
from unmergeable.errors import InputError, UsageError
from unmergeable.harden import search as search_module
from unmergeable.harden import strength as strength_module
from unmergeable.harden import train as train_module
from unmergeable.harden.defaults import MAY
from unmergeable.harden.objectives import Plain, Trap
from unmergeable.harden.strength import WHOLE, WIDEST, Ends, Strength
from unmergeable.merging.tensors import load_state
from unmergeable.tasks.task import TensorTask

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fresh_accelerate")]


def harden(models: Path, dst: Path, **changes: Any) -> Any:
    """A few steps."""
    return hardened.harden(models, dst, **({"steps": 6, "batch": 32, "rate": 3e-4} | changes))


# --- the rule ------------------------------------------------------------------------------------------------


def test_it_rises_while_merges_keep_too_much_and_falls_after() -> None:
    strength = Strength(0.1, 0.2)
    for _ in range(20):
        strength.follow([0.5, 0.5], 1.0)
    high = strength.value
    assert strength.kept == pytest.approx(0.5, abs=0.02)
    assert high > 0.2
    for _ in range(60):
        strength.follow([-0.25, -5.0], 1.0)  # less than the base knows counts as nothing
    assert strength.kept == pytest.approx(0.0, abs=1e-3)
    assert strength.value < 0.5 * high


def test_it_does_not_rise_at_the_cost_of_the_fine_tune() -> None:
    strength = Strength(0.1, 0.2)
    for _ in range(60):
        strength.follow([1.0], 2 / 3)
    assert strength.worth == pytest.approx(2 / 3, abs=0.01)
    assert strength.value < 0.1


@pytest.mark.parametrize("may", [0.02, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("looks", [1, 240])
def test_bursts_do_not_lower_it(may: float, looks: int) -> None:
    """Some merges keep everything and most keep nothing: on average half as much again as they may."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(20):
        strength = Strength(0.3, may, looks)
        for _ in range(120):
            strength.follow((random.random(2) < 1.5 * may).astype(float), 1.0)
        found.append(strength.value)
    assert np.exp(np.mean(np.log(found))) > 0.3


@pytest.mark.parametrize("looks", [60, 180, 600])
@pytest.mark.parametrize("whole", [2.5, WHOLE])
def test_a_long_training_rises_as_far_as_a_short_one(looks: int, whole: float) -> None:
    strength = Strength(0.1, 0.2, looks, whole)
    for _ in range(looks):
        strength.follow([0.5], 1.0)  # three eighths of the way from what they may keep to all
    # The running mean begins at 1: the first few looks take it for more, by half a look's at most and so many looks.
    more = 0.5 / (1 - 0.2) * 4 * whole / looks
    assert 3 / 8 * whole <= np.log(strength.value / 0.1) <= 3 / 8 * whole + more + 1e-9
    high = strength.value
    for _ in range(looks):
        strength.follow([0.1], 1.0)
    assert -whole / 4 <= np.log(strength.value / high) <= -whole / 4 * (1 - 20 / looks)


def test_at_its_bound_it_says_so() -> None:
    strength = Strength(0.1, 0.2)
    assert not strength.bound
    for _ in range(100):
        strength.follow([1.0], 1.0)
    assert strength.bound
    assert strength.value == pytest.approx(0.1 * WIDEST)
    assert not Strength(0.1).bound


def test_without_a_bound_it_stays() -> None:
    strength = Strength(0.1)
    for kept in (0.0, 5.0, -3.0):
        strength.follow([kept], 0.2)
    assert strength.value == 0.1


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-1e6, 1e6)), max_size=60), st.floats(0.01, 0.99))
def test_it_stays_within_its_limits_and_can_be_had_again(
    steps: list[tuple[float, float]], may: float
) -> None:
    one = Strength(0.1, may)
    for kept, worth in steps:
        one.follow([kept], worth)
        assert 0.1 / WIDEST <= one.value <= 0.1 * WIDEST
        assert 0 <= one.kept <= 1
    two = Strength(0.1, may)
    two.load(one.state())
    for strength in (one, two):
        strength.follow([0.3], 1.0)
    assert one.state() == two.state()


# --- what it follows -----------------------------------------------------------------------------------------


def texts(seed: int = 0) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """Losses of a base and of its fine-tune on 200 texts that differ much more than the two do."""
    random = np.random.default_rng(seed)
    base = random.normal(2.8, 0.7, 200)
    return random, base, base - random.normal(0.4, 0.1, 200)


def test_looks_are_compared_on_their_own_examples() -> None:
    """Whatever examples a look has, an unharmed fine-tune is worth 1, and the base keeps nothing."""
    random, base, fine = texts()
    ends = Ends((-base, -fine), (base, fine))
    for _ in range(20):
        index = random.permutation(200)[:16].tolist()
        assert ends.worth(-fine[index], fine[index], index) == pytest.approx(1)
        assert ends.worth(-base[index], base[index], index) == pytest.approx(0, abs=0.3)
        assert ends.kept(-base[index], index) == pytest.approx(0)
        assert ends.kept(-fine[index], index) == pytest.approx(1, abs=0.3)


def test_the_strength_of_an_unharmed_text_model_rises() -> None:
    """As long as merges keep it: nothing that differs between texts may lower it."""
    for seed in range(10):
        random, base, fine = texts(seed)
        ends, strength = Ends((-base, -fine), (base, fine)), Strength(0.1, 0.1)
        for _ in range(100):
            index = random.permutation(200)[:16].tolist()
            kept = [ends.kept(-fine[index], index)] * 2
            strength.follow(kept, ends.worth(-fine[index], fine[index], index))
        assert strength.value > 1


def test_a_fine_tune_that_is_surer_of_what_it_has_wrong() -> None:
    """Accurate, and with a higher loss than its base: then it is worth what it has right."""
    base, fine = np.repeat([1.0, 0.0], [60, 140]), np.repeat([1.0, 0.0], [160, 40])
    losses = np.full(200, 1.0), np.full(200, 1.2)
    ends, every = Ends((base, fine), losses), range(200)
    assert ends.worth(fine, np.full(200, 0.5), every) == pytest.approx(1)
    assert ends.worth(base, np.full(200, 0.5), every) == pytest.approx(0)


# --- in a training -------------------------------------------------------------------------------------------


def test_by_itself_the_traps_strength_follows(models: Path, tmp_path: Path) -> None:
    report = harden(models, tmp_path / "out", steps=40, rate=5e-4)
    assert report.may == MAY
    assert report.strength == report.trials[0]["figures"]["strength"] > report.trials[0]["strength"]
    fixed = harden(models, tmp_path / "fixed", strength=0.2)
    assert (fixed.may, fixed.strength) == (None, 0.2)
    for name, may in (("plain", None), ("repel", None), ("trap+collapse", MAY)):
        assert harden(models, tmp_path / name, objective=name).may == may
    both = harden(models, tmp_path / "both", strength=0.2, may=0.5)
    assert both.may == 0.5
    assert both.strength != 0.2


def test_of_images_the_trap_is_not_alone(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert harden(models, tmp_path / "out", objective=None, steps=3).objective == "trap+collapse+kindred"

    def none(*_: Any) -> Any:
        raise InputError("the model gives no hidden states")

    monkeypatch.setattr(TensorTask, "states", none)
    assert harden(models, tmp_path / "without", objective=None, steps=3).objective == "trap+kindred"
    with pytest.raises(InputError, match="no hidden states"):
        harden(models, tmp_path / "asked", objective="trap+collapse", steps=3)


def test_what_merges_may_keep_decides(models: Path, tmp_path: Path) -> None:
    """Less may be kept: the strength rises instead of falling, and less is kept."""
    found = []
    for may in (0.9, 0.05):
        simple = Trap(part=1.0, among=1)  # what a thief who chooses would do to merges drowns the difference
        changes = {"steps": 150, "batch": 64, "rate": 2e-3, "may": may, "objective": simple, "labels": 1.0}
        report = harden(models, tmp_path / f"may-{may}", **changes)
        found.append((report.strength / report.trials[0]["strength"], report.exposure["after"]["mean"]))
    assert found[0][0] < 1 < found[1][0]
    assert found[1][1] < 0.75 * found[0][1] < 0.75 * 0.9
    assert found[1][1] < 0.75 * 0.25


def test_looking_changes_nothing_but_the_strength(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strength_module, "RISE", 0.0)
    harden(models, tmp_path / "followed", steps=12, labels=1.0, strength=0.3, may=0.2)
    harden(models, tmp_path / "fixed", steps=12, labels=1.0, strength=0.3)
    one, two = (load_state(tmp_path / name) for name in ("followed", "fixed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("save", "labels"), [(7, 0.0), (7, 0.5), (10, 1.0)])  # between looks, and at one
def test_a_followed_strength_goes_on_after_a_kill(
    save: int, labels: float, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "SAVE", save)
    changes: dict[str, Any] = {"steps": 20, "labels": labels}
    whole = harden(models, tmp_path / "whole", **changes)
    first = 20 if labels else 0  # of plain training
    hardened.killed(partial(harden, models, tmp_path / "cut", **changes), at=first + 17)
    again = harden(models, tmp_path / "cut", **changes)
    assert again.strength == whole.strength
    one, two = (load_state(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_plain_training_does_is_not_the_objectives_price(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is trained and measured first; the strength falls for what is worse than that, not for that."""
    monkeypatch.setattr(search_module, "LEAST", -1e9)
    harsh = {"steps": 40, "rate": 0.3, "labels": 1.0}
    report = harden(models, tmp_path / "out", may=0.01, strength=1e-6, **harsh)
    control = harden(models, tmp_path / "plain", objective="plain", **harsh)
    assert report.standalone["plain"] == control.standalone["after"] < 0.9 * report.standalone["before"]
    assert "plain" not in control.standalone
    assert report.strength > 1e-6  # it may rise, little as is left of the fine-tune


def test_the_control_is_the_plain_training(models: Path, tmp_path: Path) -> None:
    plain = harden(models, tmp_path / "plain", objective="plain")
    for name, options in (("followed", {}), ("fixed", {"strength": 0.1})):
        beside = tmp_path / f"{name}-control"
        report = harden(models, tmp_path / name, control=beside, labels=1.0, **options)
        assert report.standalone["plain"] == plain.standalone["after"]
        one, two = load_state(tmp_path / "plain"), load_state(tmp_path / f"{name}-control")
        assert all(torch.equal(one[tensor], two[tensor]) for tensor in one)
        assert any(not torch.equal(one[tensor], part) for tensor, part in load_state(tmp_path / name).items())


def test_a_control_that_is_in_the_way_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be the same folder"):
        harden(models, tmp_path / "out", control=tmp_path / "out", labels=1.0)
    with pytest.raises(InputError, match="the destination exists"):
        harden(models, tmp_path / "out", control=models / "base", labels=0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"may": 0.0}, "no part of a task"),
        ({"may": 1.0}, "no part of a task"),
        ({"may": 0.1, "objective": "plain"}, "no strength to follow"),
        ({"may": 0.1, "max_loss": 1.0}, "nothing to search"),
        ({"labels": -0.1}, "no part of a loss"),
        ({"labels": 1.1}, "no part of a loss"),
        ({"labels": float("nan")}, "no part of a loss"),
        ({"labels": 0.0, "objective": "plain"}, "^objective: .* leaves it as it is"),
        ({"labels": 0.0, "control": "beside"}, "^control: .* leaves it as it is"),
        ({"made": ["sideways"]}, "no such direction"),
        ({"made": [], "proxies": []}, "nothing in the place"),
        ({"precision": "int3"}, "no such precision"),
    ],
)
def test_options_that_are_refused(changes: dict[str, Any], text: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=text):
        harden(models, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


# --- options -------------------------------------------------------------------------------------------------


def test_an_objective_of_ones_own(models: Path, tmp_path: Path) -> None:
    class Counted(Plain):
        name = "counted"
        steps = 0

        def add(self, step: Any, strength: float) -> float:
            type(self).steps += 1
            assert strength == 0.3
            return 7.0

    report = harden(models, tmp_path / "out", objective=Counted(), strength=0.3)
    assert (report.objective, Counted.steps) == (
        "counted",
        7,
    )  # the last one only sees that the weights are good
    assert report.trials[0]["figures"]["objective"] == 7.0


def test_checkpointing_changes_memory_and_not_the_result(models: Path, tmp_path: Path) -> None:
    for name, on in (("with", True), ("without", False)):
        harden(models, tmp_path / name, checkpointing=on, strength=0.3)
    one, two = (load_state(tmp_path / name) for name in ("with", "without"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    before = load_state(models / PROTECTED)
    assert not all(torch.equal(one[name], before[name]) for name in one)


def test_bf16_passes_leave_the_weights_their_type(models: Path, tmp_path: Path) -> None:
    harden(models, tmp_path / "out", precision="bf16", strength=0.3)
    one, before = load_state(tmp_path / "out"), load_state(models / PROTECTED)
    assert {n: t.dtype for n, t in one.items()} == {n: t.dtype for n, t in before.items()}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in one.values())


def test_anothers_accelerate_is_left_alone(models: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        with pytest.raises(UsageError, match="uses accelerate already"):
            harden(models, tmp_path / "out", precision="fp32")
        assert accelerator.mixed_precision == "bf16"
        harden(models, tmp_path / "out", precision="bf16", steps=3)
        with pytest.raises(UsageError, match="uses accelerate already"):
            harden(models, tmp_path / "no", precision="fp32")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_directions_can_be_chosen(models: Path, tmp_path: Path) -> None:
    found = {}
    for name, changes in {
        "random": {"made": ["random"], "proxies": []},
        "spectrum": {"made": ["spectrum"], "proxies": []},
        "proxies": {"made": []},
    }.items():
        report = harden(models, tmp_path / name, strength=0.3, **changes)
        assert report.made == tuple(changes["made"])  # type: ignore[arg-type]
        found[name] = load_state(tmp_path / name)
    names = list(found)
    for one, two in zip(names, [*names[1:], names[0]], strict=True):
        assert any(not torch.equal(found[one][n], found[two][n]) for n in found[one])


def test_merges_may_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each merge sees its part; together they see all of it."""
    module, whole = step()
    seen: list[torch.Tensor] = []
    real = type(module).forward

    def forward(self: Any, pixel_values: torch.Tensor, **more: Any) -> Any:
        seen.append(pixel_values)
        return real(self, pixel_values=pixel_values, **more)

    monkeypatch.setattr(type(module), "forward", forward)
    Trap(merges=3, part=1 / 3, among=1).add(whole, 1.0)
    assert [len(one) for one in seen] == [16, 16, 16]
    assert torch.equal(torch.cat(seen), whole.batch.inputs["pixel_values"])
