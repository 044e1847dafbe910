"""mergekit's methods in process: all of them run and mix, and what it would take silently is refused."""

from __future__ import annotations

import sys

import pytest
import torch

from merging_models import triple
from unmergeable.errors import InputError, UsageError
from unmergeable.merging import METHODS, merge
from unmergeable.merging.kit import REQUIRED, TABLE, WEIGHTS, grid, kit

pytestmark = pytest.mark.filterwarnings("ignore")  # mergekit's and pydantic's own
FILLED = {"weight": 0.5, "t": 0.4, "density": 0.5}


def options(name: str) -> dict[str, object]:
    """Every required option, and a density that drops something."""
    known = TABLE[name].options
    return {key: FILLED[key] for key in known if known[key] is REQUIRED or key == "density"}


def inputs(name: str) -> tuple[dict, dict[str, dict]]:
    base, models = triple(names=("p", "o"))
    most = TABLE[name].most
    return base, dict(list(models.items())[: most or len(models)])


@pytest.mark.parametrize("name", TABLE)
def test_every_method_mixes_every_shared_tensor(name: str) -> None:
    base, models = inputs(name)
    changes = {"nearswap": {"t": 0.03}, "passthrough": {"scale": 0.9}}.get(name, options(name))
    result = merge(f"mergekit:{name}", base, models, **changes)
    assert result.facts.problems == []
    assert result.facts.mixed == result.facts.tensors == 10
    assert set(result.tensors) == set(base)
    assert torch.equal(result.tensors["head.weight"], base["head.weight"])  # nobody shares it
    for model in models:
        assert torch.equal(result.for_task(model)["head.weight"], models[model]["head.weight"])
    assert result.facts.near_base == (name == "model_stock")


def test_the_table_is_mergekits_own() -> None:
    mergekit = pytest.importorskip("mergekit.merge_methods")
    specs = {method.spec.name: method.spec for method in mergekit.registered_methods()}
    assert set(specs) == set(TABLE)
    policy = {"required": {"required", "pair"}, "optional": {"optional"}, "ignored": {"none"}}
    for name, spec in specs.items():
        method = TABLE[name]
        theirs = {p.name: REQUIRED if p.required else p.default for p in spec.parameters}
        assert dict(method.options) == theirs, name
        assert method.each == {p.name for p in spec.parameters if p.scope.value != "shared"}, name
        assert method.base in policy[spec.contract.base.value], name
        for entry in method.grid:
            assert entry.keys() <= theirs.keys(), name


def test_task_arithmetic_and_ties_by_hand() -> None:
    base = {"w": torch.zeros(4), "v": torch.ones(2, 2)}
    models = {
        "a": {"w": torch.tensor([4.0, -3.0, 2.0, 0.1]), "v": 2 * torch.ones(2, 2)},
        "b": {"w": torch.tensor([2.0, 5.0, -0.1, 0.2]), "v": 4 * torch.ones(2, 2)},
    }
    merged = kit("task_arithmetic", base, models, weight={"a": 0.5, "b": 0.1}).shared
    torch.testing.assert_close(merged["w"], 0.5 * models["a"]["w"] + 0.1 * models["b"]["w"])
    torch.testing.assert_close(merged["v"], torch.full((2, 2), 1 + 0.5 * 1 + 0.1 * 3))
    # halves kept: a (4, -3, ., .), b (2, 5, ., .); signs elected: +, +; weighted means of those that agree
    ties = kit("ties", base, models, weight=1.0, density=0.5).shared["w"]
    assert ties.tolist() == [3.0, 5.0, 0.0, 0.0]
    ties = kit("ties", base, models, weight=1.0, density=0.5, normalize=False).shared["w"]
    assert ties.tolist() == [6.0, 5.0, 0.0, 0.0]


def test_ours_are_mergekits() -> None:
    base, models = triple(names=("a", "b", "c"))
    for name, own, theirs in (
        ("task_arithmetic", {"weight": 0.4}, {"weight": 0.4}),
        ("ties", {"weight": 1.0, "density": 0.25}, {"weight": 1.0, "density": 0.25}),
    ):
        one, two = merge(name, base, models, **own), merge(f"mergekit:{name}", base, models, **theirs)
        for key in one.tensors:
            torch.testing.assert_close(one.tensors[key], two.tensors[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, method in TABLE.items() if method.random])
def test_random_methods_are_as_random_as_their_seed(name: str) -> None:
    base, models = triple()
    state = torch.get_rng_state()
    runs = [merge(name, base, models, seed=seed, **options(name)).tensors for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    key = "body.0.up.weight"
    assert torch.equal(runs[0][key], runs[1][key])
    assert not torch.equal(runs[0][key], runs[2][key])


def test_what_mergekit_would_take_silently_is_refused_with_the_methods_name() -> None:
    base, models = triple()
    with pytest.raises(UsageError, match=r"ties: options that the method does not have.*wieght"):
        merge("mergekit:ties", base, models, wieght=0.5)
    with pytest.raises(UsageError, match=r"dare_ties: the method needs an option, expected weight"):
        merge("dare_ties", base, models)
    with pytest.raises(UsageError, match=r"model_stock: a wrong number of models"):
        merge("model_stock", base, {"p": models["p"]})
    with pytest.raises(UsageError, match=r"slerp: a wrong number of models.*got 3"):
        merge("slerp", base, {**models, "q": models["p"]}, t=0.5)
    with pytest.raises(UsageError, match=r"sce: select_topk: this option is one for all models"):
        merge("sce", base, models, select_topk={"p": 0.5, "o": 0.5})
    with pytest.raises(UsageError, match=r"linear: weight: values and models differ"):
        merge("linear", base, models, weight={"p": 0.5})
    with pytest.raises(InputError, match=r"ties: mergekit refuses to merge"):
        merge("mergekit:ties", base, models, weight="much")
    with pytest.raises(UsageError, match="no such merge method"):
        merge("mergekit:average", base, models)


def test_the_order_of_a_pair_and_the_base_of_one_model() -> None:
    base, models = triple()
    forth = merge("slerp", base, models, t=0.2).tensors
    back = merge("slerp", base, dict(reversed(models.items())), t=0.8).tensors
    alone = merge("slerp", base, {"p": models["p"]}, t=0.5)
    for key in ("embed.weight", "body.1.up.weight"):
        torch.testing.assert_close(forth[key], back[key])
        assert (alone.tensors[key] - base[key]).norm() < (models["p"][key] - base[key]).norm()


def test_grids_are_options_that_methods_take() -> None:
    for name in TABLE:
        base, models = inputs(name)
        points = grid(name, "p", tuple(model for model in models if model != "p"))
        assert points
        if "weight" in TABLE[name].options:
            assert len(points) == len(TABLE[name].grid) * len(WEIGHTS)
        assert merge(f"mergekit:{name}", base, models, **points[-1]).facts.broken == ()
    assert sum(len(grid(name, "p", ("o",))) for name in TABLE) < 200


def test_tensors_of_some_models_do_not_keep_the_others_from_merging() -> None:
    base, models = triple(names=("p", "o"))
    models["p"]["head.weight"] = base["head.weight"] + 1  # the base's shape now: shared by one
    merged = merge("mergekit:task_arithmetic", base, models, weight=0.5)
    torch.testing.assert_close(merged.tensors["head.weight"], base["head.weight"] + 0.5)
    assert merged.facts.mixed == 11


@pytest.mark.parametrize("name", TABLE)
def test_tensors_of_every_shape(name: str) -> None:
    # a scalar, single numbers, columns, a convolution of one channel; frozen in one model, or in both, or zero
    shapes = {
        "scalar": (),
        "one": (1,),
        "column": (5, 1),
        "row": (1, 5),
        "conv": (4, 1, 2, 2),
        "token": (1, 1, 6),
    }
    random = torch.Generator().manual_seed(0)
    base = {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}
    base |= {
        "frozen": torch.ones(3, 3),
        "half": torch.ones(3, 3),
        "zero": torch.zeros(4),
        "none": torch.zeros(0, 2),
    }
    models = {
        model: {
            key: tensor + 0.1 * torch.randn(tensor.shape, generator=random) * (key not in still)
            for key, tensor in base.items()
        }
        for model, still in (("p", {"frozen", "zero", "half"}), ("o", {"frozen", "zero"}))
    }
    models = dict(list(models.items())[: TABLE[name].most])
    for point in grid(name, "p", tuple(model for model in models if model != "p")):
        found = merge(f"mergekit:{name}", base, models, **point)
        assert found.facts.broken == found.facts.dropped == ()
        assert all(found.tensors[key].shape == tensor.shape for key, tensor in base.items())


@pytest.mark.parametrize("name", ["ties", "dare_linear"])
def test_portions_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = triple()
    whole = merge(f"mergekit:{name}", base, models, seed=5, **options(name)).tensors
    monkeypatch.setattr("unmergeable.merging.kit.PORTION", 4000)
    parts = merge(f"mergekit:{name}", base, models, seed=5, **options(name)).tensors
    assert all(torch.equal(whole[key], parts[key]) for key in base)


def test_half_precision_is_merged_in_float32() -> None:
    base, models = triple(dtype=torch.bfloat16)
    merged = merge("linear", base, models, weight=0.5).tensors["embed.weight"]
    want = (models["p"]["embed.weight"].float() + models["o"]["embed.weight"].float()) / 2
    assert torch.equal(merged, want.to(torch.bfloat16))


def test_without_mergekit_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    base, models = triple()
    with pytest.raises(InputError, match=r"unmergeable\[merge\]"):
        merge("sce", base, models)
    assert merge("task_arithmetic", base, models, weight=0.5).facts.is_mix


def test_every_method_is_described() -> None:
    assert all(METHODS.values())
    assert len([name for name in METHODS if name.startswith("mergekit:")]) == 20
