"""Block substitution as an attack: it finds what is hidden in blocks, and makes it once more from its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import thief_cases
from merging_models import State, body
from unmergeable.attacks.blocks import ALL, WEIGHTS, Blocks, named
from unmergeable.attacks.merges import off_the_shelf
from unmergeable.attacks.thief import Subject, Thief
from unmergeable.audit.work import one_thread
from unmergeable.merging.blocks import Unit, layout, seeds

DEPTH = 16


def deep(depth: int = DEPTH) -> Thief:
    """Many blocks, random fine-tunes of them."""
    random = torch.Generator().manual_seed(1)
    base = body(random, blocks=depth, width=4)
    experts = {
        name: {
            key: tensor + torch.randn(tensor.shape, generator=random)
            if tensor.is_floating_point()
            else tensor
            for key, tensor in base.items()
        }
        for name in ("p", "a", "b")
    }
    tasks: Any = dict.fromkeys(experts)
    return Thief(base, experts, "p", tasks, dict.fromkeys(experts, torch.nn.Linear(1, 1)))


class Planted:
    """Values that fall with the distance to a merge that is hidden: the planted units whole from "p"."""

    def __init__(self, thief: Thief, taken: frozenset[Unit], others: float) -> None:
        names = layout(thief.mixer.parts.shared).names(taken)
        self.wanted = {}
        for name, origin in thief.base.items():
            own = thief.experts
            mixed = origin + others * (own["a"][name] - origin + own["b"][name] - origin)
            self.wanted[name] = own["p"][name] if name in names else mixed
        self.best, self.options, self.looks = -float("inf"), {}, 0  # type: ignore[var-annotated]

    def __call__(
        self, options: Mapping[str, Any], subject: Any, *, kept: Subject | None = None
    ) -> tuple[float, float]:
        shared: State = subject.shared
        off = sum(
            float((shared[n] - t).square().sum()) for n, t in self.wanted.items() if t.is_floating_point()
        )
        self.looks += 1
        if -off > self.best:
            self.best, self.options = -off, dict(options)
        return 1.0, -off

    def peek(self, subject: Subject) -> tuple[float, float]:
        raise AssertionError("nothing is on the way to anything")


@pytest.mark.parametrize(
    "planted", [["body.13"], ["body.2", "body.3", "body.7"], ["rest", "body.0", "body.9"]]
)
def test_a_planted_block_is_found(planted: list[str]) -> None:
    """In a deep model too: the search begins with more merges there, and still has some left for its moves."""
    thief = deep()
    grid = layout(thief.mixer.parts.shared)
    look = Planted(thief, grid.block(*planted), 0.8)
    Blocks().explore(thief, look)
    assert look.options == {"taken": dict.fromkeys(planted, ALL), "others": 0.8}
    assert look.best > -1e-9
    assert look.looks <= len(seeds(grid)) * len(WEIGHTS) + Blocks.budget["moves"]


def test_a_planted_kind_in_a_block_is_found() -> None:
    thief = deep(6)
    grid = layout(thief.mixer.parts.shared)
    planted = grid.block("body.1", "body.2") | {("body.4", "body.{}.up.bias")}
    look = Planted(thief, planted, 0.5)
    Blocks().explore(thief, look)
    taken = {"body.1": ALL, "body.2": ALL, "body.4": ["body.{}.up.bias"]}
    assert look.options == {"taken": taken, "others": 0.5}


def test_options_name_what_is_taken_and_nothing_else() -> None:
    thief = deep(3)
    grid = layout(thief.mixer.parts.shared)
    assert named(grid, frozenset()) == {}
    assert named(grid, frozenset(grid.tensors)) == dict.fromkeys(grid.blocks, ALL)
    attack, random = Blocks(), torch.Generator().manual_seed(0)
    units = list(grid.tensors)
    for _ in range(20):
        keep = torch.rand(len(units), generator=random) < 0.5
        taken = frozenset(unit for unit, one in zip(units, keep.tolist(), strict=True) if one)
        options = json.loads(json.dumps({"taken": named(grid, taken), "others": 0.8}))
        found = {name: t.clone() for name, t in attack.make(thief, options).shared.items()}
        want = thief.mixer.substitute("p", taken, {"a": 0.8, "b": 0.8}).shared
        assert all(torch.equal(found[name], want[name]) for name in want)
        for name, unit in grid.units.items():
            assert torch.allclose(found[name], thief.experts["p"][name], atol=1e-6) == (unit in taken), name


def test_a_fine_tune_that_merges_in_one_block_alone_is_merged(tmp_path: Path) -> None:
    """What a trap does: everywhere but in one block the protected model's change is made unusable for merges."""
    with one_thread():
        scene = thief_cases.scene(thief_cases.write(tmp_path), thief_cases.OWN[:1])
        scene.bench.models["protected"] = thief_cases.one_block(scene.bench, 0)
        thief = scene.thief("protected")
        whole = scene.look({one.name: one for one in off_the_shelf()}["full_dose"], thief)
        assert max(look.joint for look in whole.looks) < 0.1
        options, _ = scene.best(scene.look(Blocks(), thief))
        merged = Blocks().make(thief, json.loads(json.dumps(options)))
        assert min(scene.values(merged)) > 0.6
        assert len(options["taken"]["vit.layers.0"]) > len(options["taken"].get("vit.layers.1", ()))
        assert merged.shared.keys() == scene.bench.base.keys()
