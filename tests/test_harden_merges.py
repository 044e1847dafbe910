"""Simulated merges: what is drawn, what the module has inside of one, and where gradients go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import thief_cases
from unmergeable.harden.directions import Directions
from unmergeable.harden.draws import LEAST, NEAR, Draw, Draws
from unmergeable.harden.even import even
from unmergeable.harden.lora import LoraWeights
from unmergeable.harden.merged import Weights
from unmergeable.merging.spectral import iso_c
from unmergeable.stock import module_state

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPES = {
    f"layers.{number}.{kind}": torch.Size(shape)
    for number in range(3)
    for kind, shape in (("q.weight", (4, 3)), ("q.bias", (4,)), ("out.weight", (3, 4)))
} | {"scale": torch.Size(())}


def copied(task: str = thief_cases.PROTECTED) -> Any:
    """A fine-tune of the tiny zoo that may be changed."""
    module = thief_cases.model(thief_cases.CLASSES[task])
    module.load_state_dict(thief_cases.trained()[task].state_dict())
    return module


def opened() -> tuple[Any, Weights]:
    module = copied()
    base = module_state(thief_cases.trained()["base"])
    body = [name for name, _ in module.named_parameters() if name.startswith("vit.")]
    return module, Weights(module, base, body)


def answered(module: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(module(pixel_values=images).logits, labels)


# --- draws ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_every_draw_is_a_merge(seed: int) -> None:
    draw = Draws(SHAPES, seed).draw()
    assert draw.own.keys() == draw.other.keys() == SHAPES.keys()
    parts = {name: torch.as_tensor(part) for name, part in draw.own.items()}
    for name, part in parts.items():
        assert torch.broadcast_shapes(part.shape, SHAPES[name]) == SHAPES[name]
        assert bool(torch.isfinite(part).all())
    assert any(bool(part.any()) for part in parts.values())  # something of the fine-tune is in it
    itself = all(bool(((part - 1).abs() < NEAR).all()) for part in parts.values())
    assert not itself  # whatever is added


def test_all_kinds_of_merges_are_drawn() -> None:
    draws = Draws(SHAPES, 0)
    found = [draws.draw() for _ in range(400)]
    by_row = [any(isinstance(part, torch.Tensor) for part in one.own.values()) for one in found]
    assert 40 < sum(by_row) < 130
    others = [one for one, rows in zip(found, by_row, strict=True) if not rows]
    cut = [
        one
        for one in others
        if {one.own[f"layers.{number}.q.weight"] for number in range(3)} == {0.0, 1.0}
        and all(one.own[f"layers.{n}.q.weight"] == one.own[f"layers.{n}.out.weight"] for n in range(3))
    ]
    assert len(cut) > 30
    assert any(not any(one.other.values()) for one in others)  # a part of the task vector alone
    assert any(min(one.own.values()) > 0.75 for one in others)  # all but a full dose


@given(st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_of_language_models_every_draw_is_of_use_to_a_thief(seed: int) -> None:
    draw = Draws(SHAPES, seed, texts=True).draw()
    own = sum(float(torch.as_tensor(part).abs().mean()) for part in draw.own.values())
    other = sum(draw.other.values())
    assert own > 0
    assert other >= LEAST * (own + other) - 1e-6


def test_even_merges_are_drawn_of_language_models() -> None:
    for texts, least, most in ((True, 20, 80), (False, 0, 0)):
        draws = Draws(SHAPES, 0, texts=texts)
        assert least <= sum(draws.draw().even for _ in range(400)) <= most


def test_merges_of_parts_have_the_rest_from_elsewhere() -> None:
    draws = Draws(SHAPES, 0)
    every = [draws.draw() for _ in range(300)]
    assert 0.2 < sum(draw.parts for draw in every) / len(every) < 0.5
    for draw in [*filter(lambda one: one.parts, every), *(draws.again() for _ in range(50))]:
        assert draw.parts
        low = [name for name, part in draw.own.items() if part < 0.5]
        assert low
        assert len({draw.other[name] for name in low}) == 1
        assert 0.2 <= draw.other[low[0]] <= 0.8


def test_draws_can_be_had_again() -> None:
    def several(seed: int) -> list[float]:
        draws = Draws(SHAPES, seed)
        return [float(torch.as_tensor(draws.draw().own["layers.1.q.weight"]).sum()) for _ in range(20)]

    assert several(3) == several(3) != several(4)


# --- directions ----------------------------------------------------------------------------------------------


def test_made_up_directions_have_the_size_of_the_task_vector() -> None:
    vector = {"w": torch.randn(6, 5), "b": torch.randn(6) * 3, "s": torch.tensor(2.0)}
    spectrum = Directions([], ("spectrum",), 0).draw(vector)
    for name, delta in vector.items():
        assert float(spectrum[name].norm()) == pytest.approx(float(delta.norm()), rel=1e-6)
    assert not torch.equal(spectrum["w"], vector["w"])
    assert torch.allclose(torch.linalg.svdvals(spectrum["w"]), torch.linalg.svdvals(vector["w"]), atol=1e-5)
    large = {"w": torch.randn(200, 200)}
    random = Directions([], ("random",), 0).draw(large)["w"]
    assert float(random.norm() / large["w"].norm()) == pytest.approx(1, abs=0.03)
    assert abs(float((random * large["w"]).sum())) < 0.05 * float(random.norm() * large["w"].norm())


def test_models_are_half_of_the_directions() -> None:
    model = {"w": torch.ones(2, 2)}
    drawn = [
        Directions([model], ("random",), seed).draw({"w": torch.randn(2, 2)})["w"] for seed in range(100)
    ]
    assert 30 < sum(one is model["w"] for one in drawn) < 70
    assert Directions([model], (), 0).draw({"w": torch.zeros(2, 2)})["w"] is model["w"]


# --- the module inside ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_gradients_are_those_of_the_merge_as_a_function(seed: int) -> None:
    module, weights = opened()
    module.double()
    weights.base = {name: one.double() for name, one in weights.base.items()}
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 12, 5)
    images = images.double()
    draw = Draws(weights.shapes, seed).draw()
    direction = {
        n: one.double() for n, one in Directions([], ("random",), seed).draw(weights.vector()).items()
    }
    answered(module, images, labels).backward()
    before = {name: one.detach().clone() for name, one in weights.parameters.items()}
    first = {name: one.grad.clone() for name, one in weights.parameters.items() if one.grad is not None}
    with weights.merged(draw, direction):
        answered(module, images, labels).backward()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
    mixed = {
        name: weights.base[name]
        + draw.own[name] * (leaf - weights.base[name])
        + draw.other[name] * direction[name]
        for name, leaf in leaves.items()
    }
    logits = torch.func.functional_call(module, mixed, (), {"pixel_values": images}).logits
    torch.nn.functional.cross_entropy(logits, labels).backward()
    compared = 0
    for name, one in weights.parameters.items():
        assert torch.equal(one, before[name])
        if name in first:
            expected = first[name] + leaves[name].grad
            assert one.grad is not None
            assert torch.allclose(one.grad, expected, rtol=1e-5, atol=1e-9), name
            compared += not torch.equal(first[name], expected)
    assert compared > 5


def test_an_error_inside_leaves_all_as_it_was() -> None:
    module, weights = opened()
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 12, 5)
    answered(module, images, labels).backward()
    before = {name: (one.detach().clone(), one.grad) for name, one in weights.parameters.items()}
    draw = Draws(weights.shapes, 1).draw()
    direction = Directions([], ("random",), 0).draw(weights.vector())

    def fail() -> None:
        with weights.merged(draw, direction):
            answered(module, images, labels).backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    for name, one in weights.parameters.items():
        assert torch.equal(one, before[name][0])
        assert one.grad is before[name][1]


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (3, 8, 5), (12, 3, 4, 4)])
def test_even_matrices(shape: tuple[int, ...]) -> None:
    """All singular values are their mean, whichever side is longer, and directions stay."""
    torch.manual_seed(0)
    matrix = 1e-3 * torch.randn(shape)
    matrix[..., 0] *= 30
    flat = matrix if matrix.ndim < 4 else matrix.flatten(1)
    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    found, expected = even(matrix).reshape(flat.shape), s.mean(-1)[..., None, None] * (u @ vh)
    assert float(s.max() / s.min()) > 5
    assert float((found - expected).norm() / expected.norm()) < 0.01
    assert torch.equal(even(torch.zeros(shape)), torch.zeros(shape))


def an_even_draw(weights: Weights) -> Draw:
    draws = Draws(weights.shapes, 0, texts=True)
    return next(one for one in iter(draws.draw, None) if one.even)


def test_an_even_merge_is_iso_c() -> None:
    _, weights = opened()
    other = module_state(thief_cases.trained()[next(iter(thief_cases.OWN))])
    direction = weights.fitted({n: other[n] - base for n, base in weights.base.items()})
    draw = an_even_draw(weights)
    scale = max(draw.other.values())
    fine = {name: one.detach().clone() for name, one in weights.parameters.items()}
    experts = {"protected": fine, "other": {name: other[name] for name in fine}}
    expected = iso_c(weights.base, experts, scale=scale).shared
    with weights.merged(draw, direction):
        for name, one in weights.parameters.items():
            away = (one - expected[name]).norm() / (expected[name] - weights.base[name]).norm()
            assert float(away) < 0.02, name
    assert all(torch.equal(one, fine[name]) for name, one in weights.parameters.items())


def test_gradients_through_an_even_merge_go_uphill() -> None:
    """They are passed through as if nothing was made even; the loss of the merge rises along them all the same."""
    module, weights = opened()
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 24, 5)
    direction = Directions([], ("random",), 0).draw(weights.vector())
    draw = an_even_draw(weights)

    def loss() -> torch.Tensor:
        with weights.merged(draw, direction):
            value = answered(module, images, labels)
            value.backward()
        return value.detach()

    before = loss()
    slopes = {n: one.grad.clone() for n, one in weights.parameters.items() if one.grad is not None}
    size = sum(float(one.square().sum()) for one in slopes.values()) ** 0.5
    with torch.no_grad():
        for name, slope in slopes.items():
            weights.parameters[name] += 0.01 / size * slope
    assert float(loss()) > float(before)


def test_slopes_are_the_derivatives_by_coefficients() -> None:
    module, weights = opened()
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 24, 5)
    name = "vit.layers.1.mlp.fc1.weight"
    assert name in weights.shapes

    def loss(own: float) -> float:
        draw = Draw(dict.fromkeys(weights.shapes, 0.7) | {name: own}, dict.fromkeys(weights.shapes, 0.0))
        with weights.merged(draw, {}):
            value = answered(module, images, labels)
            value.backward()
            slopes.append(weights.slopes()[name])
        return float(value)

    slopes: list[float] = []
    low, high = loss(0.69), loss(0.71)
    assert slopes[0] == pytest.approx((high - low) / 0.02, rel=0.05, abs=1e-4)


# --- adapters ------------------------------------------------------------------------------------------------


def adapted() -> tuple[Any, LoraWeights]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    module = copied("base") if "base" in thief_cases.CLASSES else copied()
    wrapped = get_peft_model(module, LoraConfig(r=3, target_modules=["q_proj", "fc1"]))
    with torch.no_grad():
        for name, one in wrapped.named_parameters():
            if "lora_B" in name:
                one.normal_(std=0.1)
    return wrapped, LoraWeights(wrapped)


def test_a_merge_of_an_adapter_is_one_of_its_updates() -> None:
    module, weights = adapted()
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 12, 5)
    for seed in range(4):
        draw = Draws(weights.shapes, seed).draw()
        vector = dict(weights.deltas())
        direction = Directions([], ("random",), seed).draw(vector)
        folded = {
            name: weights.base[name] + draw.own[name] * delta + draw.other[name] * direction[name]
            for name, delta in vector.items()
        }
        plain = copied()
        state = plain.state_dict()
        names = {name for name in folded if name in state}
        assert names == folded.keys()
        plain.load_state_dict({**state, **folded})
        frozen = {name: tensor.clone() for name, tensor in weights.base.items()}
        with weights.merged(draw, direction):
            got = module(pixel_values=images).logits
            torch.nn.functional.cross_entropy(got, labels).backward()
        assert torch.allclose(got, plain(pixel_values=images).logits, atol=1e-4)
        assert all(torch.equal(weights.base[name], frozen[name]) for name in frozen)
    assert any(one.grad is not None and bool(one.grad.any()) for one in weights.parameters.values())


def test_gradients_of_an_adapter() -> None:
    module, weights = adapted()
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 24, 5)
    name = next(iter(weights.layers))
    draw = Draw(dict.fromkeys(weights.shapes, 0.6), dict.fromkeys(weights.shapes, 0.0))
    rows = weights.parameters[f"{name} B"]

    def loss() -> torch.Tensor:
        with weights.merged(draw, {}):
            value = answered(module, images, labels)
            value.backward()
        return value.detach()

    loss()
    slope = float(rows.grad[2, 1])  # type: ignore[index]
    values = []
    for step in (-0.01, 0.01):
        with torch.no_grad():
            rows[2, 1] += step
        values.append(float(loss()))
        with torch.no_grad():
            rows[2, 1] -= step
    assert slope == pytest.approx((values[1] - values[0]) / 0.02, rel=0.1, abs=1e-4)


def test_an_even_merge_of_an_adapter() -> None:
    """Made even is the sum of updates, not their factors."""
    module, weights = adapted()
    draw = an_even_draw(weights)
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 12, 5)
    vector = {name: one.detach() for name, one in weights.deltas()}
    direction = Directions([], ("random",), 0).draw(vector)
    folded = {
        name: weights.base[name] + even(draw.own[name] * delta + draw.other[name] * direction[name])
        for name, delta in vector.items()
    }
    plain = copied()
    plain.load_state_dict({**plain.state_dict(), **folded})
    with weights.merged(draw, direction):
        got = module(pixel_values=images).logits
        torch.nn.functional.cross_entropy(got, labels).backward()
    assert torch.allclose(got, plain(pixel_values=images).logits, atol=1e-4)
    assert any(one.grad is not None and bool(one.grad.any()) for one in weights.parameters.values())
