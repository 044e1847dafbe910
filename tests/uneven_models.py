"""Tiny models whose layers differ: in size, in what they take from others, or in the kind of their attention."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

SLIDING, FULL = "sliding_attention", "full_attention"
SMALL: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96}
BY_LAYER = {
    **SMALL,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 6,
}
# As Gemma 4 E2B: heads of two sizes, keys and values of the last layers from earlier ones, their MLPs twice as wide.
E2B = {
    **BY_LAYER,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "layer_types": [SLIDING, SLIDING, FULL] * 2,
}
# As 26B A4B: experts beside the MLP, keys that are values where attention is full, no inputs by layer.
A4B = {
    **{name: value for name, value in E2B.items() if name != "num_kv_shared_layers"},
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "global_head_dim": 40,
    "attention_k_eq_v": True,
    "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
# As Gemma 3n: layers of one size, of which the last take keys and values from earlier ones, and MLPs with few rows on.
G3N = {
    **BY_LAYER,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
    "layer_types": [SLIDING, FULL] * 3,
}


# As Qwen3.5: three layers of linear attention to one of attention whose output is gated.
Q35 = {
    **SMALL,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
}
# As Qwen3-Next: the same with experts, and with other orders of rows.
QNEXT = {
    **Q35,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
STATES = {
    **SMALL,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 4,
    "mamba_d_state": 12,
}
# As Bamba: state spaces, and attention in one layer.
BAMBA = {**STATES, "attn_layer_indices": [1]}
# As Nemotron-H: layers that are one of state space, experts, attention and MLP each.
NEMOTRON = {
    **SMALL,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 12,
    "mamba_head_dim": 10,
    "n_groups": 4,
    "ssm_state_size": 12,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 20,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
}
# As Falcon-H1: a state space and attention in every layer.
FALCON = {**STATES, "num_hidden_layers": 2, "mamba_d_ssm": 128}
# As Granite 4: state spaces or attention, then experts and an MLP.
GRANITE = {
    **STATES,
    "mamba_n_groups": 1,
    "layer_types": ["mamba", "attention", "mamba"],
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 40,
}


def write(
    fields: dict[str, Any], folder: Path, *, of: str = "Gemma4ForCausalLM", published: bool = False
) -> None:
    """A model of random weights; `published` spells its config as published checkpoints of Gemma 4 do."""
    torch.manual_seed(0)
    model_class = getattr(transformers, of)
    model = model_class(model_class.config_class(**fields))
    with torch.no_grad():
        for one in model.parameters():
            one.add_((0.3 if one.ndim < 2 else 0.15) * torch.randn(one.shape))
    model.save_pretrained(folder)
    if published:
        _as_published(folder)


def tuned(source: Path, target: Path, seed: int) -> None:
    """A fine-tune: weights a little elsewhere."""
    shutil.copytree(source, target)
    noise = torch.Generator().manual_seed(seed)
    change(
        target,
        lambda name, one: (
            one + 0.02 * one.std() * torch.randn(one.shape, generator=noise) if one.numel() > 1 else one
        ),
    )


def change(folder: Path, how: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Its weights one by one; None for those that go."""
    path = folder / "model.safetensors"
    changed = {name: how(name, one) for name, one in load_file(path).items()}
    kept = {name: one.contiguous() for name, one in changed.items() if one is not None}
    save_file(kept, path, metadata={"format": "pt"})


def logits(folder: Path) -> torch.Tensor:
    """What it says to a text that is longer than its window, in float64."""
    tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=tokens).logits
    return found


def _as_published(folder: Path) -> None:
    """The config in the spelling of published checkpoints, which say no layer's sizes by its number."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    overrides = config.pop("per_layer_config").values()
    config["global_head_dim"] = {one["head_dim"] for one in overrides}.pop()
    config["num_global_key_value_heads"] = {one.get("num_key_value_heads") for one in overrides}.pop()
    path.write_text(json.dumps(config))
