"""Miniatures, inputs and the oracle, on a few architectures that differ in kind."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest

from unmergeable.config import CLASS, canonical_config, class_defaults, for_class, structure
from unmergeable.errors import InputError, RunError
from unmergeable.fields import DERIVED, INERT, PER_LAYER, SIZES
from unmergeable.prove.child import in_child

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "eos_token_id": [128001, 128008],
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
}
VIT = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "image_size": 224,
    "patch_size": 16,
}
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
CLIP = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "num_hidden_layers": 26,
    "sliding_window_pattern": 6,
}
BERT = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}


@pytest.fixture(scope="module", autouse=True)
def _imports():
    """Import model code once, here, so that every fork finds it; nothing computes in this process."""
    transformers = importlib.import_module("transformers")
    for config in (LLAMA, MIXTRAL, GPT2, VIT, T5, CLIP, GEMMA3, BERT):
        getattr(transformers, config["architectures"][0])


# ---- what runs in the child


def _facts(config):
    from unmergeable.prove.miniature import build_miniatures
    from unmergeable.prove.oracle import Oracle

    facts = []
    for miniature in build_miniatures(config):
        oracle = Oracle(miniature)
        rng = np.random.default_rng(0)
        moved = {
            name: oracle.error({name: value + 0.05 * rng.standard_normal(value.shape)}, limit=1e-6)
            for name, value in oracle.tensors.items()
        }
        name = next(name for name in oracle.tensors if moved[name] > 1e-6)
        change = {name: 1.1 * oracle.tensors[name]}
        facts.append(
            {
                "config": miniature.config,
                "names": list(oracle.tensors),
                "self": oracle.self_error,
                "again": oracle.error({}),
                "moved": moved,
                "fast": oracle.error(change),
                "files": oracle.reload_error(change),
                "nothing": oracle.reload_error({}, thorough=True),
                "decoded": oracle.decoded,
                "slow": sorted(oracle.slow),
                "labels": [entry.label for entry in miniature.inputs],
                "layouts": {} if miniature.shape else _self_errors(miniature),
            }
        )
    return facts


def _self_errors(miniature):
    from unmergeable.prove.oracle import Oracle

    errors = {}
    for layout in miniature.layouts():
        try:
            errors[layout] = Oracle(miniature, layout).self_error
        except RunError:
            errors[layout] = None
    return errors


def _rotary_and_values(config):
    """Errors of symmetries of grouped attention with half-split rotary pairs, and of other changes."""
    from unmergeable.prove.miniature import build_miniature
    from unmergeable.prove.oracle import Oracle

    results = []
    for shape in (0, 1):
        oracle = Oracle(build_miniature(config, shape=shape))
        sizes = oracle.miniature.config
        n_kv, d = sizes["num_key_value_heads"], sizes["head_dim"]
        repeat = sizes["num_attention_heads"] // n_kv
        block = "model.layers.1.self_attn."
        q, k, v, o = (oracle.tensors[f"{block}{leaf}_proj.weight"].copy() for leaf in "qkvo")
        rng = np.random.default_rng(3)
        mix = rng.standard_normal((d, d)) + 2 * np.eye(d)
        heads_v, heads_o = v.reshape(n_kv, d, -1), o.reshape(o.shape[0], n_kv, repeat, d)
        values = {
            f"{block}v_proj.weight": np.einsum("ij,gjx->gix", mix, heads_v).reshape(v.shape),
            f"{block}o_proj.weight": (heads_o @ np.linalg.inv(mix)).reshape(o.shape),
        }
        half = d // 2
        angle, scale = rng.uniform(0, 6, half), rng.uniform(0.5, 2, half)
        cos, sin = np.diag(scale * np.cos(angle)), np.diag(scale * np.sin(angle))
        turn = np.block([[cos, -sin], [sin, cos]])

        def keys(element, q=q, k=k, n_kv=n_kv, repeat=repeat, d=d, block=block):
            inverse = np.linalg.inv(element).T
            return {
                f"{block}k_proj.weight": np.einsum("ij,gjx->gix", element, k.reshape(n_kv, d, -1)).reshape(
                    k.shape
                ),
                f"{block}q_proj.weight": np.einsum(
                    "ij,gjx->gix", inverse, q.reshape(n_kv * repeat, d, -1)
                ).reshape(q.shape),
            }

        one_sided = {name: values[name] for name in list(values)[:1]}
        results.append(
            {
                "values": oracle.error(values),
                "values in files": oracle.reload_error(values, thorough=True),
                "one side": oracle.error(one_sided),
                "pairs": oracle.error(keys(turn)),
                "any keys": oracle.error(keys(mix)),
                "stopped early": oracle.error(keys(mix), limit=1e-9),
                "after all": oracle.error({}),
                "forwards": oracle.forwards,
            }
        )
    return results


def _bad_questions(config):
    from unmergeable.prove.miniature import build_miniature
    from unmergeable.prove.oracle import Oracle

    oracle = Oracle(build_miniature(config))
    name = next(iter(oracle.tensors))
    messages = []
    for change in ({"no.such": np.zeros(1)}, {name: np.zeros((1, 1))}):
        try:
            oracle.error(change)
        except InputError as error:
            messages.append(error.what)
    return messages, oracle.error({name: np.full(oracle.tensors[name].shape, np.nan)})


def _build(config, architecture=None):
    from unmergeable.prove.miniature import build_miniature

    return build_miniature(config, architecture).config


_KNOWN: dict[str, list[dict]] = {}


def _facts_once(config):
    kind = config["model_type"]
    if kind not in _KNOWN:
        _KNOWN[kind] = in_child(_facts, config, timeout=120)
    return _KNOWN[kind]


# ---- configurations


def test_names_are_in_one_class_only():
    assert not INERT & SIZES.keys()
    assert not PER_LAYER & (INERT | SIZES.keys())
    assert SIZES.keys() >= DERIVED


def test_two_spellings_have_one_canonical_form():
    transformers = importlib.import_module("transformers")
    defaults = class_defaults(transformers.LlamaConfig)
    new = {name: value for name, value in LLAMA.items() if not name.startswith("rope")} | {
        "rope_parameters": {
            "rope_theta": 500000.0,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    }
    assert canonical_config(LLAMA, defaults) == canonical_config(new, defaults)
    before = dict(LLAMA)
    canonical_config(LLAMA, defaults)
    assert before == LLAMA
    neox = class_defaults(transformers.GPTNeoXConfig)
    assert neox[CLASS]["legacy"]["rotary_pct"] == "partial_rotary_factor"
    assert (
        structure(canonical_config({"rotary_pct": 0.5}, neox))["rope_parameters"]["partial_rotary_factor"]
        == 0.5
    )


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 3}, True),
        ({"num_key_value_heads": 32}, True),
        ({"attention_dropout": 0.1, "eos_token_id": 2, "tie_word_embeddings": True, "rope_theta": 1e6}, True),
        ({"head_dim": 64}, True),
        ({"rope_scaling": None}, True),
        ({"rope_scaling": {"rope_type": "a_new_kind", "factor": 8.0}}, False),
        ({"partial_rotary_factor": 0.5}, False),
        ({"hidden_act": "relu"}, False),
        ({"attention_bias": True}, False),
        ({"never_heard_of": 1}, False),
    ],
)
def test_structure_keeps_what_can_matter(change, same):
    defaults = class_defaults(importlib.import_module("transformers").LlamaConfig)
    mine, other = (structure(canonical_config(config, defaults)) for config in (LLAMA, LLAMA | change))
    assert (mine == other) is same


def test_numbers_that_json_has_not():
    given = {
        "limits": [0.0, {"__float__": "Infinity"}],
        "a": {"b": {"__float__": "NaN"}},
        "c": {"__float__": "x"},
    }
    found = for_class(given)
    assert found["limits"] == [0.0, float("inf")]
    assert found["a"]["b"] != found["a"]["b"]
    assert found["c"] == given["c"]
    assert given["limits"][1] == {"__float__": "Infinity"}


def test_layer_lists_count_as_the_kinds_that_occur():
    long = {"layer_types": ["a", "a", "b"] * 4, "mlp_layer_types": ["x", "y", "y"] * 4}
    short = {"layer_types": ["b", "a", "a"], "mlp_layer_types": ["y", "y", "x"]}
    other = {"layer_types": ["b", "a", "a"], "mlp_layer_types": ["x", "y", "x"]}
    assert structure(long) == structure(short)
    assert structure(long) != structure(other)
    assert (
        structure({"q_lora_rank": None}) != structure({"q_lora_rank": 512}) == structure({"q_lora_rank": 8})
    )


def test_looking_up_structure_imports_neither_torch_nor_transformers():
    code = (
        "import sys, unmergeable.config, unmergeable.prove.shrink\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": "src"}).returncode == 0
    )


# ---- miniatures and oracle

#: Of one computation run twice in fp64: on some processors kernels, chosen by alignment, differ in the last bits.
AGAIN = 1e-14
#: What an attention score or this input cannot see: adding the same to all scores of a row changes nothing.
UNSEEN = ("key.bias", "k_proj.bias", "mask_token")


@pytest.mark.parametrize(
    "config", [LLAMA, MIXTRAL, GPT2, VIT, T5, CLIP, GEMMA3, BERT], ids=lambda c: c["model_type"]
)
def test_every_kind_builds_and_every_tensor_counts(config):
    facts = _facts_once(config)
    assert facts[0]["config"] != facts[1]["config"]
    assert facts[0]["layouts"]["disk"] < AGAIN
    for fact in facts:
        assert max(fact["self"], fact["again"], fact["nothing"]) < AGAIN
        assert fact["slow"] == []
        assert fact["fast"] == pytest.approx(fact["files"], rel=1e-6)
        assert fact["files"] > 1e-6
        for name, moved in fact["moved"].items():
            assert (1e-6 < moved < float("inf")) or name.endswith(UNSEEN), name
        assert fact["decoded"] == (config["model_type"] in ("llama", "mixtral", "gpt2", "t5", "gemma3_text"))
        assert structure(fact["config"]).get("hidden_act") == config.get(
            "hidden_act", structure(fact["config"]).get("hidden_act")
        )


def test_layouts_cover_old_and_new_names():
    mixtral = _facts_once(MIXTRAL)[0]
    assert any(".experts.3.w1." in name for name in mixtral["names"])
    assert mixtral["layouts"]["memory"] == 0.0
    assert _facts_once(GPT2)[0]["layouts"] == {"disk": 0.0, "disk bare": 0.0}
    bert = _facts_once(BERT)[0]["layouts"]
    assert bert["disk gamma"] == bert["disk bare gamma"] == 0.0


def test_the_oracle_tells_symmetries_from_near_misses():
    for result in in_child(_rotary_and_values, LLAMA):
        assert result["values"] < 1e-12
        assert result["values in files"] < 1e-12
        assert result["pairs"] < 1e-12
        assert result["one side"] > 1e-3
        assert result["any keys"] > 1e-3
        assert result["stopped early"] > 1e-9
        assert result["after all"] == 0.0
        assert result["forwards"] > 0


def test_bad_questions_are_refused_and_bad_numbers_are_infinite():
    messages, nan = in_child(_bad_questions, GPT2)
    assert messages == ["the checkpoint has no such tensor", "a changed tensor has another shape"]
    assert nan == float("inf")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "names no model class"),
        ({"architectures": ["NoSuchForCausalLM"]}, "no model class NoSuchForCausalLM"),
        ({"architectures": ["pipeline"]}, "no model class"),
        (LLAMA | {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        (LLAMA | {"hidden_act": "no-such"}, "no miniature"),
    ],
)
def test_what_cannot_be_built_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        in_child(_build, config)


def test_one_of_every_kind_of_layer_is_kept():
    config = in_child(_build, GEMMA3)
    assert set(config["layer_types"]) == {"sliding_attention", "full_attention"}
    assert config["num_key_value_heads"] == 1
