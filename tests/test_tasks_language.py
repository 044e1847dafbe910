"""Language modelling: windows of tokens from every form of text, scored like a computation by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from task_data import SPECIAL, WORDS, ids, saved, set_config, some_text, write_lines
from unmergeable.errors import InputError
from unmergeable.tasks import open_task
from unmergeable.tasks.task import TensorTask

END = SPECIAL.index("[EOS]")


def opened(folder: Path, model: Path, **fields: Any) -> TensorTask:
    task = open_task("t", {"kind": "language-modelling", "length": 8, **fields}, folder=folder, model=model)
    assert isinstance(task, TensorTask)
    return task


def refused(folder: Path, model: Path, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(folder, model, **fields)
    return str(caught.value)


def windows(task: TensorTask) -> list[list[int]]:
    return task.evaluation.inputs["input_ids"].tolist()


def cut(stream: list[int], length: int = 8) -> list[list[int]]:
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


# --- scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_by_hand(kind: str, tmp_path: Path) -> None:
    model, module = saved(tmp_path / "model", kind, {})
    text = some_text(100)
    (tmp_path / "x.txt").write_text(text)
    task = opened(tmp_path, model, data="x.txt", batch=5)
    assert (len(task), task.next_token, task.screen, task.classes) == (12, True, 8, None)
    assert windows(task) == cut(ids(text))
    expected, right = [], []
    for window in cut(ids(text)):
        with torch.inference_mode():
            logits = module(torch.tensor([window]), use_cache=False).logits[0].double()
        losses, hits = [], []
        for place in range(7):
            row = logits[place].numpy()
            top = row.max()
            total = top + math.log(np.exp(row - top).sum())
            losses.append(total - row[window[place + 1]])
            hits.append(float(row.argmax() == window[place + 1]))
        expected.append(-np.mean(losses))
        right.append(np.mean(hits))
    np.testing.assert_allclose(task.score(module, range(12)), expected, rtol=1e-5)
    assert float(task.loss(module, task.evaluation).detach()) == pytest.approx(-np.mean(expected), rel=1e-5)
    other = opened(tmp_path, model, data="x.txt", metric="accuracy")
    np.testing.assert_allclose(other.score(module, range(12)), right, atol=1e-6)
    assert other.digest != task.digest
    np.testing.assert_allclose(task.score(module, [7, 2]), [expected[7], expected[2]], rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_calls_are_made_without_a_cache(kind: str, tmp_path: Path) -> None:
    model, module = saved(tmp_path / "model", kind, {})
    (tmp_path / "x.txt").write_text(some_text(40))
    task = opened(tmp_path, model, data="x.txt")
    seen = []
    module.register_forward_hook(lambda _, __, output: seen.append(output.past_key_values))
    task.score(module, [0, 1])
    task.loss(module, task.evaluation)
    assert seen == [None, None]
    module(**task.evaluation.inputs)
    assert seen[2] is not None  # it would have one


def test_a_model_whose_configuration_knows_no_cache_is_not_told_of_it(tmp_path: Path) -> None:
    from transformers import XLNetConfig

    XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=8).save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "x.npz", input_ids=np.arange(40))
    assert opened(tmp_path, tmp_path / "model", data="x.npz").constants == {}


def test_nan_is_refused(tmp_path: Path) -> None:
    model, module = saved(tmp_path / "model", "llama", {})
    (tmp_path / "x.txt").write_text(some_text(40))
    with torch.no_grad():
        module.get_submodule("model.norm").weight[0] = float("nan")
    for metric in ("accuracy", "cross-entropy"):
        with pytest.raises(InputError, match="scores are not finite"):
            opened(tmp_path, model, data="x.txt", metric=metric).score(module, [0, 1])


# --- forms of text --------------------------------------------------------------------------------------------


def test_documents_are_joined_by_the_end_of_text(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "model", "llama", {})
    documents = [some_text(count, count) for count in (3, 11, 1, 20)]
    write_lines(tmp_path / "x.jsonl", [{"text": text, "other": 1} for text in documents])
    write_lines(tmp_path / "y.jsonl", [{"body": text} for text in documents])
    stream: list[int] = []
    for number, text in enumerate(documents):
        stream += ([END] if number else []) + ids(text)
    task = opened(tmp_path, model, data="x.jsonl")
    assert windows(task) == cut(stream)
    assert opened(tmp_path, model, data="y.jsonl", field="body").digest == task.digest


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "model", "llama")
    stream = np.random.default_rng(0).integers(0, 40, 50)
    np.savez(tmp_path / "one.npz", input_ids=stream.astype(np.uint16))
    np.savez(tmp_path / "two.npz", scale=np.array([0.5]), x=stream.reshape(5, 10).astype(np.int32))
    np.savez(tmp_path / "three.npz", x=stream, y=stream[::-1])
    for data in ({"data": "one.npz"}, {"data": "two.npz"}, {"data": "three.npz", "field": "x"}):
        task = opened(tmp_path, model, **data)
        assert windows(task) == cut(stream.tolist())
        assert task.evaluation.labels.tolist() == [row[1:] for row in cut(stream.tolist())]


def test_saved_data_sets(tmp_path: Path) -> None:
    import datasets

    model, _ = saved(tmp_path / "model", "llama", {})
    documents = [some_text(count, count) for count in (9, 11)]
    texts = datasets.Dataset.from_dict({"text": documents})
    datasets.DatasetDict({"test": texts, "train": texts.select([1])}).save_to_disk(tmp_path / "text")
    tokens = datasets.Dataset.from_dict({"input_ids": [ids(text) for text in documents]})
    tokens.save_to_disk(tmp_path / "ids")
    task = opened(
        tmp_path, model, data="text", split="test", train={"data": "text", "split": "train", "limit": 1}
    )
    assert windows(task) == cut([*ids(documents[0]), END, *ids(documents[1])])
    assert task.training is not None
    assert task.training.inputs["input_ids"].tolist() == cut(ids(documents[1]))[:1]
    assert task.few(4, 0).labels.tolist() == [ids(documents[1])[1:8]]
    assert windows(opened(tmp_path, model, data="ids")) == cut(ids(documents[0]) + ids(documents[1]))


def test_a_limit_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "model", "llama", {})
    text = some_text(5000)
    (tmp_path / "x.txt").write_text(text)
    whole = windows(opened(tmp_path, model, data="x.txt"))
    assert len(whole) == 625
    for limit in (1, 3, 200, 624, 1000):
        assert windows(opened(tmp_path, model, data="x.txt", limit=limit)) == whole[:limit]
    # A file that is not text, and lines that are not JSON, a long way behind what is needed.
    (tmp_path / "y.txt").write_bytes(text.encode() * 40 + b"\xff")
    assert windows(opened(tmp_path, model, data="y.txt", limit=3)) == whole[:3]
    assert "y.txt: not UTF-8" in refused(tmp_path, model, data="y.txt")
    lines = write_lines(tmp_path / "z.jsonl", [{"text": "w1 w2 w3"}] * 200)
    lines.write_text(lines.read_text() + "[]\n")
    assert len(opened(tmp_path, model, data="z.jsonl", limit=4)) == 4
    assert "z.jsonl: line 201: not a JSON object, got '[]\\n'" in refused(tmp_path, model, data="z.jsonl")


# --- refusals -------------------------------------------------------------------------------------------------


def test_ids_that_are_none(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "model", "llama")
    for array, expected in (
        (np.full(16, 40), "x.npz: token 0: a token that the model does not know, expected 0 to 39, got 40"),
        (np.array([3] * 9 + [-1] * 7), "x.npz: token 9: a token that the model does not know"),
        (np.full(7, 3), "x.npz: not one window of text, expected 8 tokens, got 7"),
        (
            np.zeros((2, 2, 8), int),
            "x.npz: input_ids: not token ids, expected whole numbers, (n,) or (n, length)",
        ),
        (np.full(16, 3.0), "got float64 of shape (16,)"),
        (np.array(["a", None], object), "pickled objects are never loaded"),
    ):
        np.savez(tmp_path / "x.npz", input_ids=array)
        assert expected in refused(tmp_path, model, data="x.npz")
    np.savez(tmp_path / "x.npz", a=np.arange(9), b=np.arange(9))
    assert "several arrays could be meant, got a | b\nhint: name it by field:" in refused(
        tmp_path, model, data="x.npz"
    )


def test_lines_that_are_none(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "model", "llama", {})
    for line, expected in (
        ('"text"', "x.jsonl: line 3: not a JSON object, got"),
        ("{", "x.jsonl: line 3: not a line of JSON"),
        (
            '{"body": "w1"}',
            "x.jsonl: line 3: a record without the field, expected text, got body\nhint: name it",
        ),
        ('{"text": 3}', "x.jsonl: line 3: text: not text, expected text, got int"),
    ):
        (tmp_path / "x.jsonl").write_text('{"text": "w1 w2"}\n\n' + line + "\n")
        assert expected in refused(tmp_path, model, data="x.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xff"}\n')
    assert "x.jsonl: line 1: not a line of JSON" in refused(tmp_path, model, data="x.jsonl")
    (tmp_path / "x.jsonl").write_text("")
    assert "not one window of text, expected 8 tokens, got 0" in refused(tmp_path, model, data="x.jsonl")


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(some_text(40))
    write_lines(tmp_path / "x.jsonl", [{"text": some_text(9)}] * 2)
    bare, _ = saved(tmp_path / "bare", "llama")
    text = refused(tmp_path, bare, data="x.txt")
    assert "the model's tokenizer cannot be loaded" in text
    assert "hint: save it beside the model, or give token ids" in text
    # A class that makes an empty tokenizer where there are no files.
    empty, _ = saved(tmp_path / "empty", "gpt2")
    assert (
        f"{empty}: the model has no tokenizer, expected merges.txt | tokenizer.json | vocab.json"
        in refused(tmp_path, empty, data="x.txt")
    )
    vocabulary = {word: number for number, word in enumerate([*WORDS, "\u0120"])}
    transformers.GPT2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(empty)
    assert not (empty / "vocab.json").exists()
    assert len(opened(tmp_path, empty, data="x.txt")) > 0
    endless, _ = saved(tmp_path / "endless", "llama", {"end": False})
    assert "the tokenizer has no end of text to put between documents" in refused(
        tmp_path, endless, data="x.jsonl"
    )
    assert len(opened(tmp_path, endless, data="x.txt")) == 5
    set_config(endless, vocab_size=20)
    assert "a token that the model does not know, expected 0 to 19" in refused(
        tmp_path, endless, data="x.txt"
    )


def test_windows_longer_than_the_model_takes(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "model", "gpt2")
    np.savez(tmp_path / "x.npz", input_ids=np.zeros(100, int))
    text = refused(tmp_path, model, data="x.npz", length=33)
    assert "task t: length: windows are longer than what the model takes, expected at most 32, got 33" in text
    assert len(opened(tmp_path, model, data="x.npz", length=32)) == 3


def test_models_without_tokens(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "model", "vit")
    np.savez(tmp_path / "x.npz", input_ids=np.zeros(100, int))
    assert "the model takes no tokens, expected vocab_size in config.json" in refused(
        tmp_path, model, data="x.npz"
    )


def test_forms_that_are_not_known(tmp_path: Path) -> None:
    import datasets

    model, _ = saved(tmp_path / "model", "llama", {})
    (tmp_path / "x.md").write_text("w1")
    assert "no form of text that is known, expected a .txt, a .jsonl" in refused(tmp_path, model, data="x.md")
    (tmp_path / "x.txt").write_text("w1")
    assert "task t: split: only saved data sets have splits" in refused(
        tmp_path, model, data="x.txt", split="test"
    )
    assert "x: no such file or folder" in refused(tmp_path, model, data="x")
    same = {"data": "x.txt"}
    assert "training examples are those that models are scored on" in refused(
        tmp_path, model, data="x.txt", train=same
    )
    datasets.Dataset.from_dict({"words": ["w1"], "rows": [[[1, 2], [3]]]}).save_to_disk(tmp_path / "d")
    assert "no such column, expected words | rows, got none of text, input_ids" in refused(
        tmp_path, model, data="d"
    )
    assert "row 0: not token ids" in refused(tmp_path, model, data="d", field="rows")
