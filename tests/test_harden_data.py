"""`harden` on data of every form that it is documented for, from files to a model that its stock class opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unmergeable as um
from task_data import WORDS, saved, write_lines
from unmergeable import cli
from unmergeable.harden import measure
from unmergeable.merging.tensors import load_state
from unmergeable.stock import load_module
from unmergeable.tasks import open_task
from unmergeable.tasks.task import TensorTask

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH, COUNT = 12, 160
CLASSES = ["dark", "light"]


def words(random: np.random.Generator, favourite: str, count: int) -> str:
    """Half of them one and the same."""
    drawn = np.where(random.random(count) < 0.5, favourite, random.choice(WORDS, count))
    return " ".join(drawn)


def tokens(folder: Path) -> str:
    """Ids of tokens in an array."""
    random = np.random.default_rng(0)
    ids = random.integers(4, 34, (COUNT, LENGTH))
    ids[random.random(ids.shape) < 0.5] = 5
    np.savez(folder / "data.npz", input_ids=ids)
    return "data.npz"


def text(folder: Path) -> str:
    """One text in a file."""
    (folder / "data.txt").write_text(words(np.random.default_rng(0), "w5", COUNT * LENGTH))
    return "data.txt"


def lines(folder: Path) -> str:
    """Labelled texts of different lengths, a line each."""
    random = np.random.default_rng(0)
    labels, sizes = np.arange(COUNT) % 2, random.integers(3, LENGTH, COUNT)
    records = [
        {"text": words(random, ("w7", "w5")[label], size), "label": CLASSES[label]}
        for label, size in zip(labels, sizes, strict=True)
    ]
    write_lines(folder / "data.jsonl", records)
    return "data.jsonl"


def pictures(folder: Path) -> str:
    """A folder with a folder a class."""
    random = np.random.default_rng(0)
    for number in range(COUNT):
        label = number % 2
        (folder / "data" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(100 * label, 100 * label + 150, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "data" / CLASSES[label] / f"{number}.png")
    return "data"


def fine_tuned(folder: Path, model: str, data: str, fields: dict[str, Any]) -> None:
    """A tiny base, and a fine-tune of it that was made from the data."""
    options: dict[str, Any] = {} if model == "vit" else {"words": {}}
    if model != "llama":
        options["id2label"] = dict(enumerate(CLASSES))
        options["label2id"] = {name: number for number, name in enumerate(CLASSES)}
    for name in ("base", "expert"):
        _, module = saved(folder / name, model, **options)
    task = open_task("t", {**fields, "data": data}, folder=folder, model=folder / "base")
    assert isinstance(task, TensorTask)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        task.loss(module, task.evaluation).backward()
        optimizer.step()
    kept: Any = module
    kept.save_pretrained(folder / "expert")


@pytest.mark.parametrize(
    ("model", "kind", "write", "more"),
    [
        ("llama", "language-modelling", tokens, {"length": LENGTH}),
        ("llama", "language-modelling", text, {"length": LENGTH}),
        ("bert", "text-classification", lines, {}),
        ("vit", "image-classification", pictures, {"mean": 0.5, "std": 0.5}),
    ],
    ids=["npz of ids", "txt", "jsonl", "folders of images"],
)
def test_data_of_every_form(
    model: str, kind: str, write: Callable[[Path], str], more: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The class of the model says which kind it is, and the command line does as the function does."""
    monkeypatch.setattr(measure, "MERGES", 2)
    monkeypatch.setattr(measure, "GRID", ((0.5, 0.2),))
    data = write(tmp_path)
    fine_tuned(tmp_path, model, data, {"kind": kind, **more})
    given: dict[str, Any] = {"base": tmp_path / "base", "data": tmp_path / data, "steps": 3, "batch": 8}
    given["device"] = "cpu"
    report = um.harden(tmp_path / "expert", tmp_path / "out", fields=more, **given)
    images = kind == "image-classification"
    assert report.objective == ("trap+collapse+kindred" if images else "trap")
    assert report.metric == ("cross-entropy" if kind == "language-modelling" else "accuracy")
    assert sum(report.examples.values()) == COUNT
    files = [sorted(one.name for one in (tmp_path / name).iterdir()) for name in ("expert", "out")]
    assert files[0] == files[1]
    load_module(tmp_path / "out")
    arguments = ["harden", str(tmp_path / "expert"), str(tmp_path / "again"), "-q", "--json"]
    arguments += [part for name, value in given.items() for part in (f"--{name}", str(value))]
    arguments += [part for name, value in more.items() for part in ("--set", f"{name}={value}")]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["standalone"] == report.standalone
    states = [load_state(tmp_path / name) for name in ("expert", "out", "again")]
    assert any(not torch.equal(one, states[1][name]) for name, one in states[0].items())
    assert all(torch.equal(one, states[2][name]) for name, one in states[1].items())
