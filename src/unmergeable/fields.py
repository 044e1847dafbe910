"""What the names of configuration fields mean: which are sizes, which cannot matter, and nothing else.

A field is in one of three classes, by its exact name:

* a **size** says how many or how wide. A symmetry that holds at two different sizes is taken to hold at
  every size, so a specification is not keyed by it. `SIZES` gives each one the role that `shrink` needs.
* an **inert** field (a dropout, a token id, an epsilon, a rotary frequency) cannot decide which symmetry
  holds.
* every other field, known or unknown, is **structure**: a specification holds only for configurations that
  agree on it. A name that is missing here costs a proof; a name that is wrongly here costs a wrong lock.
  When in doubt a name stays out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def _names(*blocks: str) -> frozenset[str]:
    return frozenset(name for block in blocks for name in block.split())


_ROLES = {
    "width": """
        hidden_size n_embd n_embed d_model dim embed_dim model_dim encoder_hidden_size
        decoder_hidden_size hidden_sizes
    """,
    "inner": """
        intermediate_size n_inner d_ff dff ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
        mlp_dim hidden_dim ffn_size moe_intermediate_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp
        dense_intermediate_size encoder_intermediate_size decoder_intermediate_size feed_forward_size
        mlp_hidden_size projection_dim classifier_proj_size pooler_output_size
        shared_experts_intermediate_size
    """,
    "linked": """
        word_embed_proj_dim embedding_size pooler_hidden_size projection_size out_hidden_size
        cross_attention_hidden_size
    """,
    "heads": """
        num_attention_heads attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads
    """,
    "kv_heads": "num_key_value_heads num_kv_heads n_head_kv n_kv_heads num_query_groups",
    "head_dim": "head_dim d_kv attention_head_dim kv_channels head_size d_head attention_head_size",
    "other_kv_heads": "num_global_key_value_heads",
    "other_head_dim": "global_head_dim",
    "head_scale": "query_pre_attn_scalar",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim rotary_dim",
    "value_dim": "v_head_dim",
    "qk_dim": "qk_head_dim",
    "state_heads": "mamba_n_heads mamba_num_heads",
    "state_head_dim": "mamba_d_head mamba_head_dim",
    "state_width": "mamba_d_ssm",
    "state_dim": "mamba_d_state ssm_state_size",
    "state_chunk": "mamba_chunk_size",
    "linear_key_heads": "linear_num_key_heads",
    "linear_value_heads": "linear_num_value_heads",
    "linear_key_dim": "linear_key_head_dim",
    "linear_value_dim": "linear_value_head_dim",
    "rank": "kv_lora_rank q_lora_rank hidden_size_per_layer_input",
    "layers": """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers depth encoder_num_hidden_layers decoder_num_hidden_layers
    """,
    "dense_layers": "first_k_dense_replace num_dense_layers",
    "last_layers": "num_kv_shared_layers",
    "extra_layers": "num_nextn_predict_layers num_mtp_layers max_window_layers",
    "vocabulary": "vocab_size vocab_size_per_layer_input",
    "positions": """
        max_position_embeddings n_positions n_ctx max_target_positions max_length seq_length
        max_sequence_length context_length max_text_len
    """,
    "source_positions": "max_source_positions",
    "window": "sliding_window attention_window local_attention window_size",
    "experts": "num_experts num_local_experts n_routed_experts moe_num_experts",
    "top_k": "num_experts_per_tok num_experts_per_token moe_top_k moe_k num_selected_experts",
    "count": "n_shared_experts num_shared_experts",
    "queries": "num_query_tokens",
    "image": "image_size",
    "patch": "patch_size",
    "ratio": "mlp_ratio",
    "mels": "num_mel_bins",
    "kept": """
        num_channels type_vocab_size relative_attention_num_buckets relative_attention_max_distance
        max_relative_positions position_buckets encoder_stride num_register_tokens
    """,
}

#: name -> role
SIZES: dict[str, str] = {name: role for role, block in _ROLES.items() for name in block.split()}

#: Sizes of one kind of layers -> the name that they have where they are said of single layers.
OTHERS = {"num_global_key_value_heads": "num_key_value_heads", "global_head_dim": "head_dim"}

#: Heads of a state space model: how often the residual width they are together, where that is said, and the groups
#: that they come in.
STATE_EXPANSION, STATE_GROUPS = "mamba_expand", ("mamba_n_groups", "n_groups")

#: Sizes whose None or absence means "work it out from the others", or that nothing reads. For every other
#: size None, zero or absence is structure.
DERIVED = _names(
    """
    n_ctx max_length seq_length
    attention_head_dim cross_attention_hidden_size encoder_stride ffn_hidden_size head_dim
    intermediate_size max_window_layers n_inner num_key_value_heads num_kv_heads num_mtp_layers
    num_nextn_predict_layers pooler_hidden_size pooler_output_size qk_head_dim v_head_dim vocab_size
    """
)

#: Lists with one entry a layer: what counts is which combinations of kinds occur, not where.
PER_LAYER = _names(
    """
    attention_layers layer_types layers_block_type mlp_layer_types moe_layer_pattern no_rope_layers
    """
)

#: A mapping from layer numbers to the fields that are another there: what counts is as for lists by layer.
OVERRIDES = "per_layer_config"

#: Lists of layer numbers: what counts is whether there are any.
LAYER_INDICES = _names("mlp_only_layers moe_layers dense_layers global_attn_layers attn_layer_indices")

#: Structure that repeats over layers: a miniature needs this many layers to have one of every kind.
PERIODS = _names(
    """
    attn_layer_period decoder_sparse_step encoder_sparse_step expert_layer_period
    full_attention_interval global_attn_every_n_layers interleave_moe_layer_step moe_layer_freq
    moe_layer_interval no_rope_layer_interval sliding_window_pattern
    """
)

#: Fields that cannot decide which symmetry of a block holds.
INERT = _names(
    # provenance and bookkeeping
    """
    architectures transformers_version _name_or_path name_or_path auto_map model_args _commit_hash
    torch_dtype dtype adapters tokenizer_class prefix finetuning_task task_specific_params language
    license tags use_bfloat16 torchscript tf_legacy_loss gradient_checkpointing return_dict
    use_return_dict output_attentions output_hidden_states output_router_logits output_scores
    attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    experts_implementation use_cache keys_to_ignore_at_inference cache_implementation output_past
    chunk_size_feed_forward pretraining_tp
    slow_but_exact static is_composition unsloth_version unsloth_fixed logits_to_keep num_logits_to_keep
    torch_compile
    """,
    # heads and labels: no site touches them
    """
    id2label label2id num_labels problem_type summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout tie_word_embeddings
    out_features out_indices stage_names
    """,
    # dropouts, and what only training reads
    """
    dropout attention_dropout hidden_dropout activation_dropout embd_pdrop attn_pdrop resid_pdrop
    dropout_rate hidden_dropout_prob attention_probs_dropout_prob classifier_dropout
    classifier_dropout_prob pooler_dropout embedding_dropout ffdropout mlp_dropout qa_dropout
    seq_classif_dropout drop_path_rate layerdrop encoder_layerdrop decoder_layerdrop
    router_aux_loss_coef router_z_loss_coef router_jitter_noise aux_loss_alpha seq_aux
    apply_spec_augment mask_time_prob mask_time_length mask_time_min_masks mask_feature_prob
    mask_feature_length mask_feature_min_masks label_smoothing
    """,
    # initial values
    """
    initializer_range initializer_factor init_std init_xavier_std initializer_cutoff_factor
    layerscale_value layer_scale_init_value logit_scale_init_value embed_init_std
    """,
    # small or positive numbers inside a norm or a sum
    """
    layer_norm_eps rms_norm_eps layer_norm_epsilon norm_eps norm_epsilon eps routed_scaling_factor
    router_scaling_factor
    """,
    # rotary frequencies: every group that is proven commutes with rotations by any angle
    """
    rope_theta original_max_position_embeddings rotary_emb_base rotary_embedding_base
    rope_local_base_freq rope_base default_theta
    """,
    # token ids and text generation
    """
    pad_token_id bos_token_id eos_token_id eos_token_ids unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id image_token_id image_token_index
    suppress_tokens begin_suppress_tokens bad_words_ids forced_decoder_ids no_repeat_ngram_size
    encoder_no_repeat_ngram_size num_beams num_beam_groups num_return_sequences do_sample early_stopping
    temperature top_k top_p typical_p repetition_penalty length_penalty diversity_penalty max_new_tokens
    min_length remove_invalid_values exponential_decay_length_penalty return_dict_in_generate
    median_filter_width
    """,
)

#: Numbers inside rotary parameters that only set frequencies or one positive factor of the scores.
INERT_ROTARY = _names(
    """
    attention_factor beta_fast beta_slow factor high_freq_factor long_factor long_mscale low_freq_factor
    mrope_section mscale mscale_all_dim original_max_position_embeddings rope_theta short_factor
    short_mscale truncate
    """
)

#: Kinds of rotary scaling that only choose frequencies and one positive factor of the scores. Every group that is
#: proven commutes with rotations by any angle; another kind is structure.
ROTARY_KINDS = frozenset(["default", "linear", "dynamic", "yarn", "longrope", "llama3"])


def overrides(config: Mapping[str, Any], depth: int) -> list[dict[str, Any]] | None:
    """What `OVERRIDES` says of each layer; None where it is not there, or names no layers of so many."""
    given = config.get(OVERRIDES)
    if not isinstance(given, Mapping) or not all(str(key).isdecimal() for key in given):
        return None
    found = {int(key): value for key, value in given.items()}
    if not all(layer < depth and isinstance(value, Mapping) for layer, value in found.items()):
        return None
    return [dict(found.get(layer, {})) for layer in range(depth)]


def of_kind(config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The config with what is another in all layers of one kind.

    Args:
        kind: as of `Site.only`, an entry of a list with one a layer; the config stays as it is for numbers of layers.
    """
    path, _, entry = kind.partition("=")
    first, _, rest = path.partition(".")
    if rest:
        part = config.get(first)
        return {**config, first: of_kind(part, f"{rest}={entry}")} if isinstance(part, Mapping) else config
    kinds = config.get(path)
    others = overrides(config, len(kinds)) if isinstance(kinds, list) else None
    if others is None:
        return config
    mine = [other for other, kind in zip(others, kinds or (), strict=True) if str(kind) == entry]
    return {**config, **mine[0]} if mine and all(other == mine[0] for other in mine) else config


def by_stage(value: object) -> bool:
    """Whether a size has an entry for every stage of a model."""
    return isinstance(value, list) and len(value) > 1 and all(type(one) is int and one > 0 for one in value)


def proportions(counts: list[int]) -> list[int]:
    """Numbers of heads by stage over what divides them all."""
    return [count // math.gcd(*counts) for count in counts]
