"""The configurations whose specs are shipped: configs as published checkpoints have them, a family at a time.

Sizes do not matter, every other field does: a checkpoint whose config.json has a field or value that is not here
is proven when it is first locked. Each config is proven for every class listed with its family.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

CAUSAL = "Model ForCausalLM ForSequenceClassification"
ENCODER = "Model ForMaskedLM ForSequenceClassification ForTokenClassification ForQuestionAnswering"

#: Grouped queries: the general case, of which as many groups as heads is one.
GROUPED: Config = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
ABSOLUTE: Config = {"position_embedding_type": "absolute"}
DEBERTA: Config = {
    "relative_attention": True,
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 256,
    "max_relative_positions": -1,
    "type_vocab_size": 0,
}
CLIP_TOWERS: Config = {
    "text_config": {"model_type": "clip_text_model", "hidden_size": 512, "num_attention_heads": 8},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 768, "num_attention_heads": 12},
}
DEEPSEEK: Config = {
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "kv_lora_rank": 512,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "ep_size": 1,
}

#: family -> (class prefix, class endings, model type, configs)
FAMILIES: dict[str, tuple[str, str, str, tuple[Config, ...]]] = {
    "llama": ("Llama", CAUSAL, "llama", (GROUPED, {**GROUPED, "attention_bias": True}, {**GROUPED, "mlp_bias": True})),
    "mistral": ("Mistral", CAUSAL, "mistral", (GROUPED, {**GROUPED, "sliding_window": None})),
    "qwen2": (
        "Qwen2",
        CAUSAL,
        "qwen2",
        ({**GROUPED, "use_sliding_window": False, "sliding_window": 32768},),
    ),
    "qwen3": (
        "Qwen3",
        CAUSAL,
        "qwen3",
        ({**GROUPED, "use_sliding_window": False, "sliding_window": None}, {**GROUPED, "sliding_window": 4096}),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        "Model ForCausalLM",
        "qwen3_moe",
        tuple(
            {
                **GROUPED,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "mlp_only_layers": [],
                "decoder_sparse_step": 1,
                "use_sliding_window": False,
                "sliding_window": None,
                **own,
            }
            for own in ({"norm_topk_prob": True}, {})
        ),
    ),
    "mixtral": ("Mixtral", "Model ForCausalLM", "mixtral", (GROUPED, {**GROUPED, "sliding_window": 4096})),
    "gemma2": (
        "Gemma2",
        "Model ForCausalLM ForSequenceClassification",
        "gemma2",
        ({}, {"hidden_act": "gelu_pytorch_tanh"}),
    ),
    "gemma3": (
        "Gemma3",
        "TextModel ForCausalLM",
        "gemma3_text",
        ({}, {"num_key_value_heads": 1, "sliding_window_pattern": 6}),
    ),
    "phi3": (
        "Phi3",
        CAUSAL,
        "phi3",
        tuple(
            {**GROUPED, **own}
            for own in (
                {},
                {"sliding_window": 2047},
                {"partial_rotary_factor": 0.75},
                {"partial_rotary_factor": 0.75, "sliding_window": 262144},
            )
        ),
    ),
    "gpt2": ("GPT2", "Model LMHeadModel ForSequenceClassification ForTokenClassification", "gpt2", ({},)),
    "gpt_neox": (
        "GPTNeoX",
        "Model ForCausalLM ForSequenceClassification",
        "gpt_neox",
        ({"rotary_pct": 0.25}, {"rotary_pct": 0.25, "use_parallel_residual": False}, {"rotary_pct": 1.0}),
    ),
    "opt": (
        "OPT",
        "Model ForCausalLM ForSequenceClassification",
        "opt",
        ({}, {"do_layer_norm_before": False, "word_embed_proj_dim": 512, "hidden_size": 1024}),
    ),
    "bloom": (
        "Bloom",
        "Model ForCausalLM ForSequenceClassification",
        "bloom",
        (
            {},
            {
                "attention_softmax_in_fp32": True,
                "bias_dropout_fusion": True,
                "masked_softmax_fusion": True,
                "skip_bias_add": True,
            },
        ),
    ),
    "falcon": (
        "Falcon",
        "Model ForCausalLM ForSequenceClassification",
        "falcon",
        (
            {},  # 7b: one key-value head, parallel attention
            *(
                {
                    "new_decoder_architecture": True,
                    "num_kv_heads": 8,
                    "num_attention_heads": 64,
                    "hidden_size": 4096,
                    **own,
                }
                for own in ({}, {"num_ln_in_parallel_attn": 2})
            ),
            {"multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},  # rw
        ),
    ),
    "t5": (
        "T5",
        "Model ForConditionalGeneration EncoderModel",
        "t5",
        (
            {},
            {"n_positions": 512},
            {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
            {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 8},
        ),
    ),
    "bert": ("Bert", f"{ENCODER} ForPreTraining", "bert", ({}, ABSOLUTE, {"hidden_act": "relu"})),
    "roberta": ("Roberta", ENCODER, "roberta", ({}, ABSOLUTE)),
    "distilbert": ("DistilBert", ENCODER, "distilbert", ({}, {"tie_weights_": True})),
    "deberta_v2": (
        "DebertaV2",
        ENCODER,
        "deberta-v2",
        (
            {**DEBERTA, "share_att_key": True, "pos_att_type": "p2c|c2p", "pooler_hidden_size": 1536},
            {**DEBERTA, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
            {**DEBERTA, "share_att_key": False, "pos_att_type": ["p2c", "c2p"]},
        ),
    ),
    "vit": ("ViT", "Model ForImageClassification", "vit", ({}, {"qkv_bias": False})),
    "clip": (
        "CLIP",
        "Model",
        "clip",
        (
            {},
            CLIP_TOWERS,
            {**CLIP_TOWERS, "text_config_dict": None, "vision_config_dict": None},
            {
                "text_config": {"model_type": "clip_text_model", "hidden_act": "gelu"},
                "vision_config": {"model_type": "clip_vision_model", "hidden_act": "gelu"},
            },
        ),
    ),
    "clip_text": (
        "CLIP",
        "TextModel TextModelWithProjection",
        "clip_text_model",
        ({}, {"hidden_act": "gelu"}),
    ),
    "clip_vision": (
        "CLIP",
        "VisionModel VisionModelWithProjection",
        "clip_vision_model",
        ({}, {"hidden_act": "gelu"}),
    ),
    "siglip": (
        "Siglip",
        "Model",
        "siglip",
        (
            {},
            {
                "text_config": {"model_type": "siglip_text_model"},
                "vision_config": {"model_type": "siglip_vision_model"},
            },
        ),
    ),
    "dinov2": ("Dinov2", "Model ForImageClassification", "dinov2", ({}, {"use_swiglu_ffn": True})),
    "whisper": ("Whisper", "Model ForConditionalGeneration", "whisper", ({},)),
    "deepseek_v3": (
        "DeepseekV3",
        "Model ForCausalLM",
        "deepseek_v3",
        (
            {**DEEPSEEK, "q_lora_rank": 1536, "n_group": 8, "topk_group": 4},
            {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
        ),
    ),
    "gpt_oss": (
        "GptOss",
        "Model ForCausalLM",
        "gpt_oss",
        (
            {},
            {
                "experts_per_token": 4,
                "swiglu_limit": 7.0,
                "initial_context_length": 4096,
                "layer_types": ["sliding_attention", "full_attention"] * 18,
                "rope_theta": 150000,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                    "original_max_position_embeddings": 4096,
                },
            },
        ),
    ),
}  # fmt: skip


def configurations(family: str) -> list[Config]:
    """Every `config.json` of a family: all configs for all of its classes."""
    prefix, endings, model_type, variants = FAMILIES[family]
    return [
        {"model_type": model_type, "architectures": [prefix + ending], **variant}
        for variant in variants
        for ending in endings.split()
    ]
