"""Looking a spec up: what fits is taken, what is unknown is proven or refused, never assumed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unmergeable import specs
from unmergeable.arithmetic import evaluate_size
from unmergeable.config import canonical_config, structure
from unmergeable.errors import InputError
from unmergeable.index import parse_index
from unmergeable.match import match_spec
from unmergeable.spec import Spec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def llama_shapes(config: dict[str, Any] = LLAMA) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "self_attn.q_proj.weight": (q, hidden),
            at + "self_attn.k_proj.weight": (kv, hidden),
            at + "self_attn.v_proj.weight": (kv, hidden),
            at + "self_attn.o_proj.weight": (hidden, q),
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }
    return shapes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNMERGEABLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def find(config: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> Spec:
    return specs.find_spec(config, llama_shapes() if shapes is None else shapes, prove=False)[0]


def test_a_shipped_spec_is_found() -> None:
    spec = find(LLAMA)
    assert spec.architecture == "LlamaForCausalLM"
    assert {site.kind for site in spec.sites} == {"qk", "vo", "mlp", "heads"}


def test_the_readme_names_every_shipped_family() -> None:
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    said = text.partition("Proven beforehand")[2].partition("Any other class")[0]
    assert re.findall(r"`(\S+)`", said) == sorted({spec.model_type for spec in specs.shipped("")})


def test_lookup_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import json, sys; from unmergeable.specs import find_spec;"
        "config, shapes = json.load(sys.stdin);"
        "find_spec(config, {k: tuple(v) for k, v in shapes.items()}, prove=False);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'scipy')))"
    )
    text = json.dumps([LLAMA, llama_shapes()])
    assert subprocess.run([sys.executable, "-c", code], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "more",
    [
        {"head_dim": 16},  # a size
        {"num_key_value_heads": 8},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192}},
        {"attention_dropout": 0.1, "bos_token_id": 5, "initializer_range": 0.5, "_name_or_path": "x"},
    ],
)  # fmt: skip
def test_sizes_and_inert_fields_change_nothing(more: dict[str, Any]) -> None:
    config = {**LLAMA, **more}
    assert find(config, llama_shapes(config)).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "more",
    [
        {"qk_norm": True},
        {"hidden_act": "relu"},
        {"a_new_field": 1},
        {"partial_rotary_factor": 0.5},
        {"pretraining_tp_": 2},
        {"rope_scaling": {"rope_type": "a_new_kind", "factor": 2.0}},
    ],
)
def test_an_unknown_field_or_value_is_never_assumed(more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no proven spec for LlamaForCausalLM"):
        find({**LLAMA, **more})


def test_a_config_that_contradicts_the_shapes_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match="by the config, got 16"):
        find({**LLAMA, "num_key_value_heads": 4})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json"),
        ({}, "does not say which class"),
        ({"model_type": "bert"}, "does not say which class"),
        ({"architectures": "LlamaForCausalLM"}, "does not say which class"),
        ({"architectures": ["MyOwnModel"]}, "no proven spec for MyOwnModel"),
    ],
)
def test_what_names_no_known_class_is_refused(config: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        specs.find_spec(config, llama_shapes(), prove=False)


def test_a_class_that_transformers_lacks_is_refused_when_proving() -> None:
    with pytest.raises(InputError, match="no model class MyOwnModel"):
        specs.find_spec({"architectures": ["MyOwnModel"]}, llama_shapes())


def test_a_new_configuration_is_proven_once_and_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**LLAMA, "hidden_act": "relu"}
    spec, _ = specs.find_spec(config, llama_shapes())
    assert {site.kind for site in spec.sites} == {"qk", "vo", "mlp", "heads"}
    assert spec.evidence["joint_error"] < 1e-9
    assert all(site.evidence["guard"] > 1e-6 for site in spec.sites)
    assert list(cache.glob("LlamaForCausalLM-*.json"))
    assert find(config).digest == spec.digest
    monkeypatch.setattr(specs, "_source_digest", lambda module: "changed")
    with pytest.raises(InputError, match="no proven spec"):
        find(config)


def test_a_damaged_cache_entry_is_no_spec(cache: Path) -> None:
    cache.mkdir()
    (cache / "LlamaForCausalLM-0.json").write_text("{")
    with pytest.raises(InputError, match="no proven spec"):
        find({**LLAMA, "hidden_act": "relu"})


def test_a_spec_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(find(LLAMA).as_dict()))
    found, _ = specs.find_spec(LLAMA, llama_shapes(), spec_file=path, prove=False)
    assert found.digest == find(LLAMA).digest
    with pytest.raises(InputError, match="another configuration") as caught:
        specs.find_spec({**LLAMA, "hidden_act": "gelu"}, llama_shapes(), spec_file=path)
    assert "hidden_act = 'silu'" in str(caught.value)
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        specs.find_spec(LLAMA, llama_shapes(), spec_file=path)
    with pytest.raises(InputError, match="cannot read"):
        specs.find_spec(LLAMA, llama_shapes(), spec_file=tmp_path / "none.json")


@pytest.mark.parametrize(
    "spec", list(specs.shipped("")), ids=lambda spec: f"{spec.architecture}-{spec.layout}"
)
def test_every_shipped_spec_is_sound(spec: Spec) -> None:
    """Well-formed, with evidence nine orders below the guard, and keyed by the structure of its defaults."""
    assert Spec.from_dict(spec.as_dict()).digest == spec.digest
    sites = spec.evidence["sites"]
    assert sites["error"] < 1e-12
    assert sites["guard"] > 1e-6
    assert spec.evidence["joint_error"] < 1e-12
    assert spec.evidence["forwards"] > 50
    assert spec.configs
    kinds = {site.kind for site in spec.sites}
    assert kinds & {"qk", "vo"}
    assert "mlp" in kinds
    for site in spec.sites:
        site.check()
        for slot in site.slots:
            for index in slot.axes.values():
                parse_index(index.text)


def test_no_two_shipped_specs_of_a_class_claim_one_config_and_layout() -> None:
    seen: dict[tuple[str, str, str], Spec] = {}
    for spec in specs.shipped(""):
        for config in spec.configs:
            key = (spec.architecture, spec.layout, json.dumps(config, sort_keys=True))
            assert key not in seen, key
            seen[key] = spec


def test_the_canonical_config_gives_every_size() -> None:
    spec, config = specs.find_spec(LLAMA, llama_shapes(), prove=False)
    assert structure(canonical_config(LLAMA, spec.defaults)) in spec.configs
    match = match_spec(spec, llama_shapes(), config)
    qk = next(site for site in match.sites if site.site.kind == "qk")
    assert dict(qk.sizes) == {"g": 2, "r": 4, "c": 2, "a": 4}
    assert evaluate_size(qk.site.sizes["g"], config) == 2
