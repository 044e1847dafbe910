"""An audit of text classifiers, from words in files to what is recovered: two fine-tunes of a BERT, one locked."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
import unmergeable as um
from audit_cases import audit
from task_data import SPECIAL, WORDS, ids, tokenizer
from thief_cases import descend
from unmergeable.audit.work import one_thread
from unmergeable.stock import load_module

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("single")]
CLASSES = {"mood": 3, "topic": 4}  # the protected task, and the thief's
COUNT, LENGTH, OWN = 480, 12, 5
PRETRAINING, FEW = 300, 6  # steps, and different words of a text in them


def texts(task: str, seed: int) -> list[tuple[str, int]]:
    """Texts with their classes: of every class half the words are from a few of its own."""
    number = list(CLASSES).index(task)
    random = np.random.default_rng(number)
    own = [random.permutation(len(WORDS))[:OWN] for _ in range(CLASSES[task])]
    random = np.random.default_rng([number, seed])
    found = []
    for each in np.arange(COUNT) % CLASSES[task]:
        words = np.where(
            random.random(LENGTH) < 0.5,
            random.choice(own[each], LENGTH),
            random.integers(0, len(WORDS), LENGTH),
        )
        found.append((" ".join(WORDS[word] for word in words), int(each)))
    return found


def model(classes: int) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=len(SPECIAL + WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=LENGTH, num_labels=classes, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def fit(module: Any, heads: Mapping[str, Any], steps: int, what: list[Any]) -> None:
    """Train some of the modules on tasks, each under its head."""
    data = {}
    for task in heads:
        words, classes = zip(*texts(task, 1), strict=True)
        data[task] = torch.tensor([ids(text) for text in words]), torch.tensor(classes)
    trained = [weight for one in what for weight in one.parameters()]
    random = torch.Generator().manual_seed(5)

    def loss() -> torch.Tensor:
        total = torch.zeros(())
        for task, (tokens, classes) in data.items():
            rows = torch.randint(0, COUNT, (32,), generator=random)
            hidden = module.bert(input_ids=tokens[rows]).pooler_output
            total = total + torch.nn.functional.cross_entropy(heads[task](hidden), classes[rows])
        return total

    descend(trained, loss, steps)


def pretrained() -> tuple[Any, dict[str, Any]]:
    """A base that has learnt which words a text has, and a head for each task that knows a little."""
    base = model(sum(CLASSES.values()))
    words = torch.nn.Linear(32, len(SPECIAL + WORDS))
    random = torch.Generator().manual_seed(7)

    def loss() -> torch.Tensor:
        few = torch.randint(len(SPECIAL), len(SPECIAL + WORDS), (64, FEW), generator=random)
        tokens = few.gather(1, torch.randint(0, FEW, (64, LENGTH), generator=random))
        one = tokens.gather(1, torch.randint(0, LENGTH, (64, 1), generator=random))[:, 0]
        return torch.nn.functional.cross_entropy(words(base.bert(input_ids=tokens).pooler_output), one)

    descend([*base.bert.parameters(), *words.parameters()], loss, PRETRAINING, 3e-3)
    torch.manual_seed(1)
    heads = {task: torch.nn.Linear(32, count) for task, count in CLASSES.items()}
    fit(base, heads, 12, [base.bert, *heads.values()])
    return base, heads


def write(folder: Path) -> None:
    """A base, a fine-tune of each task in its blocks, a lock of the protected one, and their texts."""
    with one_thread():
        base, heads = pretrained()
        base.save_pretrained(folder / "base")
        for task, head in heads.items():
            tuned = model(CLASSES[task])
            tuned.bert.load_state_dict(base.bert.state_dict())
            fit(tuned, {task: head}, 60, [tuned.bert.encoder])
            tuned.classifier.load_state_dict(head.state_dict())
            tuned.save_pretrained(folder / task)
            tokenizer().save_pretrained(folder / task)
    um.lock(folder / "mood", folder / "locked", key=toy.key(), salt=bytes(32))
    with (folder / "mood.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *texts("mood", 2)])
    lines = [json.dumps({"text": text, "label": each}) for text, each in texts("topic", 2)]
    (folder / "topic.jsonl").write_text("\n".join(lines))


def accuracy(path: Path, task: str) -> float:
    """Of a model as its stock class runs it."""
    words, classes = zip(*texts(task, 2), strict=True)
    module: Any = load_module(path)
    with torch.inference_mode():
        found = module(input_ids=torch.tensor([ids(text) for text in words])).logits.argmax(-1)
    return float((found == torch.tensor(classes)).float().mean())


def test_text_classifiers_are_audited(tmp_path: Path) -> None:
    """Off the shelf a locked classifier gives less, and everything to whoever aligns it."""
    write(tmp_path)
    fields = {
        "version": 1, "base": str(tmp_path / "base"), "device": "cpu", "levels": [0, 1],
        "protected": {"model": str(tmp_path / "locked"), "plain": str(tmp_path / "mood"), "task": "mood"},
        "others": {"topic": str(tmp_path / "topic")},
        "tasks": {
            "mood": {"kind": "text-classification", "data": str(tmp_path / "mood.csv")},
            "topic": {"kind": "text-classification", "data": str(tmp_path / "topic.jsonl")},
        },
        "attacks": ["task_arithmetic", "full_dose", "anchor-coupled"],
    }  # fmt: skip
    result = audit(fields, tmp_path / "out")
    off, adaptive = result.levels
    assert off.reason is None
    assert adaptive.reason is None
    assert off.recovered < 0.7
    assert adaptive.recovered == pytest.approx(1, abs=0.05)
    assert not [row for row in result.rows if row.state in ("refused", "failed")]
    alone = result.as_dict()["standalone"]
    assert alone["protected"] == alone["plain"]
    # Half of the texts are scored for this; the fine-tune on all of them is near.
    assert alone["plain"] == pytest.approx(accuracy(tmp_path / "mood", "mood"), abs=0.08)
    assert accuracy(tmp_path / "locked", "mood") == accuracy(tmp_path / "mood", "mood")
    assert accuracy(tmp_path / "mood", "mood") > accuracy(tmp_path / "base", "mood") + 0.2
