"""Locks of models whose layers differ in size, or take the keys and values of others."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import unmergeable as um
from uneven_models import (
    A4B,
    BAMBA,
    E2B,
    FALCON,
    FULL,
    G3N,
    GRANITE,
    NEMOTRON,
    Q35,
    QNEXT,
    SLIDING,
    change,
    logits,
    tuned,
    write,
)
from unmergeable.errors import UnmergeableError
from unmergeable.match import match_spec
from unmergeable.specs import find_spec

pytestmark = pytest.mark.filterwarnings("ignore")

# By the number of instances. Layers with keys and values that others take have one element together, queries do not.
E2B_SITES = {(1, "qk"): 2, (1, "vo"): 2, (2, "heads"): 1, (4, "heads"): 1, (3, "mlp"): 2}
G3N_SITES = {(1, "qk"): 1, (1, "vo"): 1, (1, "heads"): 1, (6, "heads"): 1, (6, "mlp"): 2}
# Where attention is full keys are values: one site for both.
B31_SITES = {(2, "qk"): 1, (4, "qk"): 1, (4, "vo"): 1, (2, "heads"): 2, (4, "heads"): 2, (6, "mlp"): 1}
A4B_SITES = {**B31_SITES, (6, "mlp"): 2, (6, "experts"): 1}


# Linear attention, and of attention with a gate two sites of keys: pairs that are rotated and the rest.
Q35_SITES = {
    (3, "qk"): 1,
    (3, "vo"): 1,
    (3, "heads"): 2,
    (1, "qk"): 2,
    (1, "vo"): 1,
    (1, "heads"): 2,
    (4, "mlp"): 1,
}
QNEXT_SITES = {**Q35_SITES, (16, "mlp"): 1, (4, "experts"): 1}
# State spaces, with one layer of attention.
BAMBA_SITES = {
    (2, "qk"): 1,
    (2, "vo"): 1,
    (2, "heads"): 2,
    (1, "qk"): 2,
    (1, "vo"): 1,
    (1, "heads"): 2,
    (3, "mlp"): 1,
}
FALCON_SITES = {(2, "qk"): 2, (2, "vo"): 2, (2, "heads"): 4, (2, "mlp"): 1}
# Its experts are found as rows of one MLP each, which may change places.
GRANITE_SITES = {
    (2, "qk"): 1, (2, "vo"): 1, (2, "heads"): 1, (1, "qk"): 1, (1, "vo"): 1, (1, "heads"): 2, (3, "mlp"): 2
}  # fmt: skip
NEMOTRON_SITES = {
    **{(2, "qk"): 1, (2, "vo"): 1, (2, "heads"): 2, (1, "qk"): 1, (1, "vo"): 1, (1, "heads"): 2},
    **{(8, "mlp"): 1, (1, "mlp"): 2, (1, "experts"): 1},
}
E2B_LAYERS = {"num_hidden_layers": 35, "layer_types": [*[SLIDING] * 4, FULL] * 7}
GEMMA4, GEMMA3N = "Gemma4ForCausalLM", "Gemma3nForCausalLM"
KEY = um.Key(bytes(range(32)))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every class is proven once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMERGEABLE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    ("of", "fields", "published", "sites"),
    [
        pytest.param(GEMMA4, E2B, True, E2B_SITES, id="e2b-published"),
        pytest.param(GEMMA4, A4B, True, A4B_SITES, id="a4b-published"),
        pytest.param(
            GEMMA4, {**A4B, "enable_moe_block": False}, False, B31_SITES, id="31b", marks=pytest.mark.slow
        ),
        pytest.param(GEMMA3N, G3N, False, G3N_SITES, id="3n"),
        pytest.param("Qwen3_5ForCausalLM", Q35, False, Q35_SITES, id="gated"),
        pytest.param("BambaForCausalLM", BAMBA, False, BAMBA_SITES, id="states"),
        pytest.param(
            "FalconH1ForCausalLM", FALCON, False, FALCON_SITES, id="states-beside", marks=pytest.mark.slow
        ),
        pytest.param(
            "GraniteMoeHybridForCausalLM",
            GRANITE,
            False,
            GRANITE_SITES,
            id="states-experts",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "NemotronHForCausalLM", NEMOTRON, False, NEMOTRON_SITES, id="kinds", marks=pytest.mark.slow
        ),
        pytest.param(
            "Qwen3NextForCausalLM", QNEXT, False, QNEXT_SITES, id="gated-experts", marks=pytest.mark.slow
        ),
    ],
)
def test_layers_that_differ_are_locked(
    of: str, fields: dict[str, Any], published: bool, sites: dict[tuple[int, str], int], tmp_path: Path
) -> None:
    source = tmp_path / "model"
    write(fields, source, of=of, published=published)
    before = logits(source)
    # Norms of values, and the router of experts, compute in float32, in another order then.
    for method in ("exact", "gauge"):
        target = tmp_path / method
        report = um.lock(source, target, key=KEY, method=method)
        found: dict[tuple[int, str], int] = {}
        for site in report.sites:
            assert site.acted == site.instances
            assert site.moved is not None
            assert site.moved > 0.5
            place = site.instances, site.kind
            found[place] = found.get(place, 0) + 1
        assert found == sites
        assert not report.refused
        assert float((logits(target) - before).abs().max() / before.std()) < 2e-5
        assert um.verify(source, target, key=KEY).holds
    um.unlock(tmp_path / "exact", tmp_path / "again", key=KEY)
    names = [path.name for path in source.iterdir()]
    assert filecmp.cmpfiles(source, tmp_path / "again", names, shallow=False)[0] == names


@pytest.mark.parametrize(
    ("of", "fields"),
    [
        pytest.param(GEMMA4, E2B, id="e2b"),
        pytest.param(GEMMA3N, G3N, id="3n"),
        pytest.param("Qwen3_5ForCausalLM", Q35, id="gated"),
        pytest.param("BambaForCausalLM", BAMBA, id="states"),
    ],
)
def test_what_is_locked_is_merged_by_key_and_recovered_by_an_anchor(
    of: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    base, one, two = (tmp_path / name for name in ("base", "one", "two"))
    write(fields, base, of=of, published=fields is E2B)
    tuned(base, one, 1)
    tuned(base, two, 2)
    for source in (one, two):
        um.lock(source, source.with_suffix(".locked"), key=KEY)
    um.merge([one, two], tmp_path / "plain")
    wanted = logits(tmp_path / "plain")
    um.merge([one.with_suffix(".locked"), two.with_suffix(".locked")], tmp_path / "merged", key=KEY)
    assert float((logits(tmp_path / "merged") - wanted).abs().max() / wanted.std()) < 2e-5
    um.merge([one.with_suffix(".locked"), two], tmp_path / "stolen")
    assert float((logits(tmp_path / "stolen") - wanted).abs().max() / wanted.std()) > 1
    # Heads of every layer are found again although their keys are other layers'.
    um.attack("anchor-coupled", one.with_suffix(".locked"), tmp_path / "recovered", base=base)
    assert filecmp.cmp(tmp_path / "recovered" / "model.safetensors", one / "model.safetensors", shallow=False)


def test_keys_that_layers_take_are_not_changed_without_their_queries(tmp_path: Path) -> None:
    source = tmp_path / "model"
    write(E2B, source, published=True)
    um.lock(source, tmp_path / "locked", key=KEY)
    # Of layers 2 and 5 the last takes keys and values of the first: alone they are no function's.
    for place in ("2.self_attn.v_proj", "5.self_attn.o_proj", "2.self_attn.k_proj", "5.self_attn.q_proj"):
        altered = tmp_path / place
        shutil.copytree(tmp_path / "locked", altered)
        change(altered, partial(negated, f"layers.{place}."))
        assert not um.verify(source, altered).holds


def negated(place: str, name: str, one: torch.Tensor) -> torch.Tensor:
    """Minus what is there, all else as it is."""
    return -one if place in name else one


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["v_proj"], r"missing model\.layers\.1\.self_attn\.v_proj\.weight"),
        (["k_proj", "v_proj", "k_norm"], r"4 layers without model\.layers\.\{l\}\.self_attn\.k_proj\.weight"),
    ],
)
def test_a_layer_that_lost_its_keys_or_values_is_refused(gone: list[str], said: str, tmp_path: Path) -> None:
    write(E2B, tmp_path / "model", published=True)
    change(
        tmp_path / "model",
        lambda name, one: None if "layers.1.self_attn" in name and name.split(".")[-2] in gone else one,
    )
    with pytest.raises(UnmergeableError, match=said):
        um.lock(tmp_path / "model", tmp_path / "locked", key=KEY)
    assert not (tmp_path / "locked").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "fields"),
    [
        (GEMMA4, {**E2B_LAYERS, "hidden_size": 1536, "num_key_value_heads": 1, "num_kv_shared_layers": 20}),
        (GEMMA3N, {}),
        ("Qwen3_5ForCausalLM", {}),
        ("Qwen3NextForCausalLM", {"num_hidden_layers": 4}),
        ("BambaForCausalLM", {"attn_layer_indices": [9, 18, 27]}),
        ("FalconH1ForCausalLM", {}),
        ("NemotronHForCausalLM", {}),
    ],
)
def test_what_is_proven_of_small_models_fits_large_ones(of: str, fields: dict[str, Any]) -> None:
    """Small sizes are alike by chance: sizes that classes have by default are not."""
    model_class = getattr(transformers, of)
    configuration = model_class.config_class(**fields)
    with torch.device("meta"):
        module = model_class(configuration)
    tied = getattr(module, "all_tied_weights_keys", {})
    shapes = {name: tuple(one.shape) for name, one in module.state_dict().items() if name not in tied}
    config = {**json.loads(configuration.to_json_string()), "architectures": [of]}
    spec, canonical = find_spec(config, shapes)
    match = match_spec(spec, shapes, canonical)
    assert not spec.refused
    assert {"qk", "vo", "mlp", "heads"} <= {one.site.kind for one in match.sites}
