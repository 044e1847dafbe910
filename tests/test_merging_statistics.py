"""RegMean and Fisher merging on linear models, beside their closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from merging_models import inputs, nudged, transformer
from unmergeable.errors import InputError, UsageError
from unmergeable.merging import merge
from unmergeable.merging.statistics import fisher_information, grams


class Flipped(nn.Module):
    """A linear layer that stores (in, out)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.T.clone()), nn.Parameter(layer.bias.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def linear(seed: int, flipped: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    layer = nn.Linear(5, 3)
    return Flipped(layer) if flipped else layer


@pytest.mark.parametrize("flipped", [False, True])
def test_regmean_is_least_squares_on_all_models_outputs(flipped: bool) -> None:
    random = torch.Generator().manual_seed(0)
    base = linear(0, flipped).state_dict()
    models = {name: linear(seed, flipped) for seed, name in ((1, "a"), (2, "b"))}
    data = {"a": torch.randn(40, 5, generator=random), "b": torch.randn(40, 5, generator=random) @ torch.diag(
        torch.tensor([1.0, 3.0, 0.1, 2.0, 0.5]))}  # fmt: skip
    found = {name: grams(model, model, data[name].split(8)) for name, model in models.items()}
    assert set(found["a"]) == {"weight"}
    assert found["a"]["weight"].axis == (0 if flipped else 1)
    states = {name: dict(model.state_dict()) for name, model in models.items()}
    merged = merge("regmean", base, states, grams=found, reduction=1.0)

    def matrix(state: dict[str, torch.Tensor]) -> torch.Tensor:
        return (state["weight"] if flipped else state["weight"].T).double()

    x = torch.cat([data["a"], data["b"]]).double()
    y = torch.cat([data[name].double() @ matrix(states[name]) for name in ("a", "b")])
    want = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(matrix(merged.tensors), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(merged.tensors["bias"], (states["a"]["bias"] + states["b"]["bias"]) / 2)
    # with nothing left outside of the diagonals: a mean weighted by the inputs' second moments
    merged = merge("regmean", base, states, grams=found, reduction=0.0)
    moments = {name: data[name].double().square().mean(0)[:, None] for name in data}
    want = sum(moments[n] * matrix(states[n]) for n in data) / sum(moments.values())
    torch.testing.assert_close(matrix(merged.tensors), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
def test_gram_matrices_of_every_linear_layer_of_a_transformer(kind: str) -> None:
    model = transformer(kind)
    batch = inputs(kind)
    found = grams(model, lambda given: model(**given), [batch])
    matrices = {
        n
        for n, p in model.named_parameters()
        if p.ndim == 2 and "emb" not in n and "wte" not in n and "wpe" not in n
    }
    assert matrices <= set(found) | {"lm_head.weight"}
    for gram in found.values():
        torch.testing.assert_close(gram.matrix, gram.matrix.T)
        assert gram.count > 0
    others = {"p": nudged(model, 1), "o": nudged(model, 2)}
    states = {name: dict(other.state_dict()) for name, other in others.items()}
    stats = {
        name: grams(other, lambda given, other=other: other(**given), [batch])
        for name, other in others.items()
    }
    result = merge("regmean", dict(model.state_dict()), states, grams=stats)
    assert result.facts.problems == []


def test_fisher_information_of_a_linear_classifier_is_its_closed_form() -> None:
    model = linear(1)
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    found = fisher_information(model, model, x.split(1))
    chances = model(x).softmax(-1).detach()
    spread = chances * (1 - chances)
    torch.testing.assert_close(found["weight"], (spread[:, :, None] * x.square()[:, None]).mean(0))
    torch.testing.assert_close(found["bias"], spread.mean(0))


def test_sampled_fisher_information_comes_near() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 20)  # more classes than are summed over
    x = torch.randn(1, 4)
    found = fisher_information(model, model, [x] * 3, samples=400)
    chances = model(x).softmax(-1).detach()[0]
    want = (chances * (1 - chances))[:, None] * x.square()
    assert float((found["weight"] - want).abs().max() / want.max()) < 0.25
    again = fisher_information(model, model, [x] * 3, samples=400)
    assert torch.equal(found["weight"], again["weight"])


def test_fisher_merge_is_the_weighted_mean() -> None:
    base = linear(0).state_dict()
    models = {name: dict(linear(seed).state_dict()) for seed, name in ((1, "a"), (2, "b"))}
    random = torch.Generator().manual_seed(3)
    fishers = {name: {"weight": torch.rand(3, 5, generator=random)} for name in models}
    merged = merge("fisher", base, models, fishers=fishers, weight={"a": 1.0, "b": 3.0}).tensors
    f = {name: fishers[name]["weight"].clamp(min=1e-6) for name in models}
    want = (f["a"] * models["a"]["weight"] + 3 * f["b"] * models["b"]["weight"]) / (f["a"] + 3 * f["b"])
    torch.testing.assert_close(merged["weight"], want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(merged["bias"], (models["a"]["bias"] + 3 * models["b"]["bias"]) / 4)


def test_statistics_that_are_missing_are_named() -> None:
    base = linear(0).state_dict()
    models = {name: dict(linear(seed).state_dict()) for seed, name in ((1, "a"), (2, "b"))}
    with pytest.raises(UsageError, match="experts without grams, expected a, b, got b"):
        merge("regmean", base, models, grams={"a": {}})
    with pytest.raises(UsageError, match="fisher"):
        merge("fisher", base, models)
    with pytest.raises(InputError, match="no examples"):
        fisher_information(linear(0), linear(0), [])
    with pytest.raises(InputError, match="no linear layer"):
        grams(linear(0), linear(0), [])
