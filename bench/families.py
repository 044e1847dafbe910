"""The configurations whose specs are shipped: one entry for every structure of a family.

Only fields that decide structure stand here; sizes are what the class defaults to and do not matter. Each entry
is proven for every class listed with it.
"""

from __future__ import annotations

from typing import Any

CAUSAL = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
ENCODER = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

Config = dict[str, Any]

#: family -> (class prefix, class endings, model type, variants)
FAMILIES: dict[str, tuple[str, tuple[str, ...], str, tuple[Config, ...]]] = {
    "llama": ("Llama", CAUSAL, "llama", ({}, {"attention_bias": True}, {"mlp_bias": True})),
    "mistral": ("Mistral", CAUSAL, "mistral", ({}, {"sliding_window": None})),
    "qwen2": ("Qwen2", CAUSAL, "qwen2", ({},)),
    "qwen3": ("Qwen3", CAUSAL, "qwen3", ({}, {"attention_bias": True})),
    "qwen3_moe": ("Qwen3Moe", ("Model", "ForCausalLM"), "qwen3_moe", ({}, {"norm_topk_prob": True})),
    "mixtral": ("Mixtral", ("Model", "ForCausalLM"), "mixtral", ({}, {"sliding_window": 4096})),
    "gemma2": ("Gemma2", ("Model", "ForCausalLM", "ForSequenceClassification"), "gemma2", ({},)),
    "gemma3": ("Gemma3", ("TextModel", "ForCausalLM"), "gemma3_text", ({},)),
    "phi3": ("Phi3", CAUSAL, "phi3", ({}, {"sliding_window": 2047}, {"partial_rotary_factor": 0.75})),
    "gpt2": ("GPT2", ("Model", "LMHeadModel", "ForSequenceClassification", "ForTokenClassification"), "gpt2", ({},)),
    "gpt_neox": (
        "GPTNeoX",
        ("Model", "ForCausalLM", "ForSequenceClassification"),
        "gpt_neox",
        ({"rotary_pct": 0.25}, {"rotary_pct": 0.25, "use_parallel_residual": False}, {"rotary_pct": 1.0}),
    ),
    "opt": (
        "OPT",
        ("Model", "ForCausalLM", "ForSequenceClassification"),
        "opt",
        ({}, {"do_layer_norm_before": False, "word_embed_proj_dim": 512, "hidden_size": 1024}),
    ),
    "bloom": ("Bloom", ("Model", "ForCausalLM", "ForSequenceClassification"), "bloom", ({},)),
    "falcon": (
        "Falcon",
        ("Model", "ForCausalLM", "ForSequenceClassification"),
        "falcon",
        (
            {},  # 7b: one key-value head, parallel attention
            {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "hidden_size": 4096},
            {"multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},  # rw
        ),
    ),
    "t5": (
        "T5",
        ("Model", "ForConditionalGeneration", "EncoderModel"),
        "t5",
        ({}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ),
    "bert": ("Bert", (*ENCODER, "ForPreTraining"), "bert", ({}, {"hidden_act": "relu"})),
    "roberta": ("Roberta", ENCODER, "roberta", ({},)),
    "distilbert": ("DistilBert", ENCODER, "distilbert", ({},)),
    "deberta_v2": (
        "DebertaV2",
        ENCODER,
        "deberta-v2",
        (
            {
                "relative_attention": True,
                "position_biased_input": False,
                "pos_att_type": ["p2c", "c2p"],
                "share_att_key": True,
                "norm_rel_ebd": "layer_norm",
                "position_buckets": 256,
                "pooler_hidden_act": "gelu",
                "pooler_dropout": 0,
                "type_vocab_size": 0,
            },
            {
                "relative_attention": True,
                "position_biased_input": False,
                "pos_att_type": ["p2c", "c2p"],
                "share_att_key": False,
                "norm_rel_ebd": "layer_norm",
                "position_buckets": 256,
                "type_vocab_size": 0,
            },
            {"type_vocab_size": 0},
        ),
    ),
    "vit": ("ViT", ("Model", "ForImageClassification"), "vit", ({}, {"qkv_bias": False})),
    "clip": (
        "CLIP",
        ("Model", "TextModel", "TextModelWithProjection", "VisionModel", "VisionModelWithProjection"),
        "clip",
        ({}, {"text_config": {"hidden_act": "gelu"}, "vision_config": {"hidden_act": "gelu"}}),
    ),
    "siglip": ("Siglip", ("Model", "TextModel", "VisionModel"), "siglip", ({},)),
    "dinov2": ("Dinov2", ("Model", "ForImageClassification"), "dinov2", ({}, {"use_swiglu_ffn": True})),
    "whisper": ("Whisper", ("Model", "ForConditionalGeneration"), "whisper", ({},)),
    "deepseek_v3": ("DeepseekV3", ("Model", "ForCausalLM"), "deepseek_v3", ({}, {"n_group": 1, "topk_group": 1})),
    "gpt_oss": ("GptOss", ("Model", "ForCausalLM"), "gpt_oss", ({},)),
}


def configurations(family: str) -> list[Config]:
    """Every `config.json` of a family: all variants for all of its classes."""
    prefix, endings, model_type, variants = FAMILIES[family]
    return [
        {"model_type": model_type, "architectures": [prefix + ending], **variant}
        for variant in variants
        for ending in endings
    ]
