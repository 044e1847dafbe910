"""Configurations that describe a part of the model at the top, as published ones do."""

from __future__ import annotations

import pytest
import transformers

from unmergeable.config import CLASS, canonical_config, class_defaults, for_class

pytestmark = pytest.mark.filterwarnings("ignore")

# As Qwen2-VL-2B-Instruct was published: its language model is described at the top.
QWEN2_VL = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16},
    "vocab_size": 151936,
}


def test_what_is_described_at_the_top_goes_where_the_class_reads_it() -> None:
    kind = transformers.Qwen2VLConfig
    defaults = class_defaults(kind)
    flat = {**QWEN2_VL, "hidden_act": "relu", "sliding_window": 7, "use_sliding_window": True}
    found = canonical_config(flat, defaults)
    part = found["text_config"]
    assert (part["hidden_act"], part["sliding_window"], part["num_key_value_heads"]) == ("relu", 7, 2)
    assert not {"hidden_act", "sliding_window", "num_key_value_heads", "rope_scaling"} & found.keys()
    # The class reads both alike.
    nested = {name: value for name, value in found.items() if name != CLASS}
    read = [kind.from_dict(for_class(one)).text_config.to_dict() for one in (flat, nested)]
    apart = {name for name in read[0] if read[0][name] != read[1].get(name)}
    assert apart <= {"dtype", "rope_parameters"}
    assert read[0]["rope_parameters"].items() >= read[1]["rope_parameters"].items()
    # With a language model in its own place the class has it from there; so where nobody knows how it reads a field.
    for more in ({"text_config": {"hidden_size": 64}}, {"layer_types": ["full_attention"] * 28}):
        kept = canonical_config({**flat, **more}, defaults)
        assert kept["hidden_act"] == "relu"
        assert (kept["text_config"] or {}).get("hidden_act") != "relu"
