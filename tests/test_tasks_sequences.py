"""Text classification from tables of every form, tokenised and padded as the model has it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from task_data import ids, saved, set_config, tokenizer, write_lines
from unmergeable.errors import InputError
from unmergeable.tasks import open_task
from unmergeable.tasks.task import TensorTask

NAMES = {"label2id": {"bad": 0, "good": 1}, "id2label": {0: "bad", 1: "good"}}
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w1 w1"]
LABELS = ["good", "bad", "bad", "good"]


def opened(folder: Path, model: Path, **fields: Any) -> TensorTask:
    task = open_task("t", {"kind": "text-classification", **fields}, folder=folder, model=model)
    assert isinstance(task, TensorTask)
    return task


def refused(folder: Path, model: Path, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(folder, model, **fields)
    return str(caught.value)


def table(path: Path, header: list[str], *rows: list[str]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def padded(texts: list[str], length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens with zeros behind them, and which of them count."""
    rows = [ids(text)[:length] for text in texts]
    longest = max(map(len, rows))
    return (
        [row + [0] * (longest - len(row)) for row in rows],
        [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
    )


def check(task: TensorTask, texts: list[str] = TEXTS, length: int = 32) -> None:
    tokens, mask = padded(texts, length)
    assert task.evaluation.inputs["input_ids"].tolist() == tokens
    assert task.evaluation.inputs["attention_mask"].tolist() == mask


def test_scores_by_hand(tmp_path: Path) -> None:
    model, module = saved(tmp_path / "model", "bert", {}, **NAMES)
    table(
        tmp_path / "x.csv",
        ["id", "text", "label"],
        *([str(n), *row] for n, row in enumerate(zip(TEXTS, LABELS, strict=True))),
    )
    task = opened(tmp_path, model, data="x.csv", batch=3)
    check(task)
    assert (task.evaluation.labels.tolist(), task.classes, task.next_token) == ([1, 0, 0, 1], 2, False)
    right = []
    for text, label in zip(TEXTS, [1, 0, 0, 1], strict=True):
        with torch.inference_mode():
            right.append(float(module(torch.tensor([ids(text)])).logits.argmax() == label))
    assert task.score(module, range(4)).tolist() == right


@pytest.mark.parametrize("label", ["name", "number", "written number"])
def test_the_same_from_every_form(label: str, tmp_path: Path) -> None:
    import datasets

    model, _ = saved(tmp_path / "model", "bert", {}, **NAMES)
    numbers = [1, 0, 0, 1]
    labels: list[Any] = {"name": LABELS, "number": numbers, "written number": list(map(str, numbers))}[label]
    rows = [{"sentence": text, "label": each} for text, each in zip(TEXTS, labels, strict=True)]
    table(tmp_path / "x.csv", ["sentence", "label"], *([row["sentence"], row["label"]] for row in rows))
    write_lines(tmp_path / "x.jsonl", rows)
    whole = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"test": whole, "train": whole.select([2, 3])}).save_to_disk(tmp_path / "x")
    found = [
        opened(tmp_path, model, data="x.csv"),
        opened(tmp_path, model, data="x.jsonl"),
        opened(tmp_path, model, data="x", split="test"),
    ]
    check(found[0])
    assert len({task.digest for task in found}) == 1
    trained = opened(tmp_path, model, data="x", split="test", train={"data": "x", "split": "train"})
    assert trained.training is not None
    assert trained.training.labels.tolist() == [0, 1]
    assert trained.few(1, 0).labels.tolist() == [0, 1]
    short = opened(tmp_path, model, data="x.csv", limit=2)
    check(short, TEXTS[:2])


def test_classes_of_a_data_set_go_by_name(tmp_path: Path) -> None:
    import datasets

    model, _ = saved(tmp_path / "model", "bert", {}, **NAMES)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])}
    )
    rows = {"text": TEXTS, "label": [0, 1, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "x")
    assert opened(tmp_path, model, data="x").evaluation.labels.tolist() == [1, 0, 0, 1]
    text = refused(tmp_path, model, data="x", classes=["negative", "positive"])
    assert (
        "the data set's classes are not the model's, expected negative, positive, got 'good', 'bad'" in text
    )


def test_pairs_of_texts(tmp_path: Path) -> None:
    model, module = saved(tmp_path / "model", "bert", {"types": True}, **NAMES)
    write_lines(
        tmp_path / "x.jsonl", [{"a": "w1 w2", "b": "w3", "y": 0}, {"a": "w4", "b": "w5 w6 w7", "y": 1}]
    )
    task = opened(tmp_path, model, data="x.jsonl", text="a", pair="b", label="y")
    check(task, ["w1 w2 w3", "w4 w5 w6 w7"])
    assert task.evaluation.inputs["token_type_ids"].tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert task.score(module, [0, 1]).shape == (2,)


def test_lengths_are_cut_to_what_the_model_takes(tmp_path: Path) -> None:
    model, module = saved(tmp_path / "model", "bert", {}, **NAMES)
    long = " ".join(["w1"] * 40)
    write_lines(tmp_path / "x.jsonl", [{"text": long, "label": 0}, {"text": "w2", "label": 1}])
    task = opened(tmp_path, model, data="x.jsonl")  # 128 by default, and the model takes 32
    check(task, [long, "w2"], 32)
    assert task.score(module, [0, 1]).shape == (2,)
    check(opened(tmp_path, model, data="x.jsonl", length=5), [long, "w2"], 5)


def test_a_decoder_is_given_what_it_takes(tmp_path: Path) -> None:
    """No token types, and the token to pad with of its configuration."""
    import transformers as tf

    config = tf.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=40,
        pad_token_id=0, **NAMES,
    )  # fmt: skip
    module = tf.LlamaForSequenceClassification(config).eval()
    model = tmp_path / "model"
    module.save_pretrained(model)
    tokenizer(pad=False, types=True).save_pretrained(model)
    write_lines(tmp_path / "x.jsonl", [{"text": text, "label": 0} for text in TEXTS])
    task = opened(tmp_path, model, data="x.jsonl")
    check(task)
    assert set(task.evaluation.inputs) == {"input_ids", "attention_mask"}
    alone = [module(torch.tensor([ids(text)])).logits.detach().argmax(-1).item() == 0 for text in TEXTS]
    assert task.score(module, range(4)).tolist() == [float(each) for each in alone]
    set_config(model, pad_token_id=None)
    assert "the model has no token to pad texts with\nhint: set pad_token_id" in refused(
        tmp_path, model, data="x.jsonl"
    )


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path / "model", "bert", {}, **NAMES)[0]


CSV: dict[str, tuple[str, dict[str, Any], str]] = {
    "columns of other names": (
        "a,b\nw1,0\n", {},
        "x.csv: 2 problems\n  - {}/x.csv: no such column or field for text, expected a | b, got text | sentence (hint: "
        "name it by text:)\n  - {}/x.csv: no such column or field for label, expected a | b, got label (hint: name it",
    ),
    "a column that is named": (
        "text,label\nw1,0\n", {"pair": "second"},
        "x.csv: no such column or field for pair, expected text | label, got second",
    ),
    "an empty file": ("", {}, "x.csv: a .csv without a header, expected different names of columns in the first line"),
    "a column twice": ("text,text,label\nw1,w2,0\n", {}, "a .csv without a header"),
    "no rows": ("text,label\n", {}, "x.csv: no examples"),
    "a short row": (
        "text,label\nw1,0\nw2\n", {},
        "x.csv: line 3: a row of another length, expected 2 values, as in the header, got 1"
    ),
    "a quote that does not end": ('text,label\n"w1,0\n', {}, "x.csv: line 2: not a .csv"),
    "an empty text": ("text,label\nw1,0\n ,0\n", {}, "x.csv: line 3: an empty text, expected text as text"),
    "labels of no class": (
        "text,label\nw1,good\nw2,fine\nw3,2\nw4,fine\n", {},
        "x.csv: 2 problems\n  - {}/x.csv: line 3 and 1 more: a label that is none of the model's classes, expected a "
        "number from 0 to 1, or bad, good, got 'fine'\n  - {}/x.csv: line 4: a label that is none of",
    ),
    "a split": ("text,label\nw1,0\n", {"split": "test"}, "task t: split: only saved data sets have splits, got test"),
    "classes too many": ("text,label\nw1,0\n", {"classes": ["a", "b", "c"]}, "expected 2 different names, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CSV))
def test_tables(case: str, model: Path, tmp_path: Path) -> None:
    content, fields, expected = CSV[case]
    (tmp_path / "x.csv").write_text(content)
    assert expected.replace("{}", str(tmp_path)) in refused(tmp_path, model, data="x.csv", **fields)


LINES: dict[str, tuple[list[Any], str]] = {
    "not an object": ([{"text": "w1", "label": 0}, ["w1", 0]], "x.jsonl: line 2: not a JSON object, got"),
    "a field is not there": (
        [{"text": "w1", "label": 0}, {"text": "w1"}, {"label": 1}],
        "x.jsonl: 2 problems\n  - {}/x.jsonl: line 2: a record without a field, expected label, got text\n"
        "  - {}/x.jsonl: line 3: a record without a field, expected text, got label",
    ),
    "a text that is none": (
        [{"text": 3, "label": 0}],
        "x.jsonl: line 1: not text, expected text as text, got int",
    ),
    "true is no class": (
        [{"text": "w1", "label": True}],
        "line 1: a label that is none of the model's classes",
    ),
    "nor is a fraction": ([{"text": "w1", "label": 1.0}], "got 1.0"),
    "nor nothing": ([{"text": "w1", "label": None}], "got None"),
    "a class below zero": ([{"text": "w1", "label": -1}], "got -1"),
}


@pytest.mark.parametrize("case", list(LINES))
def test_lines(case: str, model: Path, tmp_path: Path) -> None:
    records, expected = LINES[case]
    write_lines(tmp_path / "x.jsonl", records)
    assert expected.replace("{}", str(tmp_path)) in refused(tmp_path, model, data="x.jsonl")


def test_problems_are_told_up_to_a_number(model: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", [{"text": "w1", "label": 0}] + [{"text": "w1"}] * 100)
    assert "x.jsonl: 20 problems" in refused(tmp_path, model, data="x.jsonl")


def test_files_that_are_none(model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"text,label\n\xff,0\n")
    assert "x.csv: not UTF-8" in refused(tmp_path, model, data="x.csv")
    (tmp_path / "x.tsv").write_text("text\tlabel\n")
    assert "no form of labelled texts that is known, expected a .csv with a header" in refused(
        tmp_path, model, data="x.tsv"
    )
    assert "no form of labelled texts that is known" in refused(tmp_path, model, data="model")
    assert "gone.csv: no such file or folder" in refused(tmp_path, model, data="gone.csv")


def test_tokens_that_the_model_does_not_know(model: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", [{"text": "w1 w29", "label": 0}])
    set_config(model, vocab_size=30)
    assert "the tokenizer knows tokens that the model does not, expected below 30, got token 33" in refused(
        tmp_path, model, data="x.jsonl"
    )


def test_labels_of_a_model_without_names(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "model", "bert", {})
    table(tmp_path / "x.csv", ["text", "label"], ["w1", "good"], ["w2", "bad"])
    text = refused(tmp_path, model, data="x.csv")
    assert "(hint: name the classes by classes:, in the order of the model's outputs)" in text
    task = opened(tmp_path, model, data="x.csv", classes=["good", "bad"])
    assert task.evaluation.labels.tolist() == [0, 1]
    assert np.array_equal(task.evaluation.inputs["input_ids"], [[5], [6]])
