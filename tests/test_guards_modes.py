"""What a short text alone does not show: wrong locks that a longer one, or a method of the class, would reveal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import toy
import unmergeable as um
from test_guards import TINY, apart, saved
from unmergeable.prove.prove import prove_specs
from unmergeable.prove.unreached import drop_beside_unreached
from unmergeable.spec import Site, Slot
from unmergeable.stock import load_module

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_cache")]


def text(length: int) -> torch.Tensor:
    return torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(length))


# --- real classes --------------------------------------------------------------------------------------------


def test_maps_of_heads_that_are_read_by_their_numbers(tmp_path: Path) -> None:
    """ESM's contacts are a regression over the maps of all heads of all layers."""
    config = transformers.EsmConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        pad_token_id=1, mask_token_id=4, position_embedding_type="rotary", attn_implementation="eager",
    )  # fmt: skip
    path = saved(transformers.EsmForMaskedLM(config), tmp_path / "model")
    report = um.lock(path, tmp_path / "locked", key=toy.key())
    assert any("contact_head" in reason for *_, reason in report.refused)
    assert {site.kind for site in report.sites} == {"qk", "vo", "mlp"}
    found = []
    for folder in (path, tmp_path / "locked"):
        module = load_module(folder).double()
        module.set_attn_implementation("eager")
        with torch.no_grad():
            found.append(module.predict_contacts(text(17), torch.ones(2, 17)))
    assert torch.allclose(*found, rtol=0, atol=1e-9)
    assert apart(path, tmp_path / "locked", {"input_ids": text(17)}) < 1e-6  # angles are in float32 there


def sparse(folder: Path) -> Path:
    """Layers in which every group of heads has blocks of keys chosen for it: 4 of 8 keys, so all of a short text."""
    config = transformers.MiniMaxM3VLTextConfig(
        **TINY, head_dim=16, num_hidden_layers=2, layer_types=["full_attention", "minimax_m3_sparse"],
        mlp_layer_types=["dense"] * 2, dense_intermediate_size=48, rotary_dim=8, index_n_heads=2,
        index_head_dim=16, index_block_size=8, index_topk_blocks=4, index_local_blocks=1,
    )  # fmt: skip
    return saved(transformers.MiniMaxM3VLForCausalLM(config), folder)


@pytest.mark.slow
def test_keys_that_are_chosen_for_groups_of_heads(tmp_path: Path) -> None:
    path = sparse(tmp_path / "model")
    report = um.lock(path, tmp_path / "locked", key=toy.key())
    assert {site.kind for site in report.sites} >= {"qk", "vo"}
    assert "model.layers.{l}.self_attn.heads.g" not in {site.site for site in report.sites}
    for length in (20, 80):
        assert apart(path, tmp_path / "locked", {"input_ids": text(length)}) < 1e-6, length


@pytest.mark.slow
def test_keys_that_are_chosen_for_all_heads_are_no_matter(tmp_path: Path) -> None:
    """So few are chosen in a miniature that its short texts are cut as well: the order of heads is proven."""
    config = transformers.DeepseekV32Config(
        **TINY | {"num_key_value_heads": 4}, num_hidden_layers=2, moe_intermediate_size=24, n_routed_experts=4,
        first_k_dense_replace=2, kv_lora_rank=20, q_lora_rank=28, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=12, n_group=1, topk_group=1, num_experts_per_tok=2, index_n_heads=2, index_head_dim=16,
        index_topk=40,
    )  # fmt: skip
    path = saved(transformers.DeepseekV32ForCausalLM(config), tmp_path / "model")
    report = um.lock(path, tmp_path / "locked", key=toy.key())
    assert "heads" in {site.kind for site in report.sites}
    for length in (20, 80):
        assert apart(path, tmp_path / "locked", {"input_ids": text(length)}) < 1e-6, length


@pytest.mark.slow
def test_bounds_that_small_numbers_never_reach() -> None:
    """A list of bounds, one a layer: rows of such an MLP can change places and not be scaled."""
    config = transformers.Step3p7TextConfig(
        **TINY, head_dim=8, num_hidden_layers=3, mlp_layer_types=["dense"] * 3, sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"], swiglu_limits_shared=[0.0, 0.0, 16.0],
    )  # fmt: skip
    fields = {**json.loads(config.to_json_string(use_diff=False)), "architectures": ["Step3p7TextModel"]}
    groups = {site.name: site.group for spec in prove_specs(fields) for site in spec.sites}
    assert groups["layers.{l}.mlp.mlp"] == "permutation"


# --- the rule ------------------------------------------------------------------------------------------------


class Miniature:
    """Stands in for an oracle: its function reads some of its tensors and no others."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], unread: set[str], **config: int) -> None:
        self.tensors = {name: np.ones(shape) for name, shape in shapes.items()}
        self.miniature = SimpleNamespace(config=config)
        self.unread = unread

    def error(self, changes: Mapping[str, np.ndarray], **_: float) -> float:
        return float(not changes.keys() <= self.unread)


HEADS = Site(
    "l.{l}.attn.heads.g", "heads", "g", ("l",), "permutation", {"g": "heads", "d": "size"},
    (Slot("l.{l}.attn.q.weight", {0: "g d"}, 1), Slot("l.{l}.attn.o.weight", {1: "g d"}, 1)),
)  # fmt: skip
MLP = Site(
    "l.{l}.mlp", "mlp", "f", ("l",), "permutation", {"f": "inner"},
    (Slot("l.{l}.up.weight", {0: "f"}, 1), Slot("l.{l}.down.weight", {1: "f"}, 1)),
)  # fmt: skip


def judged(extra: Mapping[str, Any], unread: set[str]) -> dict[str, str]:
    """What is refused, on two miniatures; `extra` has shapes as functions of (heads, inner)."""
    oracles = []
    for heads, inner in ((4, 52), (3, 84)):
        shapes = {name: shape(heads, inner) for name, shape in extra.items()}
        for layer in range(2):
            start, width = f"l.{layer}.", heads * 8
            shapes |= {f"{start}attn.q.weight": (width, 30), f"{start}attn.o.weight": (30, width)}
            shapes |= {f"{start}up.weight": (inner, 30), f"{start}down.weight": (30, inner)}
        oracles.append(Miniature(shapes, unread, heads=heads, size=8, inner=inner))
    kept, refused = drop_beside_unreached(oracles, (HEADS, MLP))  # type: ignore[arg-type]
    assert len(kept) + len(refused) == 2
    return {one.site: one.reason for one in refused}


@pytest.mark.parametrize(
    ("name", "shape", "sites"),
    [
        ("l.1.attn.chooser.weight", lambda heads, inner: (7, 30), [HEADS.name]),  # in one layer alone
        ("l.1.attn.chooser.bias", lambda heads, inner: (7,), []),
        ("l.1.other.weight", lambda heads, inner: (7, 30), []),
        ("l.1.other.weight", lambda heads, inner: (7, inner), [MLP.name]),
        ("table.weight", lambda heads, inner: (33, heads), [HEADS.name]),
        ("contacts.weight", lambda heads, inner: (1, 2 * heads), [HEADS.name]),
        ("sinks.bias", lambda heads, inner: (heads,), [HEADS.name]),
        ("patches.weight", lambda heads, inner: (30, 3, heads, heads), []),  # a kernel
        ("table.weight", lambda heads, inner: (33, 4), []),  # as many as there are heads in one of them
    ],
)
def test_weights_that_may_take_part(name: str, shape: Any, sites: list[str]) -> None:
    assert judged({name: shape}, set()) == {}
    found = judged({name: shape}, {name})
    assert list(found) == sites
    assert all("no input of the proof reaches" in reason for reason in found.values())


def test_weights_that_a_site_acts_on() -> None:
    found = judged({}, {"l.0.up.weight"})
    assert list(found) == [MLP.name]
    assert "l.{l}.up.weight, which it acts on" in found[MLP.name]
