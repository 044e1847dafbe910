"""What keeps a fine-tune what it is while it is hardened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hardened
import thief_cases
from hardened import PROTECTED
from unmergeable.harden import search
from unmergeable.harden.fidelity import Fidelity, divergence
from unmergeable.harden.merged import Weights
from unmergeable.harden.train import train
from unmergeable.stock import load_module
from unmergeable.tasks.task import IGNORED, Examples

pytestmark = pytest.mark.filterwarnings("ignore")
SEEDS = st.integers(0, 1000)


def harden(models: Path, dst: Path, **changes: Any) -> Any:
    """A few steps at one strength."""
    return hardened.harden(models, dst, **({"steps": 30, "batch": 32, "strength": 0.2} | changes))


# --- of two models' answers ----------------------------------------------------------------------------------


@given(seed=SEEDS, positions=st.sampled_from([None, 3]))
def test_it_is_0_for_the_same_answers_and_no_less_for_others(seed: int, positions: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 5) if positions is None else (4, positions, 5)
    one, two = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    labels = torch.randint(5, shape[:-1], generator=generator)
    assert float(divergence(one, one + 7, labels)) == pytest.approx(0, abs=1e-5)
    assert float(divergence(one, two, labels)) > 0


def test_it_is_the_mean_over_labelled_places() -> None:
    now, before = torch.tensor([[0.0, 0.0], [9.0, -9.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    p = 1 / (1 + np.exp(-1))
    expected = p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p))
    assert float(divergence(now, before, torch.tensor([0, IGNORED]))) == pytest.approx(expected, rel=1e-5)
    both = float(divergence(now, before, torch.tensor([0, 1])))
    assert both > expected / 2


# --- as a loss -----------------------------------------------------------------------------------------------


class Linear:
    """A task of logits that are linear in the inputs."""

    def logits(self, call: Any, batch: Examples) -> torch.Tensor:
        return call(batch.inputs["x"])

    def loss(self, call: Any, batch: Examples) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.logits(call, batch), batch.labels)


def owner() -> Any:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Dropout(0.5))
    own = dict(module.named_parameters())
    weights = Weights(module, own, own)
    return SimpleNamespace(module=module.eval(), weights=weights, task=Linear())


def examples() -> Examples:
    return Examples({"x": torch.randn(8, 6)}, torch.randint(4, (8,)))


def test_the_fine_tunes_own_answers_cost_nothing_at_first() -> None:
    mine, batch = owner(), examples()
    fidelity = Fidelity(mine, 0.0)
    loss = fidelity.loss(batch)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert all(float(one.grad.abs().max()) < 1e-6 for one in mine.weights.parameters.values())
    before = mine.weights.copy()
    with torch.no_grad():
        for one in mine.weights.parameters.values():
            one.add_(0.3)
            one[0].mul_(2)
    after = mine.weights.copy()
    assert float(fidelity.loss(batch)) > 1e-3
    assert all(torch.equal(after[n], one) for n, one in mine.weights.copy().items())  # as they were
    mine.weights.load(before)
    assert float(fidelity.loss(batch)) == pytest.approx(0, abs=1e-6)


def test_the_answers_that_are_asked_for_are_those_of_use() -> None:
    """Without dropout, whatever the module is in."""
    mine, batch = owner(), examples()
    mine.module.train()
    fidelity = Fidelity(mine, 0.0)
    assert float(fidelity.loss(batch).detach()) > 0.01  # of the model in training, with it
    assert mine.module.training
    assert mine.module[1].training


@pytest.mark.parametrize("labels", [0.0, 0.25, 1.0])
def test_labels_have_the_part_that_was_asked_for(labels: float) -> None:
    mine, batch = owner(), examples()
    fidelity = Fidelity(mine, labels)
    expected = labels * mine.task.loss(mine.module, batch)
    assert float(fidelity.loss(batch)) == pytest.approx(float(expected), abs=1e-6)


def test_a_teachers_answers_are_asked_for_where_there_is_one() -> None:
    mine, batch = owner(), examples()
    teacher = {name: one + 0.5 * torch.randn_like(one) for name, one in mine.weights.copy().items()}
    kept = {name: one.clone() for name, one in teacher.items()}
    fidelity = Fidelity(mine, 0.0, teacher)
    assert float(fidelity.loss(batch)) > 1e-3
    for one in teacher.values():
        one.zero_()  # it is copied
    mine.weights.load(kept)
    assert float(fidelity.loss(batch)) == pytest.approx(0, abs=1e-6)


# --- in a training -------------------------------------------------------------------------------------------


def test_a_fine_tune_is_kept_to_its_answers(models: Path, tmp_path: Path) -> None:
    images = thief_cases.pictures(PROTECTED, 100, seed=9)[0]

    def answers(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            return load_module(folder)(pixel_values=images).logits

    before = answers(models / PROTECTED)
    found = {}
    for labels in (0.0, None):
        report = harden(models, tmp_path / f"out-{labels}", labels=labels, strength=0.01)
        assert report.labels == (1.0 if labels is None else labels)  # its strength is fixed
        assert "plain" not in report.standalone
        after = answers(tmp_path / f"out-{labels}")
        found[labels] = float(divergence(after, before, torch.zeros(len(images), dtype=torch.long)))
    assert found[0.0] < 0.5 * found[None]


def test_nothing_is_trained_plainly_without_labels(models: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    told = {
        "progress": lambda done, total, label: seen.append(done), "strength": None, "steps": 6, "rate": 5e-4,
    }  # fmt: skip
    assert "plain" not in harden(models, tmp_path / "without", labels=0.0, **told).standalone
    assert len(seen) == 6
    assert "plain" in harden(models, tmp_path / "with", labels=0.5, **told).standalone
    assert len(seen) == 6 + 12


@pytest.mark.parametrize("follows", [True, False])
def test_plain_training_is_the_teacher_of_a_strength_that_follows(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follows: bool
) -> None:
    trained: list[tuple[float, Any]] = []

    def seen(owner: Any, objective: Any, settings: Any, *given: Any, **options: Any) -> Any:
        trained.append((settings.labels, options.get("teacher")))
        return train(owner, objective, settings, *given, **options)

    monkeypatch.setattr(search, "train", seen)
    options = {"strength": None if follows else 0.1, "steps": 6, "rate": 5e-4}
    report = harden(models, tmp_path / "out", control=tmp_path / "control", labels=0.25, **options)
    assert [labels for labels, _ in trained] == [1.0, 0.25]  # the control knows of no teacher
    assert report.labels == 0.25
    (_, none), (_, teacher) = trained
    assert none is None
    if not follows:
        assert teacher is None  # a control that is only asked for changes nothing
        return
    control = load_module(tmp_path / "control").state_dict()
    assert all(torch.equal(one, control[name]) for name, one in teacher.items())


def test_labels_are_half_for_images_whose_strength_follows(models: Path, tmp_path: Path) -> None:
    found = {
        strength: harden(models, tmp_path / f"{strength}", strength=strength, steps=6, rate=5e-4).labels
        for strength in (None, 0.1)
    }
    assert found == {None: 0.5, 0.1: 1.0}


def test_where_plain_training_costs_the_answers_are_said(models: Path, tmp_path: Path) -> None:
    harsh = {"steps": 12, "rate": 0.3, "strength": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "LEAST", -1e9)
        notes = [harden(models, tmp_path / f"{n}", labels=n, **harsh).notes for n in (1.0, 0.0)]
    assert any("--labels 0 keeps to its own answers" in note for note in notes[0])
    assert not any("--labels" in note for note in notes[1])
