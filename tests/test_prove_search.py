"""The search itself: on a toy network in numpy, whose symmetries are known, and on a few real classes."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest

import toy
from unmergeable.prove.inventory import Pattern, fold, take_stock
from unmergeable.prove.prove import prove_specs
from unmergeable.prove.search import Found, search
from unmergeable.prove.sizes import Sizes
from unmergeable.prove.trial import Judge, only
from unmergeable.spec import Site, Slot

INNER = 10  # no other size, nor half or twice one: as in miniatures, a size has to tell what it is

CONFIG = {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": INNER,
    "num_experts": 4,
    "vocab_size": toy.VOCAB,
}


class ToyOracle:
    """Asks the toy network, as `Oracle` asks a miniature; `dead` tensors never reach the output."""

    def __init__(self, dead: str = "") -> None:
        with mock.patch.dict(toy.CONFIG, ff=INNER):
            self.tensors = toy.tensors()
        self.dead = dead
        self.calls = 0
        self._base = toy.forward(self.tensors)

    def error(self, changes: dict[str, np.ndarray], *, limit: float = math.inf) -> float:
        self.calls += 1
        alive = {name: value for name, value in changes.items() if not (self.dead and self.dead in name)}
        out = toy.forward({**self.tensors, **alive})
        return float(np.linalg.norm(out - self._base) / np.linalg.norm(self._base))


def run(oracle: ToyOracle) -> Found:
    judge = Judge([oracle], [CONFIG])  # type: ignore[list-item]
    stock = take_stock([{name: value.shape for name, value in oracle.tensors.items()}])
    return search(judge, stock, Sizes([CONFIG]))


@pytest.fixture(scope="module")
def found() -> Found:
    return run(ToyOracle())


def test_every_symmetry_of_the_toy_is_found(found: Found) -> None:
    groups = {(site.kind, site.acts): site.group for site in found.sites}
    assert groups == {
        ("qk", "c"): "complex",
        ("vo", "v"): "general_linear",
        ("mlp", "f"): "monomial",
        ("heads", "r"): "permutation",
        ("heads", "g"): "permutation",
        ("experts", "e"): "permutation",
    }
    assert sum(site.kind == "mlp" for site in found.sites) == 2
    assert all(site.evidence["error"] < 1e-11 for site in found.sites)
    assert all(site.evidence["guard"] > 1e-6 for site in found.sites)


def test_biases_and_routers_move_along(found: Found) -> None:
    tensors = {site.kind: {slot.tensor for slot in site.slots} for site in found.sites}
    assert "l.{l}.q.bias" in tensors["qk"]
    assert "l.{l}.v.bias" in tensors["vo"]
    assert {"l.{l}.router", "l.{l}.x_router"} <= tensors["experts"]


def test_inner_sites_come_before_the_ones_that_permute_them(found: Found) -> None:
    order = [("qk", "vo", "mlp", "heads", "experts").index(site.kind) for site in found.sites]
    assert [kind >= 3 for kind in order] == sorted(kind >= 3 for kind in order)
    acts = [site.acts for site in found.sites if site.kind == "heads"]
    assert acts == ["r", "g"]


def test_no_table_or_norm_is_touched(found: Found) -> None:
    touched = {slot.tensor for site in found.sites for slot in site.slots}
    assert not any("embed" in name or "norm" in name for name in touched)


def test_a_place_that_the_inputs_never_reach_is_refused() -> None:
    found = run(ToyOracle(dead=".x.2."))
    named = [site for site in found.sites if any(".x.{e}." in slot.tensor for slot in site.slots)]
    assert not [site for site in named if site.kind == "mlp"]
    assert any("unbalanced change" in refusal.reason and "x.2" in refusal.reason for refusal in found.refused)


def test_a_wrong_site_does_not_hold() -> None:
    oracle = ToyOracle()
    judge = Judge([oracle], [CONFIG])  # type: ignore[list-item]
    sizes = {"g": "num_key_value_heads", "r": "2", "d": "head_dim"}
    slots = (Slot("l.{l}.q.weight", {0: "g r d"}, -1), Slot("l.{l}.q.bias", {0: "g r d"}, -1),
             Slot("l.{l}.k.weight", {0: "g d"}, 1))  # fmt: skip
    site = Site("l.{l}.qk", "qk", "d", ("l", "g"), "general_linear", sizes, slots)
    assert not judge.passes([site])
    assert "the output moves" in judge.judge(site).reason


def test_a_guard_element_is_never_the_identity() -> None:
    from unmergeable.groups import Monomial

    identity = Monomial(np.array([[0, 1], [0, 1]]), np.ones((2, 2)))
    assert only(identity, 1).moved() > 0
    assert np.array_equal(only(identity, 1).matrix()[0], np.eye(2))


def test_numbers_in_names() -> None:
    names = ["m.0.a.w", "m.1.a.w", "m.0.x.0.w", "m.0.x.1.w", "m.0.f.0.w", "m.0.f.2.w", "plain"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (2, 3))
    shapes["m.0.f.2.w"] = (3, 2)
    assert set(fold(names, shapes)) == {"m.{l}.a.w", "m.{l}.x.{e}.w", "m.{l}.f.0.w", "m.{l}.f.2.w", "plain"}


def test_stock_keeps_what_all_miniatures_have() -> None:
    stock = take_stock([{"a.w": (2, 3), "b.w": (4,)}, {"a.w": (5, 3)}])
    assert stock == [Pattern("a.w", ((2, 5), (3, 3)), 1)]


@pytest.mark.parametrize(
    ("values", "scope", "expression"),
    [
        ((4, 6), "encoder.layer", "heads_e"),
        ((8, 16), "", "head_dim or hidden_size // num_attention_heads"),
        ((2, 3), "", "num_attention_heads // (num_key_value_heads)"),
        ((128, 192), "", "4 * hidden_size"),
        ((7, 7), "", "7"),
        ((5, 11), "", None),
    ],
)
def test_sizes_are_expressions_over_fields(
    values: tuple[int, ...], scope: str, expression: str | None
) -> None:
    configs: list[dict[str, Any]] = [
        {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "heads_e": 4},
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": None,
            "heads_e": 6,
        },
    ]
    assert Sizes(configs).find(values, scope) == expression


def test_sizes_hold_in_what_a_class_makes_of_a_config() -> None:
    """Where two fields are equal in what was given, the one that the class does not overrule."""
    given = [{"encoder_hidden_size": width, "hidden_size": width} for width in (32, 48)]
    written = [{"encoder_hidden_size": width + 8, "hidden_size": width} for width in (32, 48)]
    assert Sizes(given).find((32, 48), "text.encoder.layer") == "encoder_hidden_size"
    assert Sizes(given, written).find((32, 48), "text.encoder.layer") == "hidden_size"


def test_position_slopes_keep_heads_in_place() -> None:
    """A class whose heads each have their own slope: everything but their order is proven, and a sentence says so."""
    spec = prove_specs({"architectures": ["BloomForCausalLM"], "model_type": "bloom"})[0]
    assert {site.kind: site.group for site in spec.sites} == {
        "qk": "general_linear",
        "vo": "general_linear",
        "mlp": "permutation",
    }
    assert any("heads cannot change places" in refusal.reason for refusal in spec.refused)


def test_norms_on_queries_and_keys_leave_signs_of_pairs() -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64,
              "num_attention_heads": 8, "num_key_value_heads": 2}  # fmt: skip
    groups = {site.kind: site.group for site in prove_specs(config)[0].sites}
    assert groups["qk"] == "negation"
    assert groups["vo"] == "general_linear"


@pytest.mark.slow
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
    ],
    ids=lambda scaling: str(scaling["rope_type"]),
)  # fmt: skip
def test_kinds_of_rotary_scaling_have_one_group(scaling: dict[str, Any]) -> None:
    """What `fields.ROTARY_KINDS` says: these choose frequencies alone, so the sites are the same."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 32,
              "num_key_value_heads": 8, "hidden_size": 4096}  # fmt: skip
    plain, scaled = (prove_specs(each)[0] for each in (config, {**config, "rope_scaling": scaling}))
    assert plain.digest == scaled.digest
