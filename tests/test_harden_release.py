"""What `harden` trains and writes of models and adapters that are not stored as they are in memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merging_models import transformer
from test_harden_adapters import filled
from unmergeable.errors import InputError
from unmergeable.harden.owner import Owner
from unmergeable.merging.write import saved_state, write_merged
from unmergeable.stock import load_module, module_state

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = "model.safetensors"


def owner(expert: Path, base: Path, work: Path) -> Owner:
    """Of a language model that is trained on tokens drawn at random."""
    work.mkdir()
    np.savez(work / "ids.npz", input_ids=np.random.default_rng(0).integers(3, 40, 40 * 8))
    fields = {"kind": "language-modelling", "data": str(work / "ids.npz"), "length": 8}
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
    return Owner(expert, base, fields, [], work, accelerator)


def test_a_head_that_is_tied_and_stored(tmp_path: Path) -> None:
    """Classes save tied tensors once; a file that has both has both afterwards, with the same numbers."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "both")
    once = load_file(tmp_path / "both" / WEIGHTS)
    assert "lm_head.weight" not in once
    table = "model.embed_tokens.weight"
    save_file({**once, "lm_head.weight": once[table].clone()}, tmp_path / "both" / WEIGHTS, {"format": "pt"})
    module: Any = load_module(tmp_path / "both")
    with torch.no_grad():
        module.get_input_embeddings().weight.add_(1)
    write_merged(
        tmp_path / "out", saved_state(module, tmp_path / "saved", tmp_path / "both"), tmp_path / "both"
    )
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(found["lm_head.weight"], found[table])
    assert torch.equal(found[table], once[table] + 1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"init_lora_weights": "pissa"}, "changes its base as well"),
        ({"init_lora_weights": "olora"}, "changes its base as well"),
        (None, "the adapter has no weights"),
    ],
)
def test_adapters_that_are_not_what_they_add(
    changes: dict[str, Any] | None, text: str, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    plain: Any = transformer("llama")
    plain.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **(changes or {}))
    module = get_peft_model(plain, config)
    filled(module, "default", 0)
    module.save_pretrained(tmp_path / "adapter")
    if changes is None:
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=text):
        owner(tmp_path / "adapter", tmp_path / "base", tmp_path / "work")


def test_what_a_class_computes_is_not_trained(tmp_path: Path) -> None:
    """Tables of positions that are in no file: rounded they would be measured, and not written."""
    import transformers

    config = transformers.MarianConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    transformers.MarianMTModel(config).bfloat16().save_pretrained(tmp_path / "model")
    found = object.__new__(Owner)
    found.device, found.module = torch.device("cpu"), load_module(tmp_path / "model")
    held = {name: tensor.clone() for name, tensor in module_state(found.module).items()}
    weights = found._whole(module_state(found.module), held, tmp_path / "model")
    assert not any("embed_positions" in name for name in weights.parameters)
    assert weights.parameters.keys() <= load_file(tmp_path / "model" / WEIGHTS).keys()
    fixed = [one for name, one in found.module.named_parameters() if "embed_positions" in name]
    assert len(fixed) == 2
    assert not any(one.requires_grad for one in fixed)
