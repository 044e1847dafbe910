"""Attacks that learn, of models whose norms have statistics, and from texts that are padded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from unmergeable.attacks.coefficients import Coefficients
from unmergeable.attacks.distil import Distil
from unmergeable.attacks.informed import Fisher, RegMean
from unmergeable.attacks.repair import merged_with
from unmergeable.attacks.thief import Thief
from unmergeable.attacks.training import supervised, train
from unmergeable.merging import Merged
from unmergeable.merging.grids import Mixer
from unmergeable.merging.learned import entropy, learn
from unmergeable.merging.statistics import grams
from unmergeable.merging.tensors import merge_deltas, without_padding
from unmergeable.stock import module_state
from unmergeable.tasks.padding import masks
from unmergeable.tasks.task import IGNORED, Examples, TensorTask

pytestmark = pytest.mark.filterwarnings("ignore")
TASKS = ("p", "o")


@cache
def resnets() -> dict[str, Any]:
    """A base and two fine-tunes, whose norms have seen narrower images than the base's."""
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    found = {}
    for seed, name in enumerate(("base", *TASKS)):
        torch.manual_seed(seed)
        found[name] = ResNetForImageClassification(config)
        with torch.no_grad():
            for _ in range(40):
                found[name]((1.0 if name == "base" else 0.1) * torch.randn(8, 3, 32, 32))
        found[name].eval()
    return found


def thief() -> Thief:
    states = {name: {n: t.clone() for n, t in module_state(one).items()} for name, one in resnets().items()}
    generator = torch.Generator().manual_seed(0)
    tasks = {}
    for task in TASKS:
        pictures = Examples(
            {"pixel_values": torch.randn(24, 3, 32, 32, generator=generator)}, torch.arange(24) % 3
        )
        tasks[task] = TensorTask(
            task, "image-classification", "accuracy", pictures, training=pictures, classes=3
        )
    heads = {task: {n: t for n, t in states[task].items() if n.startswith("classifier")} for task in TASKS}
    body = {name: tensor for name, tensor in states["base"].items() if not name.startswith("classifier")}
    modules = {task: ResNetForImageClassification(resnets()["base"].config).eval() for task in TASKS}
    return Thief(body, {task: states[task] for task in TASKS}, "p", tasks, modules, heads)


# --- statistics of norms -------------------------------------------------------------------------------------


def statistics(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if "running_" in name}


def test_what_norms_have_seen_is_not_trained() -> None:
    one = thief()
    draws = {task: lambda task=task: one.tasks[task].training for task in TASKS}
    start = {**one.base}
    done = list(train(start, supervised(one, draws, one.heads), steps=3, rate=1e-2, every=3))
    (_, state) = done[-1]
    assert all(torch.equal(tensor, start[name]) for name, tensor in statistics(state).items())
    weights = [name for name in state if name.endswith("weight")]
    assert any(not torch.equal(state[name], start[name]) for name in weights)


LEARNING = (
    Coefficients("tensor", "labels"),
    Coefficients("row", "entropy"),
    Distil("soft-1", foreign=False),
    RegMean(),
    Fisher(),
)


@pytest.mark.parametrize("attack", LEARNING, ids=lambda one: one.name)
def test_attacks_that_learn_work_on_models_with_statistics(
    attack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unmergeable.attacks import coefficients, distil

    monkeypatch.setattr(coefficients, "STEPS", 4)
    monkeypatch.setattr(distil, "STEPS", 4)
    seen: list[Any] = []

    def look(options: Any, subject: Any, **_: Any) -> tuple[float, float]:
        seen.append(subject)
        return 0.0, 0.0

    look.peek = lambda subject: (0.0, 0.0)  # type: ignore[attr-defined]
    one = thief()
    attack.explore(one, look)
    assert seen
    for subject in seen:
        state = subject.for_task("p")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_a_merge_has_no_variance_below_nothing() -> None:
    """Both fine-tunes have less of it than the base: at high doses a sum of both would be below 0."""
    one = thief()
    name = next(name for name in one.base if name.endswith("running_var"))
    assert (
        float((one.base[name] + 1.3 * sum(e[name] - one.base[name] for e in one.experts.values())).min()) < 0
    )
    dose = dict.fromkeys(TASKS, 1.3)
    merges: list[Merged] = [
        Mixer(one.base, one.experts).mix(dose),
        merge_deltas(one.base, one.experts, lambda name, deltas: 1.3 * sum(deltas.values())),  # type: ignore[arg-type]
        merged_with(one, one.experts["p"], 1.3, 1.3),
        learn(
            one.base, one.experts, one.forward, {"p": [one.tasks["p"].training]}, protected="p",
            granularity="model", starts=[(1.3, 1.3)], steps=1, validate=lambda _: 0.0,
        )[0].merged,
    ]  # fmt: skip
    for merged in merges:
        shared = one.whole(merged).for_task("p")
        assert float(shared[name].min()) >= 0
        logits = one.call("p", shared)(pixel_values=torch.randn(2, 3, 32, 32)).logits
        assert bool(torch.isfinite(logits).all())


# --- padding -------------------------------------------------------------------------------------------------


def texts() -> Examples:
    """One long text and three short ones, with an answer each."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([12, 3, 3, 2])
    attention = (torch.arange(12) < lengths[:, None]).long()
    tokens = torch.randint(3, 20, (4, 12), generator=generator) * attention
    labels = torch.where(
        torch.arange(9) < lengths[:, None] - 1, torch.randint(3, 20, (4, 9), generator=generator), IGNORED
    )
    decoded = torch.where(labels == IGNORED, 0, labels)
    return Examples({"input_ids": tokens, "attention_mask": attention, "decoder_input_ids": decoded}, labels)


def answering() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def test_positions_that_count() -> None:
    batch = texts()
    own, inputs = masks(batch)
    assert own.sum() == batch.tokens
    assert inputs.sum() == batch.inputs["attention_mask"].sum()
    values = torch.randn(4, 9, 5)
    assert torch.equal(without_padding(values, masks(batch)), values[batch.labels != IGNORED])
    states = torch.randn(4, 12, 5)
    assert without_padding(states, masks(batch)).shape == (20, 5)
    pictures = torch.randn(4, 5)
    assert without_padding(pictures, masks(batch)) is pictures
    classes = torch.randn(4, 12)  # as many as there are positions, and none of them
    assert without_padding(classes, masks(batch)) is classes
    whole = Examples({"input_ids": torch.ones(4, 9)}, torch.ones(4, 9).long())
    assert masks(whole) == []


@pytest.mark.parametrize("target", ["soft-2", "hard", "features"])
def test_nothing_is_learnt_of_what_is_behind_the_end(target: str) -> None:
    batch = texts()
    task = TensorTask("t", "sequence-to-sequence", "cross-entropy", batch, training=batch)
    teacher, student = answering(), answering()
    with torch.no_grad():
        for one in teacher.parameters():
            one.add_(0.1 * torch.randn_like(one))
    found = []
    for noise in (0.0, 100.0):  # of the teacher's answers behind the end

        def call(noise: float = noise, **inputs: Any) -> Any:
            output = teacher(**inputs)
            behind = noise * (batch.labels == IGNORED)[..., None]
            output.logits = output.logits + behind * torch.randn_like(output.logits)
            if output.decoder_hidden_states is not None:
                states = output.decoder_hidden_states
                output.decoder_hidden_states = (*states[:-1], states[-1] + behind)
            return output

        found.append(float(Distil(target, foreign=False)._loss(task, call, student, batch)))
    assert found[0] == found[1] > 0


def test_entropy_and_gram_matrices_are_of_what_is_there() -> None:
    batch = texts()
    logits = torch.randn(4, 9, 20)
    uniform = torch.where((batch.labels == IGNORED)[..., None], torch.zeros_like(logits), logits)
    counted = [float(entropy(without_padding(one, masks(batch)))) for one in (logits, uniform)]
    assert counted[0] == counted[1] != float(entropy(uniform))
    config = BertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    one = Examples(inputs, torch.zeros(4).long())
    found = grams(model, lambda given: model(**given.inputs), [one], masks)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    # By itself, without the long one, a short text has no padding at all.
    short, padded = (
        Examples({key: value[1:3, :length] for key, value in inputs.items()}, one.labels[1:3])
        for length in (3, 12)
    )
    assert masks(short) == []
    alone, behind = (
        grams(model, lambda given: model(**given.inputs), [two], masks) for two in (short, padded)
    )
    assert found[name].count == int(inputs["attention_mask"].sum())
    assert behind[name].count == alone[name].count == 6
    np.testing.assert_allclose(behind[name].matrix.numpy(), alone[name].matrix.numpy(), rtol=1e-4, atol=1e-6)
