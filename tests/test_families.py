"""Every required family end to end: lock with `exact` and `gauge`, reload through stock classes, compare, unlock.

Tiny models of the real classes with random weights, biases and norms, in many shards, locked by the shipped spec
as a real checkpoint is. Compared in fp64, where a symmetry holds to 1e-10 or not at all, with padding, eager and
sdpa attention, and decoding with a cache; and in fp32 as users load them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from family_check import lock_and_compare
from unmergeable.specs import find_spec, shipped

GROUPED = {"num_attention_heads": 32, "num_key_value_heads": 8}
DEBERTA = {
    "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm", "position_buckets": 256, "type_vocab_size": 0,
}  # fmt: skip
DEEPSEEK = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "ep_size": 1}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}

#: (class, model type, further fields, layout of names)
CASES: list[tuple[str, str, dict[str, Any], str]] = [
    ("LlamaForCausalLM", "llama", {**GROUPED, **TIED}, "disk"),
    ("LlamaForCausalLM", "llama", {**GROUPED, "attention_bias": True}, "disk"),
    ("LlamaForSequenceClassification", "llama", {}, "disk"),
    ("MistralForCausalLM", "mistral", GROUPED, "disk"),
    ("Qwen2ForCausalLM", "qwen2", {**GROUPED, **TIED}, "disk"),
    ("Qwen3ForCausalLM", "qwen3", GROUPED, "disk"),
    ("Qwen3MoeForCausalLM", "qwen3_moe", {}, "disk"),
    ("Qwen3MoeForCausalLM", "qwen3_moe", {}, "memory"),
    ("MixtralForCausalLM", "mixtral", {}, "disk"),
    ("MixtralForCausalLM", "mixtral", {}, "memory"),
    ("Gemma2ForCausalLM", "gemma2", {}, "disk"),
    ("Gemma3ForCausalLM", "gemma3_text", {}, "disk"),
    ("Phi3ForCausalLM", "phi3", GROUPED, "disk"),
    ("Phi3ForCausalLM", "phi3", {**GROUPED, "partial_rotary_factor": 0.75}, "disk"),
    ("GPT2LMHeadModel", "gpt2", {}, "disk"),
    ("GPT2LMHeadModel", "gpt2", {}, "bare"),
    ("GPTNeoXForCausalLM", "gpt_neox", {"rotary_pct": 0.25}, "disk"),
    ("OPTForCausalLM", "opt", {}, "disk"),
    ("BloomForCausalLM", "bloom", {}, "disk"),
    ("BloomForCausalLM", "bloom", {}, "bare"),
    ("FalconForCausalLM", "falcon", {}, "disk"),
    (
        "FalconForCausalLM",
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "hidden_size": 4096},
        "disk",
    ),
    (
        "FalconForCausalLM",
        "falcon",
        {"multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},
        "disk",
    ),
    ("T5ForConditionalGeneration", "t5", {}, "disk"),
    ("T5ForConditionalGeneration", "t5", {"feed_forward_proj": "gated-gelu", **UNTIED}, "disk"),
    ("BertForMaskedLM", "bert", {}, "disk"),
    ("BertModel", "bert", {"hidden_act": "relu"}, "disk"),
    ("RobertaForMaskedLM", "roberta", {}, "disk"),
    ("DistilBertForSequenceClassification", "distilbert", {}, "disk"),
    ("DebertaV2ForMaskedLM", "deberta-v2", {**DEBERTA, "share_att_key": True}, "disk"),
    ("DebertaV2ForSequenceClassification", "deberta-v2", {**DEBERTA, "share_att_key": False}, "disk"),
    ("ViTForImageClassification", "vit", {}, "disk"),
    ("ViTForImageClassification", "vit", {}, "memory"),
    ("CLIPModel", "clip", {}, "disk"),
    ("SiglipModel", "siglip", {}, "disk"),
    ("Dinov2Model", "dinov2", {}, "disk"),
    ("Dinov2ForImageClassification", "dinov2", {"use_swiglu_ffn": True}, "disk"),
    ("WhisperForConditionalGeneration", "whisper", {}, "disk"),
    (
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        {**DEEPSEEK, "n_group": 1, "topk_group": 1, "q_lora_rank": None},
        "disk",
    ),
    ("DeepseekV3ForCausalLM", "deepseek_v3", {**DEEPSEEK, "n_group": 8, "topk_group": 4}, "memory"),
    ("GptOssForCausalLM", "gpt_oss", {}, "disk"),
]
FP64 = 1e-10


def name_of(case: tuple[str, str, dict[str, Any], str]) -> str:
    own = "-".join(str(value) for value in case[2].values() if not isinstance(value, int | list))
    return f"{case[0]}-{own}-{case[3]}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_lock_reload_compare_unlock(
    case: tuple[str, str, dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unmergeable.prove.child import in_child

    monkeypatch.setenv("UNMERGEABLE_CACHE", str(tmp_path / "cache"))
    architecture, model_type, fields, layout = case
    config = {"model_type": model_type, "architectures": [architecture], **fields}
    found = in_child(lock_and_compare, config, layout, str(tmp_path), timeout=240.0)

    assert not (tmp_path / "cache").exists(), "the shipped spec was not enough"
    assert sum(name.endswith(".safetensors") for name in found["files"]) >= 2
    for method, errors in found["methods"].items():
        measured = {mode: error for mode, error in errors.items() if error is not None}
        assert measured, method
        assert max(measured.values()) <= FP64, (method, measured)
    assert found["undone"] == (found["files"], found["files"])
    assert found["gauge_undone"] <= FP64
    for method, sites in found["sites"].items():
        kinds = {kind for kind, _, acted, _ in sites if acted}
        assert kinds & {"qk", "vo"}, method
        assert "mlp" in kinds, method
        assert all(moved >= 0.5 for _, _, acted, moved in sites if acted and moved is not None)
    assert all(len(reason.split()) >= 4 for reason in found["refused"]), found["refused"]
    _compare_fp32(architecture, tmp_path)


def _compare_fp32(architecture: str, folder: Path) -> None:
    """The locked model in fp32 as a user loads it: the same outputs to fp32 rounding."""
    import torch
    import transformers

    from unmergeable.prove.inputs import flatten_outputs, make_inputs

    cls = getattr(transformers, architecture)
    source = cls.from_pretrained(folder / "source", dtype=torch.float32).eval()
    inputs = make_inputs(source, json.loads((folder / "source" / "config.json").read_text()))[:1]
    for method in ("exact", "gauge"):
        model = cls.from_pretrained(folder / method, dtype=torch.float32).eval()
        for entry in inputs:
            arguments = {
                name: value.float()
                if isinstance(value, torch.Tensor) and value.is_floating_point()
                else value
                for name, value in entry.arguments.items()
            }
            with torch.no_grad():
                old = flatten_outputs(source(**arguments), entry.masks)
                new = flatten_outputs(model(**arguments), entry.masks)
            assert old
            for a, b in zip(new, old, strict=True):
                assert float((a - b).norm() / b.norm()) <= 2e-4, method


def test_a_shipped_spec_fits_its_classes_at_their_own_sizes() -> None:
    """Those that their configurations have by default, not those of the miniatures that the spec is from."""
    import torch
    import transformers

    for architecture, model_type, fields, _ in CASES:
        cls = getattr(transformers, architecture)
        sizes = {"hidden_size": 4096} if "num_attention_heads" in fields else {}
        configuration = cls.config_class(**{**sizes, **fields})
        with torch.device("meta"):
            module = cls(configuration)
        tied = getattr(module, "all_tied_weights_keys", {})
        shapes = {name: tuple(one.shape) for name, one in module.state_dict().items() if name not in tied}
        config = {**json.loads(configuration.to_json_string()), "architectures": [architecture]}
        found = find_spec({**config, "model_type": model_type}, shapes, prove=False)
        assert found, (architecture, fields)


def test_every_required_family_is_shipped() -> None:
    required = {
        "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "phi3", "gpt2",
        "gpt_neox", "opt", "bloom", "falcon", "t5", "bert", "roberta", "distilbert", "deberta-v2", "vit", "clip",
        "siglip", "dinov2", "whisper", "deepseek_v3", "gpt_oss",
    }  # fmt: skip
    assert required <= {spec.model_type for spec in shipped("")}
    assert required <= {model_type for _, model_type, _, _ in CASES}
