"""Objectives: what each asks for, on a fine-tune of the tiny zoo."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import thief_cases
from test_harden_merges import opened
from unmergeable.errors import UsageError
from unmergeable.harden.directions import Directions
from unmergeable.harden.draws import Draw, Draws
from unmergeable.harden.objectives import (
    LEAST,
    Kindred,
    Plain,
    Repel,
    Step,
    Trap,
    Trap2,
    mean_states,
    needs_before,
    objective,
    unlikelihood,
)
from unmergeable.harden.wrapper import Hardening
from unmergeable.tasks.task import IGNORED, Examples, TensorTask

pytestmark = pytest.mark.filterwarnings("ignore")


def step(seed: int = 0) -> tuple[Any, Step]:
    module, weights = opened()
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 48, 5)
    batch = Examples({"pixel_values": images}, labels)
    task = TensorTask("stars", "image-classification", "accuracy", batch)
    given = Step(
        weights, Draws(weights.shapes, seed), Directions([], ("random",), seed), task, module, batch,
        torch.Tensor.backward, weights.snapshot(),
    )  # fmt: skip
    return module, given


class _Fixed:
    """A model whose answers are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return self


def test_unlikelihood_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]])
    task = TensorTask("t", "k", "accuracy", Examples({"x": logits}, torch.tensor([1, 0])))
    found = unlikelihood(task.logits(_Fixed(logits), task.evaluation), task.evaluation.labels)
    expected = (-math.log(1 - 0.75 + LEAST) - math.log(1 - 0.5 + LEAST)) / 2
    assert float(found) == pytest.approx(expected, rel=1e-5)
    sure = unlikelihood(torch.tensor([[-50.0, 50.0], [50.0, -50.0]]), task.evaluation.labels)
    assert float(sure) == pytest.approx(-math.log(LEAST), rel=1e-3)  # bounded


def test_of_text_every_token_counts_and_ignored_ones_do_not() -> None:
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    task = TensorTask("t", "k", "cross-entropy", Examples({"x": logits}, labels), next_token=True)
    found = unlikelihood(task.logits(_Fixed(logits), task.evaluation), task.evaluation.labels)
    right = [
        torch.softmax(logits[row, place], -1)[label]
        for row, place, label in ((0, 0, 1), (0, 1, 2), (1, 0, 3))
    ]
    expected = -torch.stack([(1 - one + LEAST).log() for one in right]).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def descended(name: str, steps: int, rate: float = 3e-3) -> list[float]:
    """The objective, step by step of plain gradient descent on it alone, on the same draws."""
    _, given = step()
    chosen = objective(name)
    optimizer = torch.optim.Adam(given.weights.parameters.values(), lr=rate)
    found = []
    for _ in range(steps):
        given.draws.generator.manual_seed(1)
        given.directions.generator.manual_seed(1)
        optimizer.zero_grad()
        found.append(chosen.add(given, 1.0))
        optimizer.step()
    return found


@pytest.mark.parametrize(
    "name", ["trap", "collapse", "kindred", "trap2", "trap+repel", "trap+collapse+kindred"]
)
def test_going_down_its_gradients_lowers_it(name: str) -> None:
    found = descended(name, 12)
    assert found[-1] < 0.8 * found[0] if found[0] > 0 else found[-1] < found[0] - 0.1


def test_strength_is_a_factor_of_the_gradients() -> None:
    gradients = []
    for strength in (1.0, 0.25):
        _, given = step()
        Trap().add(given, strength)
        gradients.append({n: one.grad for n, one in given.weights.parameters.items() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(0.25 * gradients[0][n], gradients[1][n], atol=1e-7) for n in gradients[0])


def test_a_thief_who_improves_his_coefficients_knows_more() -> None:
    found = []
    for inner in (0, 3):
        total = 0.0
        for seed in range(4):
            _, given = step(seed)
            total += Trap(merges=1, inner=inner).add(given, 1.0)
            # The thief's own gradients are nobody's: strength 0 leaves none behind.
            for one in given.weights.parameters.values():
                one.grad = None
            Trap(merges=1, inner=inner).add(given, 0.0)
            assert not any(
                bool(one.grad.any()) for one in given.weights.parameters.values() if one.grad is not None
            )
        found.append(total)
    assert found[1] > 1.05 * found[0]


def test_a_thief_who_chooses_among_blocks_knows_more() -> None:
    found, seeds = {1: 0.0, 6: 0.0}, range(12)
    parts = [seed for seed in seeds if step(seed)[1].draws.draw().parts]
    assert 2 <= len(parts) < len(seeds)
    for seed in parts:
        for among in found:
            _, given = step(seed)
            found[among] += Trap(merges=1, among=among).add(given, 0.0)
            left = (one.grad for one in given.weights.parameters.values() if one.grad is not None)
            assert not any(bool(gradient.any()) for gradient in left)
    assert found[6] > 1.05 * found[1]
    for seed in set(seeds) - set(parts):  # nothing to choose
        assert Trap(merges=1, among=6).add(step(seed)[1], 0.0) == Trap(merges=1).add(step(seed)[1], 0.0)


def test_kindred_is_of_blocks_among_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _, given = step()
    before = {
        name: one.detach().clone() - given.weights.base[name]
        for name, one in given.weights.parameters.items()
    }
    for one in given.weights.parameters.values():
        one.data += 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(2))
    seen: list[Draw] = []
    merged = given.weights.merged

    def look(draw: Draw, direction: Any) -> Any:
        assert all(torch.equal(direction[name], one) for name, one in before.items())
        seen.append(draw)
        return merged(draw, direction)

    monkeypatch.setattr(given.weights, "merged", look)
    assert Kindred(among=6).add(given, 1.0) > 0
    *tried, taken = seen
    assert taken in tried
    assert len(tried) == 6
    assert all(draw.parts and 0.2 <= max(draw.other.values()) <= 0.8 for draw in tried)  # as the trap adds
    assert needs_before(objective("trap+kindred"))
    assert not needs_before(objective("trap+collapse"))


def test_kindred_wants_a_finished_fine_tune() -> None:
    module, _ = opened()
    base = thief_cases.trained()["base"].state_dict()
    body = {name: one for name, one in base.items() if not name.startswith("classifier")}
    module.load_state_dict({**module.state_dict(), **body})
    with pytest.raises(UsageError, match="its base still"):
        Hardening(module, base, "trap+kindred")


def test_repel_moves_what_has_not_moved() -> None:
    module, given = step()
    name = "vit.layers.0.mlp.fc1.weight"
    with torch.no_grad():
        given.weights.parameters[name].copy_(given.weights.base[name])
        given.weights.parameters[name][0, 0] += 1e-3
    assert Repel().add(given, 1.0) > 0.04
    grad = given.weights.parameters[name].grad
    assert grad is not None
    assert bool(torch.isfinite(grad).all())
    assert float(grad[0, 0]) < 0
    assert Repel(distance=0.0).add(given, 1.0) == 0
    optimizer = torch.optim.Adam(given.weights.parameters.values(), lr=1e-2)
    found = []
    for _ in range(20):
        optimizer.zero_grad()
        found.append(Repel(distance=0.5).add(given, 1.0))
        optimizer.step()
    assert found[-1] < 0.5 * found[0]
    assert module.classifier.weight.grad is None


def test_trap2_is_the_loss_at_another_scale() -> None:
    _, given = step()
    assert Trap2().add(given, 1.0) < 0


def test_states_of_convolutions_are_averaged_over_places() -> None:
    _, given = step()
    flat, maps = torch.randn(2, 5, 3), torch.randn(2, 3, 4, 6)

    class States:
        def states(self, call: Any, batch: Any) -> tuple[torch.Tensor, ...]:
            return torch.zeros(2, 1, 1), flat, maps

    found = mean_states(replace(given, task=States()), 2)
    assert torch.allclose(found[0], flat.mean(1))
    assert torch.allclose(found[1], maps.mean((2, 3)))


def test_names() -> None:
    assert objective("trap+repel").name == "trap+repel"
    assert "2601.21898" in objective("trap2+plain").source
    with pytest.raises(UsageError, match="no such objective"):
        objective("trap+")


def test_the_wrapper_adds_to_a_training_of_ones_own() -> None:
    module, given = step()
    inputs = {"pixel_values": given.batch.inputs["pixel_values"], "labels": given.batch.labels}
    hardening = Hardening(
        module,
        thief_cases.trained()["base"].state_dict(),
        proxies=[thief_cases.trained()["suns"].state_dict()],
    )
    module(**inputs).loss.backward()
    before = {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}
    head = module.classifier.weight.grad.clone()
    optimizer = torch.optim.Adam(hardening.weights.parameters.values(), lr=1e-3)
    assert hardening.backward(inputs) > 0
    changed = [
        name
        for name, old in before.items()
        if not torch.equal(dict(module.named_parameters())[name].grad, old)
    ]
    assert len(changed) > 10
    assert torch.equal(module.classifier.weight.grad, head)  # it learns its task and nothing else

    def exposed() -> float:
        """On merges that are always the same."""
        hardening.draws.generator.manual_seed(1)
        hardening.directions.generator.manual_seed(1)
        found = sum(hardening.backward(inputs) for _ in range(6))
        optimizer.zero_grad()
        return found

    start = exposed()
    hardening.strength = 1.0
    for _ in range(40):
        module(**inputs).loss.backward()
        hardening.backward(inputs)
        optimizer.step()
        optimizer.zero_grad()
    assert exposed() < 0.7 * start
    with pytest.raises(UsageError, match="without labels"):
        hardening.backward({"pixel_values": inputs["pixel_values"]})
    base = thief_cases.trained()["base"].state_dict()
    for given, text in (
        ({"made": ("up",)}, "no such direction"),
        ({"made": ()}, "nothing in the place"),
        ({"strength": -1.0}, "no strength"),
    ):
        with pytest.raises(UsageError, match=text):
            Hardening(module, base, **given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no base"):
        Hardening(module)


def test_a_batch_in_which_nothing_counts() -> None:
    module, given = step()
    hardening = Hardening(module, thief_cases.trained()["base"].state_dict())
    labels = torch.full_like(given.batch.labels, IGNORED)
    inputs = {"pixel_values": given.batch.inputs["pixel_values"], "labels": labels, "return_dict": True}
    assert hardening.backward(inputs) == 0.0
    assert all(one.grad is None for one in hardening.weights.parameters.values())
    assert hardening.backward({**inputs, "labels": given.batch.labels}) > 0


def test_a_part_of_a_batch_in_which_nothing_counts() -> None:
    labels = torch.full((2, 3), IGNORED)
    assert float(unlikelihood(torch.randn(2, 3, 4), labels)) == 0.0


def test_a_models_own_tensors_may_be_its_base() -> None:
    """Of a training that begins at the base: what is trained is not the base that it is compared with."""
    module = thief_cases.model(3)
    hardening = Hardening(module, module.state_dict())
    with torch.no_grad():
        for one in module.parameters():
            one.add_(0.1)
    assert all(float(delta.norm()) > 0 for delta in hardening.weights.vector().values())


def test_which_logits_labels_are_for() -> None:
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertForTokenClassification,
        LlamaConfig,
        LlamaForCausalLM,
    )

    small = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, ...]] = []

    class Looks(Plain):
        def add(self, given: Step, strength: float) -> float:
            seen.append((*given.batch.labels.shape, *given.task.logits(given.call, given.batch).shape[1:2]))
            return 0.0

    for kind, config, wide in (
        (LlamaForCausalLM, LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=2), 5),
        (BertForTokenClassification, BertConfig(**small, num_attention_heads=2), 6),
        (BertForMaskedLM, BertConfig(**small, num_attention_heads=2), 6),
    ):
        module = kind(config)
        hardening = Hardening(module, module.state_dict())
        hardening.objective = Looks()
        hardening.backward({"input_ids": tokens, "labels": tokens % 2})
        assert seen.pop() == (4, wide, wide)
        with pytest.raises(UsageError, match="labels that are no classes"):
            hardening.backward({"input_ids": tokens, "labels": tokens.float()})

    class Own(LlamaForCausalLM):  # type: ignore[misc]
        pass

    own = Own(LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=2))
    hardening = Hardening(own, own.state_dict())
    with pytest.raises(UsageError, match="not known which logits"):
        hardening.backward({"input_ids": tokens, "labels": tokens})
    hardening.next_token = True
    assert hardening.backward({"input_ids": tokens, "labels": tokens}) > 0


def test_draws_of_a_step_are_always_the_same() -> None:
    module, given = step()
    hardening = Hardening(module, thief_cases.trained()["base"].state_dict())
    inputs = {"pixel_values": given.batch.inputs["pixel_values"], "labels": given.batch.labels}

    def at(number: int) -> float:
        hardening.begin(number)
        return hardening.backward(inputs)

    first = [at(number) for number in range(3)]
    assert [at(number) for number in reversed(range(3))] == first[::-1]
    assert len(set(first)) == 3
