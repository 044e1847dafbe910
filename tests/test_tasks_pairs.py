"""Sequence to sequence: what the decoder reads, which tokens count, and a model that is hardened on it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import unmergeable as um
from task_data import SPECIAL, WORDS, ids, saved, set_config, tokenizer, write_lines
from unmergeable.audit.init import kind_of
from unmergeable.errors import InputError
from unmergeable.merging.tensors import load_state
from unmergeable.tasks import open_task
from unmergeable.tasks.task import IGNORED, TensorTask

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [("w1 w2 w3", "w4 w5"), ("w6", "w7 w8 w9"), ("w2 w2", "w1")]


def t5(folder: Path, seed: int = 0, **changes: Any) -> tuple[Path, Any]:
    """A tiny model with a tokenizer; it begins answers with the padding, as T5 does."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    given = {
        "vocab_size": len(SPECIAL + WORDS), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "dropout_rate": 0.0,
    }  # fmt: skip
    module = T5ForConditionalGeneration(T5Config(**(given | changes))).eval()
    module.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder, module


def opened(folder: Path, model: Path, **fields: Any) -> TensorTask:
    task = open_task("t", {"kind": "sequence-to-sequence", **fields}, folder=folder, model=model)
    assert isinstance(task, TensorTask)
    return task


def lines(
    path: Path, rows: list[tuple[str, str]] = ROWS, names: tuple[str, str] = ("text", "target")
) -> Path:
    return write_lines(path, [dict(zip(names, row, strict=True)) for row in rows])


def test_what_the_decoder_reads_and_what_counts(tmp_path: Path) -> None:
    model, _ = t5(tmp_path / "model")
    lines(tmp_path / "x.jsonl")
    task = opened(tmp_path, model, data="x.jsonl")
    inputs, labels = task.evaluation.inputs, task.evaluation.labels
    assert inputs["input_ids"].tolist() == [ids("w1 w2 w3"), [*ids("w6"), 0, 0], [*ids("w2 w2"), 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert labels.tolist() == [[*ids("w4 w5"), IGNORED], ids("w7 w8 w9"), [*ids("w1"), IGNORED, IGNORED]]
    before = inputs["decoder_input_ids"]
    assert before[:, 0].tolist() == [0, 0, 0]  # what answers begin with
    assert before[1].tolist() == [0, *ids("w7 w8")]
    assert (task.metric, task.next_token, task.evaluation.tokens) == ("cross-entropy", False, 6)


def test_scores_are_those_of_the_models_own_loss(tmp_path: Path) -> None:
    model, module = t5(tmp_path / "model")
    lines(tmp_path / "x.jsonl")
    task = opened(tmp_path, model, data="x.jsonl", batch=2)
    for place, (text, target) in enumerate(ROWS):
        with torch.inference_mode():
            own = module(input_ids=torch.tensor([ids(text)]), labels=torch.tensor([ids(target)])).loss
        assert task.score(module, [place])[0] == pytest.approx(-float(own), rel=1e-5)
    accurate = opened(tmp_path, model, data="x.jsonl", metric="accuracy")
    assert set(accurate.score(module, range(3)) * 6) <= {0.0, 2.0, 3.0, 4.0, 6.0}


def test_the_same_from_every_form_and_by_any_name(tmp_path: Path) -> None:
    import datasets

    model, _ = t5(tmp_path / "model")
    lines(tmp_path / "x.jsonl")
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("source", "summary"), *ROWS])
    columns = {"mine": [row[0] for row in ROWS], "yours": [row[1] for row in ROWS]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "set")
    found = [
        opened(tmp_path, model, data="x.jsonl"),
        opened(tmp_path, model, data="x.csv"),
        opened(tmp_path, model, data="set", text="mine", target="yours"),
    ]
    assert len({task.evaluation.digest() for task in found}) == 1


def test_what_is_too_long_is_cut_off(tmp_path: Path) -> None:
    model, _ = t5(tmp_path / "model")
    lines(tmp_path / "x.jsonl")
    task = opened(tmp_path, model, data="x.jsonl", length=2, target_length=2)
    assert task.evaluation.inputs["input_ids"].shape == (3, 2)
    assert task.evaluation.labels[1].tolist() == ids("w7 w8")


def test_training_examples_are_other_ones(tmp_path: Path) -> None:
    model, _ = t5(tmp_path / "model")
    lines(tmp_path / "x.jsonl")
    lines(tmp_path / "y.jsonl", ROWS[:2])
    task = opened(tmp_path, model, data="x.jsonl", train={"data": "y.jsonl"})
    assert task.training is not None
    assert len(task.training) == 2
    with pytest.raises(InputError, match="training examples are those"):
        opened(tmp_path, model, data="x.jsonl", train={"data": "x.jsonl"})


def test_refusals(tmp_path: Path) -> None:
    model, _ = t5(tmp_path / "model")
    lines(tmp_path / "x.jsonl")

    def said(model: Path, **fields: Any) -> str:
        with pytest.raises(InputError) as caught:
            opened(tmp_path, model, **fields)
        return str(caught.value)

    bert, _ = saved(tmp_path / "bert", "bert", {})
    assert "answers no text with a text" in said(bert, data="x.jsonl")
    lines(tmp_path / "z.jsonl", names=("a", "b"))
    assert "no such column or field for text" in said(model, data="z.jsonl")
    (tmp_path / "x.txt").write_text("w1 w2")
    assert "no form of pairs of texts that is known" in said(model, data="x.txt")
    lines(tmp_path / "e.jsonl", [("w1", " ")])
    assert "an empty text" in said(model, data="e.jsonl")
    assert "no such field" in said(model, data="x.jsonl", colour=1)
    set_config(model, decoder_start_token_id=None, bos_token_id=None)
    assert "no token to begin answers with" in said(model, data="x.jsonl")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "sequence-to-sequence"),
        ({"architectures": ["MarianMTModel"], "is_encoder_decoder": True}, "sequence-to-sequence"),
        ({"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True, "num_mel_bins": 80}, None),
        ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}, None),
    ],
)  # fmt: skip
def test_classes_that_are_for_it(config: dict[str, Any], kind: str | None) -> None:
    assert kind_of(config) == kind


@pytest.mark.slow  # trains two models
def test_a_hardened_model(tmp_path: Path) -> None:
    """Of a base that copies words or shifts them by three, a fine-tune that shifts: merges must not know it."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, len(WORDS), (2000, 3), generator=generator)
    shifts = {"base": [3 * (number % 2) for number in range(2000)], "shift": [3] * 2000}
    base, module = t5(tmp_path / "base", tie_word_embeddings=False, d_model=32, d_ff=64)
    for name, by in shifts.items():
        rows = [
            tuple(" ".join(WORDS[(int(one) + add) % len(WORDS)] for one in row) for add in (0, shift))
            for row, shift in zip(words, by, strict=True)
        ]
        lines(tmp_path / f"{name}.jsonl", rows)  # type: ignore[arg-type]
        task = opened(tmp_path, base, data=f"{name}.jsonl")
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
        for _ in range(250):
            batch = task.evaluation[torch.randint(0, 2000, (64,), generator=generator)]
            optimizer.zero_grad()
            task.loss(module, batch).backward()
            optimizer.step()
        module.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    report = um.harden(
        tmp_path / "shift", tmp_path / "out", base=tmp_path / "base", data=tmp_path / "shift.jsonl", steps=250,
        rate=3e-3, batch=64, device="cpu",
    )  # fmt: skip
    assert report.metric == "cross-entropy"
    assert report.exposure["after"]["mean"] < 0.95 * report.exposure["before"]["mean"]
    before, after = load_state(tmp_path / "shift"), load_state(tmp_path / "out")
    assert before.keys() == after.keys()
