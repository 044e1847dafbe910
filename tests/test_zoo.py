"""The embedded zoo: what it weighs, that stock classes read it, and that its figures hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unmergeable import zoo
from unmergeable.errors import InputError

TASKS = zoo.tasks()
ROOT = zoo.model_path(zoo.BASE).parents[1]


def _body(name: str) -> dict[str, np.ndarray]:
    """A model's stored tensors in float32, without the head."""
    from safetensors.numpy import load_file

    state = load_file(zoo.model_path(name) / "model.safetensors")
    return {key: value.astype(np.float32) for key, value in state.items() if "classifier" not in key}


def test_size_and_files() -> None:
    assert len(TASKS) >= 3
    size = sum(file.stat().st_size for file in ROOT.rglob("*") if file.is_file())
    assert size <= 12_000_000
    for name in (zoo.BASE, *TASKS):
        assert sorted(f.name for f in zoo.model_path(name).iterdir()) == ["config.json", "model.safetensors"]
        assert zoo.facts()["parameters"][name] <= 700_000
    assert (ROOT / "README.md").is_file()


def test_layout_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from unmergeable import zoo; zoo.images(zoo.tasks()[0]); zoo.labels(zoo.tasks()[0]);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", [zoo.BASE, *TASKS])
def test_stock_class_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing missing, nothing left over, and no connection opened."""
    import socket

    import torch
    from transformers import ViTForImageClassification

    def refuse(*_: object) -> None:
        raise AssertionError("the zoo went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, report = ViTForImageClassification.from_pretrained(
        zoo.model_path(name), dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.num_parameters() == zoo.facts()["parameters"][name]
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()


def test_config_is_as_transformers_writes_it(tmp_path: Path) -> None:
    import transformers

    for name in (zoo.BASE, *TASKS):
        stored = json.loads((zoo.model_path(name) / "config.json").read_text(encoding="utf-8"))
        transformers.ViTConfig.from_pretrained(zoo.model_path(name)).save_pretrained(tmp_path)
        again = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        # The version is the writer's own.
        assert again | {"transformers_version": ""} == stored | {"transformers_version": ""}


def test_heads_are_rows_of_the_base_and_private_to_their_task() -> None:
    from safetensors.numpy import load_file

    base = load_file(zoo.model_path(zoo.BASE) / "model.safetensors")
    start = 0
    for task in TASKS:
        own = load_file(zoo.model_path(task) / "model.safetensors")
        rows = slice(start, start + len(zoo.labels(task)))
        for kind in ("weight", "bias"):
            np.testing.assert_array_equal(own[f"classifier.{kind}"], base[f"classifier.{kind}"][rows])
            assert own[f"classifier.{kind}"].shape != base[f"classifier.{kind}"].shape
        start = rows.stop
    assert start == len(base["classifier.bias"])


@pytest.mark.parametrize("task", TASKS)
def test_images(task: str) -> None:
    classes = len(zoo.labels(task))
    test, test_labels = zoo.images(task)
    few, few_labels = zoo.images(task, "few")
    for images, labels in ((test, test_labels), (few, few_labels)):
        assert images.dtype == np.uint8
        assert images.shape == (len(labels), 28, 28)
        assert set(labels) == set(range(classes))
    assert 500 <= len(test) <= 1000
    assert len(few) == 16 * classes
    for length in (classes, 3 * classes, len(test)):  # any prefix is balanced
        counts = np.bincount(test_labels[:length], minlength=classes)
        assert counts.max() - counts.min() <= 1
    assert not {image.tobytes() for image in test} & {image.tobytes() for image in few}
    x = zoo.pixels(test)
    assert x.shape == (len(test), 1, 28, 28)
    assert x.dtype == np.float32
    assert (x.min(), x.max()) == (-1, 1)


def test_font_families_are_disjoint() -> None:
    fonts = zoo.facts()["fonts"]
    assert not set(fonts["train"]) & set(fonts["test"])


def test_accuracies_are_those_of_the_record() -> None:
    """All models on all tasks. Two images of slack: another machine's rounding may turn a close call."""
    record = zoo.facts()["accuracies"]
    for name in (zoo.BASE, *TASKS):
        measured = zoo.accuracies(zoo.model_path(name))
        for task in TASKS:
            slack = 2.01 / len(zoo.images(task)[1])
            assert measured[task] == pytest.approx(record[name][task], abs=slack)


def test_a_fine_tune_is_far_above_the_base() -> None:
    for facts in zoo.facts()["tasks"].values():
        gain = facts["fine_tuned"] - facts["base"]
        assert gain > 5 * facts["standard_error"]
        assert gain >= 0.15


def test_own_head_is_the_tasks_head() -> None:
    task = TASKS[0]
    folder = zoo.model_path(task)
    assert zoo.accuracy(folder, task, 200, own_head=True) == zoo.accuracy(folder, task, 200)
    with pytest.raises(InputError, match="own head"):
        zoo.accuracy(zoo.model_path(zoo.BASE), task, 200, own_head=True)


def test_folder_state_and_module_score_alike() -> None:
    task = TASKS[0]
    folder = zoo.model_path(task)
    expected = zoo.accuracy(folder, task, 100)
    assert zoo.accuracy(_body(task), task, 100) == expected
    assert zoo.accuracy(zoo.load_model(folder), task, 100) == expected


def test_task_arithmetic_works() -> None:
    """The merge of all fine-tunes with one coefficient, as recorded, is useful on every task."""
    grid = zoo.facts()["task_arithmetic"]["+".join(TASKS)]
    best = max(grid, key=lambda c: min(grid[c].values()))
    base, vectors = _body(zoo.BASE), [_body(task) for task in TASKS]
    merged = {
        key: value + np.float32(best) * sum(v[key] - value for v in vectors) for key, value in base.items()
    }
    for task, score in zoo.accuracies(merged).items():
        assert zoo.value(task, score) == pytest.approx(grid[best][task], abs=0.02)
        assert zoo.value(task, score) >= 0.3


def test_full_dose_has_a_useful_row() -> None:
    for rows in zoo.facts()["full_dose"].values():
        assert max(min(row["protected"], row["own"]) for row in rows) >= 0.3


def test_copy_to(tmp_path: Path) -> None:
    copies = zoo.copy_to(tmp_path)
    assert list(copies) == [zoo.BASE, *TASKS]
    for name, folder in copies.items():
        for file in zoo.model_path(name).iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(InputError, match="exists"):
        zoo.copy_to(tmp_path)


def test_bad_names_are_refused() -> None:
    with pytest.raises(InputError, match="no task"):
        zoo.model_path("nothing")
    with pytest.raises(InputError, match="no split"):
        zoo.images(TASKS[0], "train")
    state = _body(TASKS[0])
    state.pop(next(iter(state)))
    with pytest.raises(InputError, match="missing"):
        zoo.accuracy(state, TASKS[0], 10)
