"""Learnt coefficients on a toy: two tasks that live in different rows of one layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unmergeable.errors import InputError, RunError, UsageError
from unmergeable.merging import Merged
from unmergeable.merging.grids import Mixer
from unmergeable.merging.learned import (
    GRANULARITIES,
    STARTS,
    Coefficients,
    cross_entropy,
    entropy,
    learn,
)

CLASSES, WIDTH = 4, 12


def toy_tasks() -> tuple[dict, dict[str, dict], dict[str, list], dict[str, list]]:
    """A base, an expert for each of two tasks, and batches (inputs, labels) to learn from and to validate on."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    base = {f"layers.{n}.weight": torch.eye(WIDTH) + 0.05 * draw(WIDTH, WIDTH) for n in range(2)}
    heads = {"p": draw(CLASSES, WIDTH), "o": draw(CLASSES, WIDTH)}
    experts, few, more = {}, {}, {}
    for name in heads:
        truth = {key: tensor + 0.4 * draw(WIDTH, WIDTH) for key, tensor in base.items()}
        experts[name] = {**truth, "head": heads[name]}
        for into, count in ((few, 4), (more, 4)):
            batches = []
            for _ in range(count):
                x = draw(32, WIDTH)
                batches.append((x, forward(name, experts[name], (x, None)).argmax(-1)))
            into[name] = batches
    return base, experts, few, more


def forward(task: str, state: Any, batch: Any) -> torch.Tensor:
    x = batch[0]
    for n in range(2):
        x = torch.tanh(x @ state[f"layers.{n}.weight"].T)
    return 3 * x @ state["head"].T


def loss(merged: Merged, batches: dict[str, list]) -> float:
    """Mean cross-entropy over both tasks."""
    found = [
        float(cross_entropy(forward(task, merged.for_task(task), one), one[1]))
        for task, some in batches.items()
        for one in some
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_labels_beat_every_start(granularity: str) -> None:
    base, experts, few, more = toy_tasks()
    found = learn(
        base, experts, forward, few, protected="p", granularity=granularity, objective="labels",
        labels=lambda batch: batch[1], steps=40, rate=0.05,
    )  # fmt: skip
    assert len(found) == len(STARTS)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    mixer = Mixer(base, experts)
    for one in found:
        start = mixer.mix({"p": one.start[0], "o": one.start[1]})
        assert one.score == pytest.approx(-loss(one.merged, few), rel=1e-4)
        assert loss(one.merged, few) < loss(start, few) - 0.01
        assert loss(one.merged, more) < loss(start, more)
        size = {"row": (2, WIDTH)}.get(granularity, (2,))
        assert one.coefficients["layers.0.weight"].shape == size
        assert one.forwards == 40 * 2 * 32
        assert torch.equal(one.merged.for_task("o")["head"], experts["o"]["head"])


def test_more_freedom_fits_better() -> None:
    base, experts, few, _ = toy_tasks()
    scores = [
        learn(
            base, experts, forward, few, protected="p", granularity=granularity, objective="labels",
            labels=lambda batch: batch[1], starts=[(0.4, 0.4)], steps=60, rate=0.05,
        )[0].score
        for granularity in ("model", "row")
    ]  # fmt: skip
    assert scores[1] > scores[0] + 0.02


def test_entropy_falls_without_labels() -> None:
    base, experts, few, _ = toy_tasks()
    found = learn(base, experts, forward, few, protected="p", granularity="tensor", steps=30, rate=0.05)
    for one in found:
        start = Coefficients(base, experts, "model", {"p": one.start[0], "o": one.start[1]}).snapshot()
        before = [entropy(forward(t, start.for_task(t), b)) for t, some in few.items() for b in some]
        after = [entropy(forward(t, one.merged.for_task(t), b)) for t, some in few.items() for b in some]
        assert sum(after) < sum(before)
        assert one.score == pytest.approx(-float(sum(after)) / len(after), rel=1e-4)


def test_the_best_step_is_kept_and_runs_repeat() -> None:
    base, experts, few, _ = toy_tasks()
    seen: list[float] = []

    def falling(merged: Merged) -> float:
        seen.append(-float(len(seen)))
        return seen[-1]

    one = learn(base, experts, forward, few, protected="p", starts=[(1.0, 0.1)], steps=10, validate=falling)[
        0
    ]
    assert (one.step, one.score) == (0, 0.0)
    start = Mixer(base, experts).mix({"p": 1.0, "o": 0.1})
    torch.testing.assert_close(one.merged.shared["layers.0.weight"], start.shared["layers.0.weight"])
    assert len(one.history) == 10
    runs = [
        learn(base, experts, forward, few, protected="p", starts=[(0.4, 0.4)], steps=8)[0] for _ in range(2)
    ]
    assert runs[0].history == runs[1].history


def test_what_cannot_be_learnt_is_refused() -> None:
    base, experts, few, _ = toy_tasks()
    with pytest.raises(UsageError, match="an objective"):
        learn(base, experts, forward, few, protected="p", objective="labels")
    with pytest.raises(UsageError, match="no such granularity"):
        learn(base, experts, forward, few, protected="p", granularity="entry")
    with pytest.raises(UsageError, match="no such expert"):
        learn(base, experts, forward, few, protected="q")
    with pytest.raises(UsageError, match="batches"):
        learn(base, experts, forward, {"p": []}, protected="p")
    with pytest.raises(RunError, match="the objective is not finite, got nan"):
        learn(base, experts, lambda *given: forward(*given) * torch.nan, few, protected="p")
    with pytest.raises(InputError, match="without labels"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([-1, -1]))
    with pytest.raises(InputError, match="shape of the logits"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0]))
    assert float(cross_entropy(torch.zeros(2, 3), torch.tensor([0, -1]))) == pytest.approx(1.0986, abs=1e-4)
