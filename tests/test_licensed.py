"""What changes for licensed users of a locked model: further training, adapters of the base, merges in a domain."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unmergeable import zoo
from unmergeable.derive import Key
from unmergeable.errors import InputError
from unmergeable.lock import lock
from unmergeable.merging import merge_method
from unmergeable.unlock import unlock

KEY = Key(bytes(range(32)))
WEIGHTS = "model.safetensors"
METHODS = ("exact", "gauge", "mergelock", "params")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def decoder(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny causal model with random weights: grouped heads, rotary positions, a gated MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=64, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def load_decoder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def train(model: Any, batches: Any, rate: float) -> list[float]:
    """AdamW; returns the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def text_batches(steps: int) -> Iterator[dict[str, torch.Tensor]]:
    rng = np.random.default_rng(1)
    for _ in range(steps):
        rows = torch.from_numpy((rng.integers(0, 64, (4, 1)) + np.arange(24) * 3) % 64)
        yield {"input_ids": rows, "labels": rows}


def relative(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new.double() - old.double()).norm() / old.double().norm())


@pytest.mark.parametrize("method", METHODS)
def test_training_after_the_lock_and_unlocking_what_came_of_it(method: str, tmp_path: Path) -> None:
    source = decoder(tmp_path / "source")
    lock(source, tmp_path / "locked", key=KEY, method=method)
    probe = next(text_batches(1))["input_ids"]

    model = load_decoder(tmp_path / "locked")
    losses = train(model, text_batches(30), 3e-3)
    assert losses[-1] < losses[0] / 2, "the locked model does not train"
    if method == "exact":  # what signed permutations do commutes with AdamW
        plain = train(load_decoder(source), text_batches(30), 3e-3)
        assert np.allclose(losses, plain, rtol=2e-3)

    trained = tmp_path / "trained"
    model.save_pretrained(trained)  # in float32, without the manifest: as a user's script does
    with pytest.raises(InputError, match="not locked"):
        unlock(trained, tmp_path / "back", key=KEY)
    shutil.copyfile(tmp_path / "locked" / "unmergeable.json", trained / "unmergeable.json")
    with pytest.raises(InputError, match="not what was locked"):
        unlock(trained, tmp_path / "back", key=KEY)
    report = unlock(trained, tmp_path / "back", key=KEY, accept_changed=True)
    assert report.altered
    assert not report.bit_for_bit

    with torch.inference_mode():
        again = load_decoder(tmp_path / "back")
        assert relative(again(probe).logits, model(probe).logits) < 1e-5
    locked, back = load_file(trained / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    original = load_file(source / WEIGHTS)
    name = (
        "model.layers.0.mlp.down_proj.weight"
        if method != "mergelock"
        else "model.layers.0.self_attn.v_proj.weight"
    )
    # in the original's coordinates again: near the original, where the locked one is far from it
    assert relative(back[name], original[name]) < 0.5 < relative(locked[name], original[name])


def load_images(folder: Path, task: str) -> Any:
    """A model of the embedded zoo, or a locked one, under a task's head."""
    model = zoo.load_model(folder)
    model.classifier = zoo.load_model(zoo.model_path(task)).classifier
    model.config.num_labels = model.num_labels = model.classifier.out_features
    return model


def image_batches(task: str, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    images, labels = zoo.images(task, "few")
    rng = np.random.default_rng(2)
    for _ in range(steps):
        rows = rng.integers(0, len(labels), 32)
        yield {
            "pixel_values": torch.from_numpy(zoo.pixels(images[rows])),
            "labels": torch.from_numpy(labels[rows]),
        }


OWN, NEW = zoo.tasks()[:2]


def test_further_training_to_another_head(tmp_path: Path) -> None:
    lock(zoo.model_path(OWN), tmp_path / "locked", key=KEY)
    other = zoo.tasks()[2]  # another number of classes
    model = load_images(tmp_path / "locked", other)
    before = zoo.accuracy(model, other, 200, own_head=True)
    train(model.train(), image_batches(other, 15), 3e-4)
    after = zoo.accuracy(model, other, 200, own_head=True)
    assert after > before + 0.05
    model.save_pretrained(tmp_path / "trained")
    report = unlock(
        tmp_path / "trained", tmp_path / "back", key=KEY, manifest=tmp_path / "locked" / "unmergeable.json"
    )
    assert any("classifier" in name for name in report.altered)
    assert zoo.accuracy(tmp_path / "back", other, 200, own_head=True) == pytest.approx(after, abs=0.011)


def test_an_adapter_of_the_base_does_not_fit_the_locked_model(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = load_images(zoo.model_path(zoo.BASE), NEW)
    layers = [name for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=[name for name in layers if name != "classifier"])
    adapted = get_peft_model(base, config)
    train(adapted.train(), image_batches(NEW, 30), 3e-3)
    adapted.save_pretrained(tmp_path / "adapter")

    def change(folder: Path) -> tuple[float, float]:
        """Accuracy on the adapter's task without it and with it."""
        model = load_images(folder, NEW)
        without = zoo.accuracy(model, NEW, 300)
        merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
        return without, zoo.accuracy(merged, NEW, 300)

    base_without, base_with = change(zoo.model_path(zoo.BASE))
    assert base_with > base_without + 0.1, "the adapter learnt nothing"
    lock(zoo.model_path(OWN), tmp_path / "locked", key=KEY)
    plain_without, plain_with = change(zoo.model_path(OWN))
    locked_without, locked_with = change(tmp_path / "locked")
    assert locked_without == pytest.approx(plain_without, abs=0.004)
    assert plain_with > plain_without + 0.05, "the adapter does not fit the fine-tune either"
    assert locked_with - locked_without < (plain_with - plain_without) / 3


States = dict[str, dict[str, torch.Tensor]]


def merged(method: str, states: States) -> dict[str, torch.Tensor]:
    """A merge of the fine-tunes, under the head of OWN."""
    base, experts = states[zoo.BASE], {task: states[task] for task in (OWN, NEW)}
    options: dict[str, float] = (
        {"weight": 0.4} if method == "task_arithmetic" else {"weight": 0.7, "density": 0.2}
    )
    if method == "linear":
        shared = {
            name: torch.stack([state[name].float() for state in experts.values()]).mean(0).to(value.dtype)
            for name, value in base.items()
            if not name.startswith("classifier.")
        }
    else:
        shared = dict(merge_method(method)(base, experts, **options).shared)
    return {
        **shared,
        **{name: value for name, value in experts[OWN].items() if name.startswith("classifier.")},
    }


def locked_states(
    folder: Path, method: str, how: Callable[[int], dict[str, Any]]
) -> dict[str, dict[str, torch.Tensor]]:
    for number, name in enumerate((zoo.BASE, OWN, NEW)):
        lock(zoo.model_path(name), folder / name, key=KEY, method=method, **how(number))
    return {name: load_file(folder / name / WEIGHTS) for name in (zoo.BASE, OWN, NEW)}


@pytest.mark.parametrize(
    ("method", "merge", "bound"),
    [
        ("exact", "linear", 0.0),
        ("exact", "task_arithmetic", 0.0),
        ("exact", "ties", 5e-3),  # of entries of one magnitude, TIES keeps those that come first
        ("gauge", "linear", 1e-3),  # the rounding of float16
        ("gauge", "task_arithmetic", 1e-3),
    ],
)
def test_models_of_one_domain_merge_without_the_key(
    method: str, merge: str, bound: float, tmp_path: Path
) -> None:
    states = locked_states(tmp_path, method, lambda _: {"domain": "house"})
    plain = {name: load_file(zoo.model_path(name) / WEIGHTS) for name in states}
    mixed, wanted = merged(merge, states), merged(merge, plain)
    folder = tmp_path / "merged"
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in mixed.items()}, folder / WEIGHTS, {"format": "pt"})
    shutil.copyfile(tmp_path / OWN / "config.json", folder / "config.json")
    for task in (OWN, NEW):
        assert abs(zoo.accuracy(folder, task, 200) - zoo.accuracy(wanted, task, 200)) <= 0.02

    unlock(folder, tmp_path / "open", key=KEY, manifest=tmp_path / NEW / "unmergeable.json")
    opened = load_file(tmp_path / "open" / WEIGHTS)
    assert opened.keys() == wanted.keys()
    old = torch.cat([wanted[name].double().flatten() for name in sorted(wanted)])
    new = torch.cat([opened[name].double().flatten() for name in sorted(wanted)])
    assert relative(new, old) <= bound


def test_models_apart_do_not_merge(tmp_path: Path) -> None:
    states = locked_states(tmp_path, "exact", lambda number: {"salt": bytes([number]) * 32})
    plain = {name: load_file(zoo.model_path(name) / WEIGHTS) for name in states}
    for merge in ("linear", "task_arithmetic"):
        mixed, wanted = zoo.accuracies(merged(merge, states), [OWN, NEW], 200), merged(merge, plain)
        assert all(mixed[task] < zoo.accuracy(wanted, task, 200) - 0.3 for task in (OWN, NEW))
