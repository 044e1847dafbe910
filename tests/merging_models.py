"""Small models to merge: state dicts with a body, blocks and heads, and tiny transformers with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

State = dict[str, torch.Tensor]


def body(
    random: torch.Generator, blocks: int = 3, width: int = 8, dtype: torch.dtype = torch.float32
) -> State:
    """Embeddings, numbered blocks of two matrices and a bias, and a counter."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    out = {"embed.weight": draw(12, width), "steps": torch.tensor(3)}
    for block in range(blocks):
        out[f"body.{block}.up.weight"] = draw(2 * width, width)
        out[f"body.{block}.up.bias"] = draw(2 * width)
        out[f"body.{block}.down.weight"] = draw(width, 2 * width)
    return out


def triple(
    seed: int = 0, names: tuple[str, ...] = ("p", "o"), size: float = 0.1, dtype: torch.dtype = torch.float32
) -> tuple[State, dict[str, State]]:
    """A base and fine-tunes of it, each with a head of its own shape."""
    random = torch.Generator().manual_seed(seed)
    base = body(random, dtype=dtype)
    base["head.weight"] = torch.randn(5, 8, generator=random).to(dtype)
    models = {}
    for index, name in enumerate(names):
        model = {
            key: (tensor + size * torch.randn(tensor.shape, generator=random)).to(dtype)
            if tensor.is_floating_point()
            else tensor.clone()
            for key, tensor in base.items()
        }
        model["head.weight"] = torch.randn(2 + index, 8, generator=random).to(dtype)
        models[name] = model
    return base, models


def transformer(kind: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A tiny transformer of two layers, all weights random, in evaluation mode."""
    import transformers as tf

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = {**small, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**{**text, "num_key_value_heads": 1, **changes})),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                **{
                    **{"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40},
                    **{"bos_token_id": 1, "eos_token_id": 2, **changes},
                }
            )
        ),
        "bert": lambda: tf.BertForSequenceClassification(
            tf.BertConfig(**{**text, "max_position_embeddings": 32, **changes})
        ),
        "vit": lambda: tf.ViTForImageClassification(
            tf.ViTConfig(**{**small, "image_size": 8, "patch_size": 4, "num_channels": 1, **changes})
        ),
    }
    torch.manual_seed(seed)
    model = makers[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(kind: str, count: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch for such a transformer."""
    random = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(count, 1, 8, 8, generator=random)}
    ids = torch.randint(3, 40, (count, 7), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def nudged(model: torch.nn.Module, seed: int, size: float = 0.05) -> torch.nn.Module:
    """A copy with all weights changed a little: a fine-tune."""
    import copy

    out = copy.deepcopy(model)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=random))
    return out
