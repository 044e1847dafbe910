"""Task vectors of models and of LoRA adapters; the latter beside peft's own merging."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import unmergeable as um
from merging_models import transformer, triple
from unmergeable.errors import InputError
from unmergeable.merging.tensors import load_state
from unmergeable.merging.vectors import (
    apply_vector,
    cosines,
    is_adapter,
    load_adapter,
    load_model,
    task_vector,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own


def test_a_task_vector_leads_from_the_base_to_the_model() -> None:
    base, models = triple()
    vector = task_vector(base, models["p"])
    assert set(vector.replaced) == {"head.weight"}
    there = apply_vector(base, vector)
    for name, tensor in models["p"].items():
        torch.testing.assert_close(there[name], tensor)
    half = apply_vector(base, vector, 0.5)["embed.weight"]
    torch.testing.assert_close(half, (base["embed.weight"] + models["p"]["embed.weight"]) / 2)
    assert cosines([vector, task_vector(base, models["o"])])[0] == [
        pytest.approx(1),
        pytest.approx(0, abs=0.2),
    ]
    with pytest.raises(InputError, match="has another shape"):
        apply_vector({**base, "embed.weight": torch.zeros(3)}, vector)


LINEAR: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
CONV1D: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["c_attn", "c_proj"],
    "fan_in_fan_out": True,
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", LINEAR),
    "rslora": ("llama", {**LINEAR, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            **LINEAR,
            "rank_pattern": {"layers.0.mlp.down_proj": 5},
            "alpha_pattern": {r"layers.\d.self_attn.q_proj": 9},
        },
    ),
    "transposed": ("gpt2", CONV1D),
    "embedding": ("gpt2", {**CONV1D, "target_modules": ["wte", "c_fc"]}),
    "saved whole": ("bert", {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "biases": ("bert", {"r": 2, "target_modules": ["query", "value"], "bias": "lora_only"}),
    "convolution": ("vit", {"r": 2, "target_modules": ["projection"]}),
    "dora": ("llama", {**LINEAR, "use_dora": True}),
    "dora transposed": ("gpt2", {**CONV1D, "use_dora": True}),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_is_what_peft_makes_of_it(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kind, settings = ADAPTERS[case]
    model = transformer(kind)
    base = dict(copy.deepcopy(model).state_dict())  # tied tensors stay tied
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    want = adapted.merge_and_unload().state_dict()
    assert is_adapter(tmp_path / "adapter")
    got = load_model(tmp_path / "adapter", base)
    assert set(got) == set(want)
    changed = 0
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-5)
        changed += not torch.equal(base[name], tensor)
    assert changed >= len(load_adapter(tmp_path / "adapter", base).deltas) >= 1


@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_an_adapter_of_a_class_that_saves_by_other_names(kind: str, tmp_path: Path) -> None:
    """transformers 5 calls tensors of a ViT otherwise in memory, where adapters are made, than in its files."""
    peft = pytest.importorskip("peft")
    model: Any = transformer(kind)
    model.save_pretrained(tmp_path / "base")
    base = load_state(tmp_path / "base")
    targets = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)][:3]
    heads = ["classifier"] if kind != "llama" else None
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets, modules_to_save=heads)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    want = load_state(tmp_path / "whole")
    got = load_model(tmp_path / "adapter", base, folder=tmp_path / "base")
    adapted_names = load_adapter(tmp_path / "adapter", base, tmp_path / "base").deltas
    assert len(adapted_names) == len(targets)
    assert got.keys() == want.keys() == base.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-5)
    if kind == "vit":
        with pytest.raises(InputError, match="3 problems"):
            load_model(tmp_path / "adapter", base)
    um.merge(
        [tmp_path / "adapter"],
        tmp_path / "half",
        base=tmp_path / "base",
        method="task_arithmetic",
        weights=[0.5],
    )
    merged = load_state(tmp_path / "half")
    for name in adapted_names:
        torch.testing.assert_close(merged[name], (base[name] + want[name]) / 2, atol=1e-6, rtol=1e-5)


def test_adapters_that_do_not_fit_are_refused_with_all_their_modules(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = transformer("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **LINEAR))
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    other = transformer("bert").state_dict()
    with pytest.raises(InputError, match=r"4 problems") as caught:
        load_adapter(folder, other)
    assert "layers.1.self_attn.q_proj" in str(caught.value)
    with pytest.raises(InputError, match="an adapter needs its base"):
        load_model(folder)
    wide = transformer("llama", hidden_size=32).state_dict()
    with pytest.raises(InputError, match="another shape than the base"):
        load_adapter(folder, wide)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(InputError, match="only LoRA"):
        load_adapter(folder, transformer("llama").state_dict())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"init_lora_weights": "pissa"}, "changes its base as well"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes its base as well"),
        ({"init_lora_weights": "olora"}, "changes its base as well"),
        ({"alora_invocation_tokens": [1, 2]}, "after some tokens alone"),
    ],
    ids=str,
)
def test_adapters_that_are_not_what_they_add(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = transformer("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **LINEAR))
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for started in ("gaussian", "eva", True):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": started}))
        assert load_adapter(tmp_path, transformer("llama").state_dict()).deltas
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=text):
        load_adapter(tmp_path, transformer("llama").state_dict())


def test_an_adapter_of_some_tokens_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = {**LINEAR, "trainable_token_indices": [1, 2]}
    adapted = peft.get_peft_model(transformer("llama"), peft.LoraConfig(init_lora_weights=False, **settings))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="embeddings of some tokens alone"):
        load_adapter(tmp_path, transformer("llama").state_dict())
