"""Merges of LoRA adapters as hardening simulates them, against peft's own; adapters in a training of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import thief_cases
from merging_models import transformer
from unmergeable.errors import InputError, UsageError
from unmergeable.harden import mix as mix_module
from unmergeable.harden.directions import Directions
from unmergeable.harden.draws import Draw, Draws
from unmergeable.harden.lora import LoraWeights
from unmergeable.harden.mix import Mix, leading
from unmergeable.harden.owner import Owner
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
    ("combination", "mix"),
    [
        ("linear", Mix()),
        ("magnitude_prune", Mix(0.4, trim=True)),
        ("ties", Mix(0.4, trim=True, elect=True)),
        ("svd", Mix(cut=True)),
        ("magnitude_prune_svd", Mix(0.4, trim=True, cut=True)),
        ("ties_svd", Mix(0.4, trim=True, elect=True, cut=True)),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_mixes_are_those_of_peft(
    combination: str, mix: Mix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        mix_module, "ROUNDS", 60
    )  # few are near enough for training; these tell singular values apart
    images, _ = thief_cases.pictures(thief_cases.PROTECTED, 12, 5)
    # Signs of factors are elected here as if both adapters had one scale, by peft without a look at it.
    module, weights = pair(4 if mix.elect and not mix.cut else 8)
    more = {} if mix.density == 1 else {"density": mix.density}
    module.add_weighted_adapter(
        ["default", "thief"], [0.7, 0.4], "merged", combination_type=combination, **more
    )
    module.set_adapter("merged")
    wanted = module(pixel_values=images).logits
    module.set_adapter("default")
    alone = module(pixel_values=images).logits
    products = {name: layer.get_delta_weight("thief").detach() for name, layer in weights.layers.items()}
    direction = weights.fitted(products) | weights.fitted_factors(saved(module, tmp_path))
    draw = replace(Draw.whole(weights.shapes, 0.7, 0.4), mix=mix)
    with weights.merged(draw, direction):
        got = module(pixel_values=images).logits
    assert torch.allclose(got, wanted, atol=1e-4)
    assert not torch.allclose(got, alone, atol=1e-2)
    assert torch.equal(module(pixel_values=images).logits, alone)  # and back


@pytest.mark.parametrize(("shape", "rank"), [((30, 20), 4), ((20, 30), 4), ((5, 12), 8)])
def test_what_a_cut_keeps(shape: tuple[int, int], rank: int) -> None:
    """As much of a matrix as a singular value decomposition does; all of it where the rank allows."""
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.randn(shape, generator=generator),
        torch.randn(shape[1], shape[1], generator=generator),
    )
    matrix = left @ torch.diag(0.5 ** torch.arange(float(shape[1]))) @ right
    span = leading(matrix, rank, generator)
    assert span.shape == (shape[0], rank)
    away = float((matrix - span @ (span.T @ matrix)).norm())
    least = float(torch.linalg.svdvals(matrix)[rank:].norm()) if rank < min(shape) else 0.0
    assert away == pytest.approx(least, rel=1e-2, abs=1e-4)


def test_thinned_factors_keep_their_sum() -> None:
    """What dare leaves out, the rest makes up for."""
    _, weights = pair()
    direction = {name: torch.zeros_like(one) for name, one in weights.vector().items()}
    key = next(key for key in weights.parameters if key.endswith(" A"))
    before = weights.parameters[key].detach().clone()
    whole = Draw.whole(weights.shapes, 1.0, 0.0)
    kept = []
    for seed in range(200):
        with weights.merged(replace(whole, mix=Mix(0.5, seed=seed)), direction):
            kept.append(weights.parameters[key].detach().clone())
    mean = torch.stack(kept).mean(0)
    assert 0.4 < float((kept[0] == 0).float().mean()) < 0.6
    assert torch.allclose(mean, before, atol=0.5 * float(before.abs().max()))
    assert float((mean - before).abs().mean()) < 0.1 * float(before.abs().mean())


@pytest.mark.parametrize(
    "mix", [None, Mix(0.5, trim=True, elect=True), Mix(0.7, cut=True)], ids=["sum", "ties", "dare_svd"]
)
def test_passes_in_bfloat16_are_of_merges_in_float32(mix: Mix | None) -> None:
    """Decompositions know no bfloat16, and a merge is no better than what it was computed in."""
    module, weights = pair()
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 8, 5)
    direction = Directions([], ("random",), 3).draw(weights.vector())
    draw = replace(Draw.whole(weights.shapes, 0.7, 0.4), mix=mix, even=mix is None)
    found, slopes = [], []
    for lower in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            vector = weights.vector()
            with weights.merged(draw, direction):
                seen = module.get_base_model().vit.state_dict() | weights.parameters
                found.append({name: one.detach().clone() for name, one in {**seen, **vector}.items()})
                torch.nn.functional.cross_entropy(module(pixel_values=images).logits, labels).backward()
        slopes.append({name: one.grad for name, one in weights.parameters.items()})
        for one in weights.parameters.values():
            one.grad = None
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    for name, one in slopes[0].items():
        assert one is not None
        assert torch.allclose(one, slopes[1][name], atol=0.1 * float(one.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "mix", [None, Mix(0.5, trim=True, elect=True), Mix(0.7, cut=True)], ids=["sum", "ties", "dare_svd"]
)
def test_a_base_in_bfloat16(mix: Mix | None, dtype: torch.dtype) -> None:
    """In a loop without autocast: passes are run in the base's type, whatever the adapter's is."""
    module, weights = pair()
    module.to(torch.bfloat16)
    for one in weights.parameters.values():
        one.data = one.data.to(dtype)
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 8, 5)
    before = {name: one.detach().clone() for name, one in (weights.base | weights.parameters).items()}
    direction = Directions([], ("random",), 3).draw(weights.vector())
    draw = replace(Draw.whole(weights.shapes, 0.7, 0.4), mix=mix)
    for _ in range(2):  # the second time gradients are added to those that are there
        with weights.merged(draw, direction):
            logits = module(pixel_values=images.bfloat16()).logits
            torch.nn.functional.cross_entropy(logits, labels).backward()
    for name, one in (weights.base | weights.parameters).items():
        assert one.dtype == before[name].dtype
        assert torch.equal(one, before[name])
    for one in weights.parameters.values():
        assert one.grad is not None
        assert one.grad.dtype == dtype
        assert bool(torch.isfinite(one.grad).all())
        assert bool(one.grad.any())


def test_an_adapter_is_measured_as_it_will_be_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    module, weights = pair()
    module.save_pretrained(tmp_path, selected_adapters=["default"])
    path = tmp_path / "adapter_model.safetensors"
    stored = {name: one.bfloat16() for name, one in load_file(path).items()}
    save_file(stored, path)
    weights.round(tmp_path)
    assert sum(torch.equal(one, one.bfloat16().float()) for one in weights.parameters.values()) == len(stored)
    rounded = {str(one.flatten()[:5].tolist()) for one in weights.parameters.values()}
    assert rounded == {str(one.float().flatten()[:5].tolist()) for one in stored.values()}


def sloping(mix: Mix, own: float, other: float) -> tuple[LoraWeights, Callable[[], float]]:
    """An adapter, and the loss of a merge of it: gradients are left behind."""
    module, weights = pair()
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 24, 5)
    direction = Directions([], ("random",), 3).draw(weights.vector())
    draw = replace(Draw.whole(weights.shapes, own, other), mix=mix)

    def loss() -> float:
        for one in weights.parameters.values():
            one.grad = None
        with weights.merged(draw, direction):
            value = torch.nn.functional.cross_entropy(module(pixel_values=images).logits, labels)
            value.backward()
        return float(value.detach())

    return weights, loss


@pytest.mark.parametrize(
    ("mix", "other"),
    # What is cut off has to be small, see `LoraWeights`.
    [(Mix(0.8, seed=7), 0.3), (Mix(0.8, trim=True, elect=True), 0.3), (Mix(cut=True), 0.02)],
    ids=["dare_linear", "ties", "svd"],
)
def test_gradients_of_mixes(mix: Mix, other: float) -> None:
    weights, loss = sloping(mix, 0.6, other)
    name = next(iter(weights.layers))
    for letter in "AB":
        loss()
        one = weights.parameters[f"{name} {letter}"]
        assert one.grad is not None
        place = divmod(int(one.grad.abs().argmax()), one.shape[1])
        slope, values = float(one.grad[place]), []
        for step in (-0.01, 0.02):
            with torch.no_grad():
                one[place] += step
            values.append(loss())
        with torch.no_grad():
            one[place] -= 0.01
        assert slope == pytest.approx((values[1] - values[0]) / 0.02, rel=0.1, abs=1e-4)


@pytest.mark.parametrize(
    "mix", [Mix(cut=True), Mix(0.9, elect=True, cut=True, seed=7)], ids=["svd", "dare_ties_svd"]
)
def test_gradients_of_cuts_lead_down(mix: Mix) -> None:
    """Wherever the rank ends."""
    weights, loss = sloping(mix, 0.8, 0.5)
    before = loss()
    slopes = {name: one.grad.clone() for name, one in weights.parameters.items() if one.grad is not None}
    assert len(slopes) == len(weights.parameters)
    length = sum(float(slope.square().sum()) for slope in slopes.values()) ** 0.5
    with torch.no_grad():
        for name, slope in slopes.items():
            weights.parameters[name] -= 0.05 / length * slope
    assert loss() < before - 0.2 * 0.05 * length


def test_draws_of_adapters_are_of_all_kinds() -> None:
    _, weights = pair()
    draws = [Draws(weights.shapes, seed, weights.adapts).draw() for seed in range(120)]
    mixes = [draw.mix for draw in draws if draw.mix is not None]
    assert 20 < len(mixes) < 80
    kinds = {(one.density == 1, one.trim, one.elect, one.cut) for one in mixes}
    for place in range(4):
        assert {kind[place] for kind in kinds} == {True, False}
    assert all(Draws(weights.shapes, seed).draw().mix is None for seed in range(60))


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


def test_a_proxy_that_is_no_other_adapter(tmp_path: Path) -> None:
    """Of a base in bfloat16, which the update of an adapter does not go into as it is."""
    from peft import LoraConfig, get_peft_model

    plain: Any = transformer("llama").bfloat16()
    plain.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    module: Any = get_peft_model(plain, config)
    for name in ("thief", "new"):  # the B of the new one stays 0
        module.add_adapter(name, config)
    for seed, name in enumerate(("default", "thief")):
        filled(module, name, seed)
    with torch.no_grad():
        for name, one in module.named_parameters():
            if "lora_B" in name:
                one.mul_(0.01)
    module.save_pretrained(tmp_path / "all")
    ids = np.random.default_rng(0).integers(3, 40, 40 * 8)
    np.savez(tmp_path / "ids.npz", input_ids=ids)
    fields = {"kind": "language-modelling", "data": str(tmp_path / "ids.npz"), "length": 8}

    def opened(proxy: Path) -> Owner:
        work = tmp_path / f"work-{proxy.name}"
        work.mkdir()
        accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
        return Owner(tmp_path / "all", tmp_path / "base", fields, [proxy], work, accelerator)

    assert len(opened(tmp_path / "all" / "thief").vectors) == 1
    same = tmp_path / "same"
    shutil.copytree(tmp_path / "all", same)
    for path, text in (
        (same, "is the fine-tune itself"),
        (tmp_path / "all" / "new", "adds nothing"),
        (tmp_path / "base", "adds nothing"),
    ):
        with pytest.raises(InputError, match=f"{path.name}: a proxy that {text}"):
            opened(path)


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


def test_an_adapter_that_transformers_added() -> None:
    """Without peft's model around it: it is hardened as the same adapter is within."""
    from peft import LoraConfig

    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 24, 5)
    inputs = {"pixel_values": images, "labels": labels, "return_dict": True}
    wrapped, _ = pair()
    wrapped.delete_adapter("thief")
    module: Any = base()
    module.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    filled(module, "default", 1)
    found = []
    for one in (wrapped, module):
        hardening = Hardening(one)
        values = [hardening.backward(inputs) for _ in range(4)]
        found.append((values, {name: part.grad for name, part in hardening.weights.parameters.items()}))
    (values, slopes), (others, same) = found
    assert values == pytest.approx(others)
    assert slopes.keys() == same.keys()
    assert all(torch.allclose(slope, same[name]) for name, slope in slopes.items())
    module.add_adapter(LoraConfig(r=4, target_modules=TARGETS), adapter_name="second")
    module.set_adapter(["default", "second"])
    with pytest.raises(InputError, match=r"not one active adapter.*default, second"):
        Hardening(module)
