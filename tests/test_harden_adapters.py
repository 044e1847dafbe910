"""Merges of LoRA adapters as hardening simulates them, against peft's own; adapters in a training of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import thief_cases
from unmergeable.errors import UsageError
from unmergeable.harden.directions import Directions
from unmergeable.harden.draws import Draw, Draws, Factors
from unmergeable.harden.lora import LoraWeights
from unmergeable.harden.wrapper import Hardening

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "fc1"]


def base() -> torch.nn.Module:
    """The protected task's module at the base's weights."""
    module = thief_cases.model(thief_cases.CLASSES[thief_cases.PROTECTED])
    module.load_state_dict(thief_cases.trained()[thief_cases.PROTECTED].state_dict())
    module.vit.load_state_dict(thief_cases.trained()["base"].vit.state_dict())
    return module


def filled(module: Any, adapter: str, seed: int) -> None:
    """An adapter that does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in module.named_parameters():
            if f".lora_A.{adapter}." in name or f".lora_B.{adapter}." in name:
                one.copy_(0.3 * torch.randn(one.shape, generator=generator))


def pair(alpha: int = 8) -> tuple[Any, LoraWeights]:
    """A peft model with an adapter to protect, and one of a thief of another scale."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    module = get_peft_model(base(), LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    module.add_adapter("thief", LoraConfig(r=4, lora_alpha=alpha, target_modules=TARGETS))
    filled(module, "default", 1)
    filled(module, "thief", 2)
    return module, LoraWeights(module)


def saved(module: Any, folder: Path) -> Path:
    """The thief's adapter, as peft saves it."""
    module.save_pretrained(folder, selected_adapters=["thief"])
    return folder / "thief"


@pytest.mark.parametrize(
    ("combination", "density"), [("linear", 1.0), ("magnitude_prune", 0.4)], ids=["linear", "magnitude_prune"]
)
def test_mixes_of_factors_are_those_of_peft(combination: str, density: float, tmp_path: Path) -> None:
    images, _ = thief_cases.pictures(thief_cases.PROTECTED, 12, 5)
    module, weights = pair()
    more = {} if density == 1 else {"density": density}
    module.add_weighted_adapter(
        ["default", "thief"], [0.7, 0.4], "merged", combination_type=combination, **more
    )
    module.set_adapter("merged")
    wanted = module(pixel_values=images).logits
    module.set_adapter("default")
    alone = module(pixel_values=images).logits
    direction = weights.fitted_factors(saved(module, tmp_path))
    draw = Draw.whole(weights.shapes, 0.7, 0.4)
    draw = Draw(draw.own, draw.other, Factors(density, True, 0))
    with weights.merged(draw, direction):
        got = module(pixel_values=images).logits
    assert torch.allclose(got, wanted, atol=1e-4)
    assert not torch.allclose(got, alone, atol=1e-2)
    assert torch.equal(module(pixel_values=images).logits, alone)  # and back


def test_thinned_factors_keep_their_sum() -> None:
    """What dare leaves out, the rest makes up for."""
    _, weights = pair()
    direction = {name: torch.zeros_like(one) for name, one in weights.vector().items()}
    key = next(key for key in weights.parameters if key.endswith(" A"))
    before = weights.parameters[key].detach().clone()
    whole = Draw.whole(weights.shapes, 1.0, 0.0)
    kept = []
    for seed in range(200):
        with weights.merged(Draw(whole.own, whole.other, Factors(0.5, False, seed)), direction):
            kept.append(weights.parameters[key].detach().clone())
    mean = torch.stack(kept).mean(0)
    assert 0.4 < float((kept[0] == 0).float().mean()) < 0.6
    assert torch.allclose(mean, before, atol=0.5 * float(before.abs().max()))
    assert float((mean - before).abs().mean()) < 0.1 * float(before.abs().mean())


def test_gradients_of_mixed_factors() -> None:
    module, weights = pair()
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 24, 5)
    direction = Directions([], ("random",), 3).draw(weights.vector())
    draw = Draw.whole(weights.shapes, 0.6, 0.3)
    draw = Draw(draw.own, draw.other, Factors(0.8, False, 7))
    name = next(iter(weights.layers))

    def loss() -> torch.Tensor:
        with weights.merged(draw, direction):
            value = torch.nn.functional.cross_entropy(module(pixel_values=images).logits, labels)
            value.backward()
        return value.detach()

    loss()
    for letter in "AB":
        one = weights.parameters[f"{name} {letter}"]
        assert one.grad is not None
        place = divmod(int(one.grad.abs().argmax()), one.shape[1])
        slope, values = float(one.grad[place]), []
        for step in (-0.01, 0.01):
            with torch.no_grad():
                one[place] += step
            values.append(float(loss()))
            with torch.no_grad():
                one[place] -= step
        assert slope == pytest.approx((values[1] - values[0]) / 0.02, rel=0.1, abs=1e-4)
        for other in weights.parameters.values():
            other.grad = None
        loss()


def test_draws_of_adapters_are_of_both_kinds() -> None:
    _, weights = pair()
    draws = [Draws(weights.shapes, seed, weights.factors).draw() for seed in range(60)]
    mixed = [draw for draw in draws if draw.factors is not None]
    assert 10 < len(mixed) < 40
    assert {draw.factors.density == 1 for draw in mixed} == {True, False}  # type: ignore[union-attr]
    assert all(Draws(weights.shapes, seed).draw().factors is None for seed in range(60))


def test_an_adapter_of_another_rank_has_no_factors(tmp_path: Path) -> None:
    from peft import LoraConfig

    module, weights = pair()
    module.delete_adapter("thief")
    module.add_adapter("thief", LoraConfig(r=2, target_modules=TARGETS))
    assert weights.fitted_factors(saved(module, tmp_path)) == {}


def test_square_layers_that_lie_the_other_way() -> None:
    """GPT-2's Conv1D holds inputs × outputs: shape alone does not say so of a square one."""
    import transformers
    from peft import LoraConfig, get_peft_model

    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(config)
    names = {
        f"{name}.weight": one.weight.detach().clone()
        for name, one in plain.named_modules()
        if name.endswith("c_proj")
    }
    weights = LoraWeights(
        get_peft_model(plain, LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True))
    )
    assert {tuple(one.shape) for one in names.values()} == {(8, 8), (32, 8)}
    found = weights.fitted(names)
    assert found.keys() == names.keys()
    assert all(torch.equal(found[name], names[name].T) for name in names)


def test_a_training_of_ones_own(tmp_path: Path) -> None:
    """Of an adapter: its base lies below it, and merges of it know less of the task than without hardening."""
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 96, 1)
    inputs = {"pixel_values": images, "labels": labels, "return_dict": True}
    exposed = {}
    for strength in (0.0, 2.0):
        module, _ = pair()
        thief = saved(module, tmp_path / f"{strength}")
        module.delete_adapter("thief")
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=5e-3)
        hardening = Hardening(module, proxies=[thief], strength=strength)
        assert len(hardening.directions.models[0]) == 3 * len(hardening.weights.shapes)
        for step in range(150):
            module(**inputs).loss.backward()
            hardening.begin(100 + step)
            hardening.backward(inputs)
            optimizer.step()
            optimizer.zero_grad()
        assert module(pixel_values=images).logits.argmax(-1).eq(labels).float().mean() > 0.9
        exposed[strength] = 0.0
        for step in range(8):
            hardening.begin(step)
            exposed[strength] += hardening.backward(inputs)
    assert exposed[2.0] < 0.7 * exposed[0.0]
    with pytest.raises(UsageError, match="has its base in itself"):
        Hardening(module, thief_cases.trained()["base"].state_dict())
