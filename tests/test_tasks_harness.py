"""Tasks of lm-evaluation-harness, defined on disk: scores by hand, one document at a time, and nothing else touched."""

from __future__ import annotations

import importlib.util
import os
import random
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from task_data import WORDS, ids, saved, some_text, write_lines
from unmergeable.errors import InputError, RunError
from unmergeable.tasks import open_task

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs the extra harness", allow_module_level=True)

from unmergeable.tasks.harness import HarnessTask

COUNT = 12

DEFINITION = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/docs.jsonl, train: {folder}/shots.jsonl}}
  cache_dir: {folder}/cache
test_split: test
"""

CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""

METRICS = """
process_results: !function functions.results
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: margin, aggregation: mean, higher_is_better: true}
  - {metric: regret, aggregation: mean, higher_is_better: false}
  - {metric: pair, aggregation: mean, higher_is_better: true}
"""

FUNCTIONS = """
import random

import numpy as np


def results(doc, found):
    values = [value for value, _ in found]
    right = values[doc["answer"]]
    best = max(value for number, value in enumerate(values) if number != doc["answer"])
    return {
        "acc": int(np.argmax(values) == doc["answer"]), "margin": right - best, "regret": best - right, "pair": (1, 2)
    }


def shuffled(docs):
    order = list(range(len(docs)))
    random.shuffle(order)
    return docs.select(order)
"""

GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 2}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: word, filter: [{function: regex, regex_pattern: "(w[0-9]+)"}, {function: take_first}]}
"""


def docs(seed: int = 0, count: int = COUNT) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [
        {
            "question": some_text(4, int(random.integers(1 << 30))).strip(),
            "choices": [f"w{number}" for number in random.permutation(30)[:3]],
            "answer": int(random.integers(3)),
        }
        for _ in range(count)
    ]


def define(folder: Path, name: str = "mine", *parts: str, more: str = "") -> None:
    """Writes a definition, its functions and its documents."""
    (folder / "tasks").mkdir(exist_ok=True)
    text = DEFINITION.format(name=name, folder=folder) + "".join(parts or (CHOICE, METRICS)) + more
    (folder / f"tasks/{name}.yaml").write_text(text)
    (folder / "tasks/functions.py").write_text(FUNCTIONS)
    write_lines(folder / "docs.jsonl", docs())
    write_lines(folder / "shots.jsonl", docs(1, 6))


def opened(folder: Path, model: Path, name: str = "mine", **fields: Any) -> HarnessTask:
    given = {"kind": "lm-eval", "task": name, "include": "tasks", **fields}
    task = open_task("t", given, folder=folder, model=model)
    assert isinstance(task, HarnessTask)
    return task


def refused(folder: Path, model: Path, name: str = "mine", **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(folder, model, name, **fields)
    return str(caught.value)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    return saved(tmp_path_factory.mktemp("harness") / "model", "llama", {})


def margins(module: torch.nn.Module) -> list[float]:
    """By how much the right answer is likelier than the next, worked out here."""
    found = []
    for doc in docs():
        values = []
        for choice in doc["choices"]:
            tokens = ids(f"{doc['question']} {choice}")
            with torch.inference_mode():
                chances = module(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
            values.append(float(chances[-2, tokens[-1]]))
        right = values.pop(doc["answer"])
        found.append(right - max(values))
    return found


def test_scores_by_hand(built: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    model, module = built
    define(tmp_path)
    task = opened(tmp_path, model, metric="margin")
    expected = margins(module)
    assert (len(task), task.kind, task.metric, task.screen) == (COUNT, "lm-eval", "margin", COUNT)
    np.testing.assert_allclose(task.score(module, range(COUNT)), expected, atol=1e-5)
    # In any order, more than once, and alone.
    chosen = [7, 0, 11, 7]
    np.testing.assert_allclose(task.score(module, chosen), [expected[each] for each in chosen], atol=1e-5)
    np.testing.assert_allclose(task.score(module, [5]), expected[5:6], atol=1e-5)
    assert task.score(module, []).shape == (0,)
    accuracy = opened(tmp_path, model).score(module, range(COUNT))
    assert accuracy.tolist() == [float(each > 0) for each in expected]
    assert 0 < accuracy.sum() < COUNT
    # Lower is better: the sign is turned, and said.
    regret = opened(tmp_path, model, metric="regret")
    assert regret.metric == "minus regret"
    np.testing.assert_allclose(regret.score(module, range(COUNT)), expected, atol=1e-5)


def test_a_limit_and_the_range_of_documents(built: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    model, module = built
    define(tmp_path)
    task = opened(tmp_path, model, metric="margin", limit=5)
    assert len(task) == 5
    np.testing.assert_allclose(task.score(module, range(5)), margins(module)[:5], atol=1e-5)
    with pytest.raises(InputError, match="t: no such example, expected 0 to 4, got 5"):
        task.score(module, [0, 5])


def test_a_prompt_does_not_depend_on_other_documents(
    built: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    model, module = built
    define(tmp_path, more="training_split: train\n")
    plain = opened(tmp_path, model, metric="margin")
    task = opened(tmp_path, model, metric="margin", fewshot=2)
    whole = task.score(module, range(COUNT))
    assert np.abs(whole - plain.score(module, range(COUNT))).min() > 1e-4
    for index in (0, 4, 11):
        np.testing.assert_allclose(task.score(module, [index]), whole[[index]], atol=1e-5)
    assert opened(tmp_path, model, metric="margin", fewshot=2).digest == task.digest != plain.digest


def test_documents_that_are_shuffled_on_every_look(
    built: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    model, module = built
    define(tmp_path, more="process_docs: !function functions.shuffled\n")
    random.seed(1)
    first = opened(tmp_path, model, metric="margin")
    random.seed(2)
    second = opened(tmp_path, model, metric="margin")
    assert first.digest == second.digest
    scores = first.score(module, range(COUNT))
    np.testing.assert_allclose(second.score(module, range(COUNT)), scores, atol=1e-5)
    np.testing.assert_allclose(sorted(scores), sorted(margins(module)), atol=1e-5)
    assert np.abs(scores - margins(module)).max() > 0.01


def test_nothing_else_is_touched(
    built: tuple[Path, torch.nn.Module], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    import datasets
    import huggingface_hub

    def connect(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", connect)
    model, module = built
    define(tmp_path)
    flags = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    environment, states = dict(os.environ), (random.getstate(), torch.get_rng_state())
    numbers = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    task = opened(tmp_path, model)
    task.score(module, [1, 2])
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert dict(os.environ) == environment
    assert flags == (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[1].tolist() == numbers  # type: ignore[union-attr]
    assert all(torch.equal(weights[name], tensor) for name, tensor in module.state_dict().items())
    assert not module._forward_hooks


def test_the_digest_is_of_what_scores_depend_on(built: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    model, _ = built
    define(tmp_path)
    digests = [
        opened(tmp_path, model, **fields).digest for fields in ({}, {"metric": "margin"}, {"limit": 5})
    ]
    assert len({*digests}) == 3
    other = tmp_path / "elsewhere"
    other.mkdir()
    define(other)
    assert opened(other, model).digest == digests[0]  # where data lie is no part of it
    for name, before, after in (
        ("tasks/functions.py", "right - best", "right - 2 * best"),
        ("docs.jsonl", "w1", "w2"),
        ("tasks/mine.yaml", '"{{question}}"', '"w1 {{question}}"'),
    ):
        path = other / name
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))
        digests.append(opened(other, model).digest)
    assert len({*digests}) == 6


def test_answers_that_are_written(built: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    model, module = built
    define(tmp_path, "mine", GENERATE)
    text = refused(tmp_path, model, metric="exact_match")
    expected = "expected exact_match,first | exact_match,word"
    assert f"t: metric: the task filters answers in several ways, {expected}" in text
    firsts = []  # the first word that the model writes
    for doc in docs():
        tokens = torch.tensor([ids(doc["question"])])
        generate: Any = module.generate
        written = generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False)
        words = [WORDS[token - 4] for token in written[0, 4:].tolist() if 4 <= token < 34]
        firsts.append(words[0] if words else None)
    # That is the right answer to every second question.
    answers = docs()
    for number, (doc, first) in enumerate(zip(answers, firsts, strict=True)):
        doc["choices"][doc["answer"]] = first if number % 2 and first is not None else "w99"
    write_lines(tmp_path / "docs.jsonl", answers)
    task = opened(tmp_path, model, metric="exact_match,word")
    wanted = [float(number % 2 == 1 and first is not None) for number, first in enumerate(firsts)]
    assert sum(wanted) >= 3
    assert task.score(module, range(COUNT)).tolist() == wanted


def test_a_wide_merge_is_scored_as_it_is(built: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    from unmergeable.merging.wide import WideModel

    model, module = built
    define(tmp_path)
    task = opened(tmp_path, model, metric="margin")
    wide = WideModel([module, module], [0.5, 0.5])
    np.testing.assert_allclose(task.score(wide, range(COUNT)), margins(module), atol=1e-4)


def test_models_that_fail(built: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    model, _ = built
    define(tmp_path)
    task = opened(tmp_path, model)
    _, module = saved(tmp_path / "nan", "llama", {})
    with torch.no_grad():
        module.get_submodule("model.norm").weight[0] = float("nan")
    with pytest.raises(InputError, match="t: scores are not finite, got NaN among the logits"):
        task.score(module, [0, 1])
    with pytest.raises(RunError, match="lm-eval failed") as caught:
        task.score(torch.nn.Linear(2, 2), [0])
    assert caught.value.__cause__ is not None


# --- refusals -------------------------------------------------------------------------------------------------


def test_it_is_an_extra(built: tuple[Path, torch.nn.Module], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "tasks").mkdir()
    text = refused(tmp_path, built[0])
    assert text.startswith("the package lm_eval is needed")
    assert text.endswith("\nhint: pip install 'unmergeable[harness]'")


@pytest.mark.parametrize(
    ("more", "fields", "expected"),
    [
        ("", {"metric": "f1"}, "t: metric: the task has no such metric, expected acc | margin | regret | pair, got f1"),
        ("", {"metric": "acc,word"}, "t: metric: the task has no such filter, expected none, got word"),
        (
            "num_fewshot: 0\n", {"fewshot": 2},
            "t: fewshot: a task that takes no examples in its prompts, expected 0, got 2",
        ),
        (
            "metric_list: [{metric: margin, aggregation: mean}]\n", {"metric": "margin"},
            "t: margin: nothing says whether more of the metric is better\nhint: write higher_is_better:",
        ),
        ("unsafe_code: true\n", {}, "t: mine: a task that runs what a model writes"),
        ("doc_to_image: question\n", {}, "t: mine: a task that takes more than text"),
        ("output_type: guess\n", {}, "t: mine: lm-eval cannot open the task, got ValueError"),
        (
            "dataset_path: nobody/nothing-of-this-name\n", {},
            "hint: its data must be on this machine: nothing is downloaded",
        ),
        ("process_results: !function functions.nothing\n", {}, "t: mine: lm-eval cannot open the task"),
    ],
)  # fmt: skip
def test_definitions(
    more: str, fields: dict[str, Any], expected: str, built: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    define(tmp_path)
    path = tmp_path / "tasks/mine.yaml"
    definition = yaml.load(path.read_text().replace("!function", ""), yaml.SafeLoader)
    changed = yaml.safe_dump(definition | (yaml.safe_load(more.replace("!function", "")) or {}))
    path.write_text(changed.replace("process_results: ", "process_results: !function "))
    assert expected in refused(tmp_path, built[0], **fields)


def test_answers_that_are_drawn(built: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    define(tmp_path, "mine", GENERATE.replace("max_gen_toks: 2", "do_sample: true, temperature: 0.7"))
    text = refused(tmp_path, built[0], metric="exact_match,word")
    assert "t: mine: a task that samples its answers, expected do_sample: false, got {" in text


def test_a_metric_without_a_number(built: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    define(tmp_path)
    task = opened(tmp_path, built[0], metric="pair")
    with pytest.raises(InputError, match="t: pair: a metric that has no number for one document") as caught:
        task.score(built[1], [0])
    assert caught.value.got == "tuple, metrics are acc, margin, regret, pair"


def test_a_group(built: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    define(tmp_path)
    (tmp_path / "tasks/all.yaml").write_text("group: all\ntask: [mine]\n")
    text = refused(tmp_path, built[0], "all")
    assert "t: all: a group of tasks, expected one task\nhint: give each of its tasks its own entry" in text


def test_a_folder_that_there_is_not(built: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    assert "tasks: no such file or folder" in refused(tmp_path, built[0])


@pytest.mark.slow
def test_a_name_that_there_is_not(built: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    define(tmp_path)
    assert "task t: task: lm-eval has no such task, expected hellaswag" in refused(
        tmp_path, built[0], "hellasvag"
    )
