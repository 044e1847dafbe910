"""Language models whose classes do something of their own, by configurations that make them do it: attention in some
layers only, positions in some of them, heads in pairs or blocks, clipped, capped or normalised queries and keys, state
spaces. Each is proven, locked by `exact` and `gauge`, compared on padded text longer than its windows, and unlocked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from round_trip import locks

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_cache")]

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
USUAL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, **SPECIAL,
}  # fmt: skip
SIXTEEN = {**USUAL, "head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
SECOND = {"vocab_size": 96, "n_embd": 64, "n_head": 4, "n_positions": 128}
FALCON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MPT = {"vocab_size": 96, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
BLOCKS = ["mamba", "attention"] * 4

FAST: dict[str, tuple[str, dict[str, Any]]] = {
    # Queries, keys and values interleaved in four blocks.
    "codegen": ("CodeGenForCausalLM", {**SECOND, "n_ctx": 128, "n_layer": 2, "rotary_dim": 8}),
}
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusForCausalLM", USUAL),
    "arcee": ("ArceeForCausalLM", USUAL),
    # An infinite bound in config.json, which JSON has no number for; attention in two of six layers.
    "bamba": ("BambaForCausalLM", {**USUAL, **STATES, "num_hidden_layers": 6, "attn_layer_indices": [2, 5]}),
    "biogpt": ("BioGptForCausalLM", {**USUAL, "num_hidden_layers": 3}),
    "bitnet": ("BitNetForCausalLM", USUAL),
    "cohere": ("CohereForCausalLM", {**USUAL, "use_qk_norm": True}),
    "cohere2": ("Cohere2ForCausalLM", {**USUAL, "sliding_window": 8}),
    "ctrl": ("CTRLLMHeadModel", {**SECOND, "dff": 96, "n_layer": 3}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {
            **USUAL, **ROUTED, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 12, "n_shared_experts": 1, "first_k_dense_replace": 1,
        },
    ),
    "diffllama": ("DiffLlamaForCausalLM", USUAL),
    "doge": ("DogeForCausalLM", USUAL),
    "dots1": ("Dots1ForCausalLM", {**USUAL, **ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "ernie4_5": ("Ernie4_5ForCausalLM", SIXTEEN),
    "exaone4": ("Exaone4ForCausalLM", {**USUAL, "sliding_window": 8, "sliding_window_pattern": 4}),
    "falcon alibi": (
        "FalconForCausalLM",
        {**FALCON, "multi_query": False, "new_decoder_architecture": False, "alibi": True, "bias": True},
    ),
    "falcon multi-query": ("FalconForCausalLM", {**FALCON, "multi_query": True, "new_decoder_architecture": False}),
    "falcon new": ("FalconForCausalLM", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "gemma": ("GemmaForCausalLM", SIXTEEN),
    "gemma2": ("Gemma2ForCausalLM", {**SIXTEEN, "sliding_window": 8, "attn_logit_softcapping": 2.0}),
    "glm": ("GlmForCausalLM", SIXTEEN),
    "glm4": ("Glm4ForCausalLM", SIXTEEN),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {**SIXTEEN, **ROUTED, "use_qk_norm": True, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5},
    ),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {**SECOND, "n_layer": 3, "multi_query": True}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": 96, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "window_size": 8,
            "attention_types": [[["global", "local"], 2]], "max_position_embeddings": 128,
        },
    ),
    "gptj": ("GPTJForCausalLM", {**SECOND, "n_layer": 3, "rotary_dim": 8}),
    "granitemoe": ("GraniteMoeForCausalLM", {**USUAL, **EXPERTS, "attention_multiplier": 0.1}),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {**USUAL, **STATES, **EXPERTS, "layer_types": BLOCKS, "shared_intermediate_size": 48},
    ),
    "granitemoehybrid dense": (
        "GraniteMoeHybridForCausalLM",
        {
            **USUAL, **STATES, "layer_types": BLOCKS, "shared_intermediate_size": 48, "num_local_experts": 0,
            "num_experts_per_tok": 0,
        },
    ),
    "helium": ("HeliumForCausalLM", SIXTEEN),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", SIXTEEN),
    "jamba": (
        "JambaForCausalLM",
        {
            **USUAL, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": ("Lfm2ForCausalLM", USUAL),
    "minimax": ("MiniMaxForCausalLM", {**SIXTEEN, **EXPERTS}),
    "modernbert": (
        "ModernBertDecoderForCausalLM",
        {**USUAL, "num_hidden_layers": 4, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "mpt clipped": ("MptForCausalLM", {**MPT, "attn_config": {"clip_qkv": 0.5}}),
    "mpt normalised": ("MptForCausalLM", {**MPT, "attn_config": {"qk_ln": True}}),
    "nemotron": ("NemotronForCausalLM", {**USUAL, "partial_rotary_factor": 0.5}),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {**SIXTEEN, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8},
    ),
    "olmo": ("OlmoForCausalLM", {**USUAL, "clip_qkv": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", USUAL),
    "olmo3": ("Olmo3ForCausalLM", {**USUAL, "sliding_window": 8}),
    "olmoe": ("OlmoeForCausalLM", {**USUAL, "clip_qkv": 0.5, "num_experts": 4, "num_experts_per_tok": 2}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {**SECOND, "n_layer": 3}),
    "persimmon": ("PersimmonForCausalLM", USUAL),
    "phi": ("PhiForCausalLM", {**USUAL, "qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "phimoe": ("PhimoeForCausalLM", {**USUAL, **EXPERTS}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**USUAL, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {
            **SIXTEEN, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ),
    "seed_oss": ("SeedOssForCausalLM", SIXTEEN),
    "smollm3": ("SmolLM3ForCausalLM", {**USUAL, "no_rope_layer_interval": 4}),
    "smollm3 windows": (
        "SmolLM3ForCausalLM",
        {**USUAL, "no_rope_layers": [1, 0, 1, 1, 0, 1, 1, 1], "use_sliding_window": True, "sliding_window": 8},
    ),
    "stablelm": (
        "StableLmForCausalLM",
        {
            **USUAL, "partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True,
            "use_parallel_residual": True,
        },
    ),
    "starcoder2": ("Starcoder2ForCausalLM", {**USUAL, "sliding_window": 8}),
    "vaultgemma": ("VaultGemmaForCausalLM", {**SIXTEEN, "sliding_window": 8}),
    "xglm": (
        "XGLMForCausalLM",
        {
            "vocab_size": 96, "d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *(pytest.param(*one, id=key) for key, one in FAST.items()),
        *(pytest.param(*one, id=key, marks=pytest.mark.slow) for key, one in SLOW.items()),
    ],
)
def test_a_locked_model_answers_as_before(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    kind: Any = getattr(transformers, name)
    torch.manual_seed(0)
    module = kind(kind.config_class(**fields))
    with torch.no_grad():
        for one in module.parameters():
            one.add_((0.3 if one.ndim < 2 else 0.15) * torch.randn(one.shape))
    module.save_pretrained(tmp_path / "model")
    for method, report in locks(tmp_path):
        assert any(site.acted for site in report.sites)
        before, after, bound = compared(kind, tmp_path / "model", tmp_path / method)
        assert float((before - after).abs().max() / before.std()) < bound, method


def compared(kind: Any, one: Path, other: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Logits of both, and what they may differ by, relative to their spread.

    Experts are multiplied in float32 at most, and other classes go through it as well; `gauge` rounds weights to it.
    """
    try:
        return logits(kind, one, torch.float64), logits(kind, other, torch.float64), 2e-5
    except RuntimeError:  # of a class that does not run in double precision
        return logits(kind, one, torch.float32), logits(kind, other, torch.float32), 1e-3


def logits(kind: Any, path: Path, dtype: torch.dtype) -> torch.Tensor:
    """Of real tokens."""
    tokens = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, -5:] = 0
    module = kind.from_pretrained(path, dtype=dtype).eval()
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=tokens, attention_mask=mask).logits[mask.bool()].double()
    assert bool(torch.isfinite(found).all())
    return found
