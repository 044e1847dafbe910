"""Which tensors models share, what the checks of a merge see, and blocks and kinds from names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import toy
from merging_models import triple
from unmergeable.errors import InputError, UsageError
from unmergeable.merging.blocks import REST, block_names, layout, search, seeds
from unmergeable.merging.check import facts
from unmergeable.merging.simple import task_arithmetic
from unmergeable.merging.tensors import distance, load_state, rename_like, split


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_checkpoint_is_loaded_as_it_is_stored(tmp_path: Path, dtype: str) -> None:
    values = toy.tensors()
    path = toy.write(tmp_path / "model", values, dtype=dtype, shards=2)
    state = load_state(path)
    stored = toy.load(path)
    for name, value in stored.items():
        assert torch.equal(state[name].double(), torch.from_numpy(value))
    assert state["embed"].dtype == {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    assert load_state(path, dtype=torch.float32)["embed"].dtype == torch.float32


def test_same_as_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = toy.write(tmp_path / "model", toy.tensors())
    theirs = safetensors.load_file(path / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in load_state(path).items())


def test_shared_private_and_kept() -> None:
    base, models = triple()
    models["p"]["head.weight"] = base["head.weight"] + 1
    models["o"]["extra"] = torch.ones(1)
    parts = split(base, models)
    assert parts.shared["embed.weight"] == ("p", "o")
    assert parts.shared["head.weight"] == ("p",)
    assert "head.weight" not in parts.common
    assert parts.kept == ("steps",)
    assert set(parts.private["o"]) == {"head.weight", "extra"}
    assert parts.private["p"] == {}


def test_other_bodies_and_vocabularies_are_refused_all_at_once() -> None:
    base, models = triple()
    models["p"]["embed.weight"] = torch.zeros(13, 8)
    models["o"]["body.1.up.bias"] = torch.zeros(3)
    del models["o"]["body.2.up.bias"]
    models["o"]["body.3.up.bias"] = torch.zeros(16)
    with pytest.raises(InputError) as caught:
        split(base, models)
    text = str(caught.value)
    for part in (
        "p: embed.weight",
        "[12, 8], as the base",
        "[13, 8]",
        "o: body.1.up.bias",
        "o: body.2.up.bias",
    ):
        assert part in text
    assert "tensors that the base lacks, got body.3.up.bias" in text


def test_another_model_altogether_is_named_so() -> None:
    base, _ = triple()
    with pytest.raises(InputError, match=r"other: an expert lacks tensors of the base.*and \d more"):
        split(base, {"other": {f"x.{name}": tensor for name, tensor in base.items()}})
    with pytest.raises(UsageError, match="nothing to merge"):
        split(base, {})


@pytest.mark.parametrize("direction", ["add", "strip"])
def test_names_that_differ_by_a_prefix_are_matched(direction: str) -> None:
    inner, _ = triple()
    outer = {f"model.{name}": tensor for name, tensor in inner.items() if name != "head.weight"}
    outer["head.weight"] = inner["head.weight"]
    base, model = (outer, inner) if direction == "add" else (inner, outer)
    renamed, back = rename_like(base, model)
    assert set(renamed) == set(base)
    assert {back.get(name, name) for name in renamed} == set(model)
    assert rename_like(base, base)[1] == {}


def test_distance_tells_a_fine_tune_from_a_stranger() -> None:
    base, models = triple(size=0.1)
    assert distance(base, models["p"]) == pytest.approx(0.1, abs=0.02)
    stranger = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in base.items()}
    assert distance(base, stranger) == pytest.approx(2**0.5, abs=0.15)


def test_facts_of_a_merge() -> None:
    base, models = triple()
    found = facts(base, models, task_arithmetic(base, models, weight={"p": 0.3, "o": 0.6}).shared)
    assert found.is_mix
    assert found.tensors == found.mixed == 10
    assert found.shares == {"p": pytest.approx(0.3, abs=1e-5), "o": pytest.approx(0.6, abs=1e-5)}
    assert found.fit == pytest.approx(1, abs=1e-6)
    assert found.moved == pytest.approx((0.3**2 + 0.6**2) ** 0.5, abs=0.05)
    assert found.as_dict()["problems"] == []


def test_what_is_no_merge_is_seen() -> None:
    base, models = triple()
    good = dict(task_arithmetic(base, models, weight=0.5).shared)
    copied = facts(base, models, {**base, **{k: v for k, v in models["p"].items() if k != "head.weight"}})
    assert copied.mixed == 0
    assert len(copied.copies["p"]) == 10
    assert copied.left_out == ["o"]
    assert "copied from one input, mostly from p" in copied.problems[0]
    one = facts(base, models, {**good, "embed.weight": models["o"]["embed.weight"]})
    assert one.copies == {"o": ("embed.weight",)}
    assert one.is_mix  # one tensor of ten
    dropped = facts(base, models, {name: t for name, t in good.items() if name != "embed.weight"})
    assert dropped.dropped == ("embed.weight",)
    broken = facts(base, models, {**good, "embed.weight": good["embed.weight"] / 0})
    assert broken.broken == ("embed.weight",)
    near = facts(base, models, task_arithmetic(base, models, weight=0.01).shared)
    assert near.near_base
    assert near.is_mix
    assert "do not differ" in facts(base, {"p": base}, base).problems[0]


def test_frozen_tensors_are_not_taken_for_copies() -> None:
    base, models = triple()
    for model in models.values():
        model["embed.weight"] = base["embed.weight"].clone()
    found = facts(base, models, task_arithmetic(base, models, weight=0.5).shared)
    assert found.tensors == 9
    assert found.copies == {}


def test_blocks_and_kinds_from_names() -> None:
    names = [
        "emb.weight",
        *(f"enc.layer.{n}.mlp.experts.{e}.weight" for n in range(12) for e in range(2)),
        *(f"enc.layer.{n}.norm.weight" for n in range(12)),
        "head.0.weight",
        "head.2.bias",
    ]
    assert block_names(names)["enc.layer.11.norm.weight"] == ("enc.layer.", 11)
    assert "head.0.weight" not in block_names(names)  # a sequence of different layers is not a stack
    grid = layout(names)
    assert grid.blocks[:3] == (REST, "enc.layer.0", "enc.layer.1")
    assert grid.blocks[-1] == "enc.layer.11"
    assert grid.kinds[1] == "enc.layer.{}.mlp.experts.{}.weight"
    assert grid.units["head.2.bias"] == (REST, "head.2.bias")
    assert len(grid.names(grid.block("enc.layer.3"))) == 3
    assert len(grid.names(grid.kind("enc.layer.{}.norm.weight"))) == 12


def test_search_finds_the_blocks_that_matter() -> None:
    grid = layout(triple()[0])
    want = grid.names(grid.block("body.0", "body.2"))

    def evaluate(taken: frozenset[tuple[str, str]], options: dict[str, float]) -> float:
        return -float(len(grid.names(taken) ^ want)) - abs(options["weight"] - 0.5)

    settings = [{"weight": 0.3}, {"weight": 0.5}]
    found = search(grid, evaluate, settings=settings, beam=2, budget=150)
    assert grid.names(found[0].taken) == want
    assert found[0].options == {"weight": 0.5}
    assert len(found) <= 150
    assert len({(one.taken, one.options["weight"]) for one in found}) == len(found)
    assert len(search(grid, evaluate, settings=settings, budget=5)) == 5
    assert frozenset() in seeds(grid)
    with pytest.raises(UsageError, match="a search needs"):
        search(grid, evaluate, budget=0)
