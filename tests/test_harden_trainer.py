"""transformers' Trainer with an objective of hardening."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import thief_cases
from test_harden_merges import opened
from unmergeable.errors import UsageError
from unmergeable.harden.trainer import HardeningTrainer
from unmergeable.harden.wrapper import Hardening

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_trainer_hardens(tmp_path: Path) -> None:
    images, labels = thief_cases.pictures(thief_cases.PROTECTED, 96, 1)
    data = [
        {"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=60, per_device_train_batch_size=16, gradient_accumulation_steps=2, logging_steps=5,
        learning_rate=2e-3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    exposed = {}
    for strength in (0.0, 1.0):
        module, _ = opened()
        hardening = Hardening(module, thief_cases.trained()["base"].state_dict(), strength=strength)
        trainer = HardeningTrainer(module, arguments, train_dataset=data, hardening=hardening)
        trainer.train()
        logged = [entry["hardening"] for entry in trainer.state.log_history if "hardening" in entry]
        assert len(logged) == 12
        exposed[strength] = sum(logged[-3:]) / sum(logged[:3])
        assert module(pixel_values=images).logits.argmax(-1).eq(labels).float().mean() > 0.9
    assert exposed[1.0] < 0.6 * exposed[0.0]


@pytest.mark.parametrize("name", ["trap", "trap+kindred"])
def test_a_trainer_goes_on_as_it_would_have(name: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).state_dict()
    tokens = torch.randint(32, (32, 12))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    found = []
    for folder, resumed in (("whole", False), ("cut", True)):
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=6, per_device_train_batch_size=8, gradient_accumulation_steps=2,
            learning_rate=2e-3, use_cpu=True, report_to=[], save_steps=3, disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        module = transformers.LlamaForCausalLM(config)
        module.load_state_dict({key: 1.01 * one for key, one in base.items()})
        trainer = HardeningTrainer(
            module, arguments, train_dataset=data, hardening=Hardening(module, base, name, strength=1.0)
        )
        # The second goes on from the first one's checkpoint, with draws that are at their beginning.
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3") if resumed else None)
        found.append({key: one.detach().clone() for key, one in module.named_parameters()})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_trainer_of_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate import Accelerator

    module, _ = opened()
    hardening = Hardening(module, thief_cases.trained()["base"].state_dict())
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(UsageError, match="one process"):
        HardeningTrainer(module, arguments, hardening=hardening)


def test_a_trainer_of_another_model(tmp_path: Path) -> None:
    """Nothing of it would be hardened, and the log would say that all is well."""
    module, _ = opened()
    hardening = Hardening(module, thief_cases.trained()["base"].state_dict())
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    other, _ = opened()
    given: dict[str, Any]
    for given in ({"model": other}, {"model_init": lambda: module}):
        with pytest.raises(UsageError, match="of another model than the one that is trained"):
            HardeningTrainer(args=arguments, hardening=hardening, **given)
