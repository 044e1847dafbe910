"""Images that are refused: what is wrong, where, and what would be right."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from task_data import set_config
from test_tasks_images import opened, pictures, tiny
from unmergeable.errors import InputError

LABELS = np.array([0, 1, 2, 0])


def refused(folder: Path, model: Path, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(folder, model, **fields)
    return str(caught.value)


def picture(path: Path, *shape: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pictures(1, *(shape or (8, 8)))[0]).save(path)


ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "images of two dimensions": (
        {"images": pictures(4, 8), "labels": LABELS}, "x.npz: images: not images, expected (n, height, width), or"
    ),
    "too many channels": (
        {"images": pictures(4, 8, 8, 3), "labels": LABELS},
        "not as many channels as the model takes, expected (n, height, width), or with 1 channels last or behind n, "
        "got shape (4, 8, 8, 3)",
    ),
    "channels in two places": (
        {"images": pictures(4, 1, 8, 1), "labels": LABELS}, "channels could be first or last"
    ),
    "another size": (
        {"images": pictures(4, 9, 8), "labels": LABELS},
        "x.npz: images[0]: an image that is not of the size that the model takes, expected 8 × 8, got 9 × 8\n"
        "hint: give size:, mean: and std:",
    ),
    "integers without a scale": (
        {"images": pictures(4, 8, 8).astype(np.int64), "labels": LABELS},
        "pixels of a type that has no scale, expected uint8 or floats, got int64",
    ),
    "floats out of range": (
        {"images": np.full((4, 8, 8), 254.0), "labels": LABELS}, "pixels out of range, expected 0 to 1, got 254 to 254"
    ),
    "not numbers": ({"images": np.full((4, 8, 8), np.nan), "labels": LABELS}, "pixels out of range"),
    "too few labels": (
        {"images": pictures(4, 8, 8), "labels": LABELS[:3]}, "not as many labels as images, expected 4 in labels, got 3"
    ),
    "labels that are floats": (
        {"images": pictures(4, 8, 8), "labels": LABELS / 1},
        "labels: not labels, expected whole numbers, (n,), got float64"
    ),
    "labels that are rows": ({"images": pictures(4, 8, 8), "labels": np.eye(4, dtype=int)}, "not labels"),
    "a class too many": (
        {"images": pictures(4, 8, 8), "labels": LABELS + 1},
        "x.npz: labels[2]: a label that is none of the model's classes, expected a number from 0 to 2, or cat, dog, "
        "owl, got 3",
    ),
    "classes of other names": (
        {"images": pictures(4, 8, 8), "labels": np.array(["cat", "cow", "emu", "cow"])}, "x.npz: 2 problems"
    ),
    "nothing": ({"images": pictures(0, 8, 8), "labels": LABELS[:0]}, "x.npz: no examples"),
    "pickled labels": (
        {"images": pictures(4, 8, 8), "labels": np.array([0, 1, 2, "x"], object)},
        "x.npz: labels: an array that cannot be read, expected numbers: pickled objects are never loaded",
    ),
    "several that fit": (
        {"a": pictures(4, 8, 8), "b": pictures(4, 8, 8), "labels": LABELS},
        "x.npz: several arrays could be meant, got a | b\nhint: name it by images:",
    ),
    "none that fits": (
        {"images": pictures(4, 8, 8), "y": LABELS / 2},
        "x.npz: no array that fits, got images | y\nhint: name it by labels:"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(ARRAYS))
def test_arrays(case: str, tmp_path: Path) -> None:
    arrays, expected = ARRAYS[case]
    np.savez(tmp_path / "x.npz", **arrays)
    assert expected in refused(tmp_path, tiny(tmp_path), data="x.npz")


def test_names_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=pictures(4, 8, 8), labels=LABELS)
    text = refused(tmp_path, tiny(tmp_path), data="x.npz", images="pictures")
    assert text == f"{tmp_path}/x.npz: no such array, expected images | labels, got 'pictures'"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"plain text", b"\x80\x04K\x01."])
def test_files_that_are_no_npz(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    assert "x.npz: not an .npz file" in refused(tmp_path, tiny(tmp_path), data="x.npz")


def test_a_single_array_is_no_npz(tmp_path: Path) -> None:
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, pictures(4, 8, 8))
    assert "got a single array" in refused(tmp_path, tiny(tmp_path), data="x.npz")


def test_a_damaged_npz(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=pictures(40, 8, 8), labels=np.arange(40) % 3)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[400:500] = bytes(100)
    (tmp_path / "x.npz").write_bytes(content)
    assert "x.npz: images: a damaged array" in refused(tmp_path, tiny(tmp_path), data="x.npz")


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (lambda data: data.mkdir(), "data: no folder of a class, expected a folder for each class"),
    "other names": (
        lambda data: picture(data / "cow/a.png"),
        "data: folders that are not named as the model's classes, expected cat, dog, owl, got 'cow'\nhint: give their "
        "names by classes:",
    ),
    "an empty class": (lambda data: (data / "cat").mkdir(parents=True), "data/cat: no images of a class"),
    "16 bits": (
        lambda data: (
            (data / "cat").mkdir(parents=True),
            Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(data / "cat/a.png"),
        ),
        "data/cat/a.png: an image of more than 8 bits, expected 8 bits, got I;16",
    ),
    "another size": (
        lambda data: (picture(data / "cat/a.png"), picture(data / "owl/b.png", 8, 10)),
        "data/owl/b.png: an image that is not of the size that the model takes, expected 8 × 8, got 8 × 10",
    ),
    "not a picture": (
        lambda data: (picture(data / "cat/a.png"), (data / "cat/b.png").write_bytes(b"text")),
        "data/cat/b.png: an image that cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(FOLDERS))
def test_folders(case: str, tmp_path: Path) -> None:
    make, expected = FOLDERS[case]
    make(tmp_path / "data")
    assert expected in refused(tmp_path, tiny(tmp_path), data="data")


def test_everything_wrong_with_a_folder_at_once(tmp_path: Path) -> None:
    picture(tmp_path / "data/cow/a.png")
    (tmp_path / "data/cow/labels.csv").write_text("x")
    (tmp_path / "data/dog").mkdir()
    text = refused(tmp_path, tiny(tmp_path), data="data")
    assert "data: 3 problems" in text
    for part in ("not named as the model's classes", "cow/labels.csv: not an image", "data/dog: no images"):
        assert part in text


def test_folder_names_of_a_model_without_names(tmp_path: Path) -> None:
    picture(tmp_path / "data/cat/a.png")
    text = refused(tmp_path, tiny(tmp_path, names=None), data="data")
    assert "expected 0 to 2: the model's classes have no names, got 'cat'" in text


@pytest.mark.parametrize("classes", [["cat", "dog"], ["cat", "dog", "dog"]])
def test_classes_that_are_not_the_models(classes: list[str], tmp_path: Path) -> None:
    picture(tmp_path / "data/cat/a.png")
    text = refused(tmp_path, tiny(tmp_path), data="data", classes=classes)
    assert "task t: classes: classes that are not those of the model, expected 3 different names" in text


@pytest.mark.parametrize(
    "label2id", [{"cat": 0, "dog": 1, "owl": 5}, {"cat": 0, "dog": 1, "owl": 1}, {"cat": "x"}]
)
def test_a_label2id_that_cannot_be(label2id: dict[str, Any], tmp_path: Path) -> None:
    picture(tmp_path / "data/cat/a.png")
    model = tiny(tmp_path)
    set_config(model, label2id=label2id)
    assert "label2id does not fit the model" in refused(tmp_path, model, data="data")


def test_paths_and_forms(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    assert f"{tmp_path}/gone: no such file or folder\nhint: data of task t" in refused(
        tmp_path, model, data="gone"
    )
    (tmp_path / "x.tar").write_text("x")
    text = refused(tmp_path, model, data="x.tar")
    assert "no form of images that is known, expected a folder with a folder for each class" in text
    np.savez(tmp_path / "x.npz", images=pictures(4, 8, 8), labels=LABELS)
    assert "task t: split: only saved data sets have splits" in refused(
        tmp_path, model, data="x.npz", split="test"
    )


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "config.json: the file cannot be read" in refused(tmp_path, tmp_path / "model", data="x")
    (tmp_path / "model/config.json").write_text('{"model_type": "nobody-knows"}')
    assert "transformers cannot read the configuration" in refused(tmp_path, tmp_path / "model", data="x")


def test_training_examples_are_other_ones(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=pictures(4, 8, 8), labels=LABELS, more=pictures(4, 8, 8, seed=1))
    model = tiny(tmp_path)
    (tmp_path / "sub").mkdir()
    for train in (
        {"data": "x.npz"},
        {"data": "sub/../x.npz", "limit": 2},
        {"data": "x.npz", "labels": "labels"},
    ):
        text = refused(tmp_path, model, data="x.npz", images="images", labels="labels", train=train)
        assert "task t: train: training examples are those that models are scored on" in text
    other = {"data": "x.npz", "images": "more"}
    assert opened(tmp_path, model, data="x.npz", labels="labels", train=other).training is not None


# --- preparing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mean": 0.5}, "mean and std belong together, and to size, expected mean: and std:, got mean:"),
        ({"size": 8}, "mean and std belong together, and to size, expected mean: and std:, got size:"),
        ({"size": 8, "std": 0.5}, "got size:, std:"),
        (
            {"mean": [0.1, 0.2], "std": 1},
            "task t: mean: not as many numbers as channels, expected one number, or one for",
        ),
        ({"mean": 0.0, "std": 0}, "task t: std: not a standard deviation, expected more than 0"),
        ({"mean": [], "std": []}, "task t: 2 problems"),
        ({"mean": 0.5, "std": 0.5}, "expected 8 × 8, got 9 × 9"),
    ],
)
def test_fields_that_say_too_little(fields: dict[str, Any], expected: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=pictures(4, 9, 9), labels=LABELS)
    assert expected in refused(tmp_path, tiny(tmp_path), data="x.npz", **fields)


def test_a_size_that_is_not_the_models(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=pictures(4, 9, 9), labels=LABELS)
    text = refused(tmp_path, tiny(tmp_path), data="x.npz", mean=0.5, std=0.5, size=16)
    assert "expected 8 × 8, got 16 × 16" in text


def test_a_model_of_any_size_needs_mean_and_std(tmp_path: Path) -> None:
    from transformers import ResNetConfig

    ResNetConfig(num_channels=1, num_labels=3).save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "x.npz", images=pictures(4, 8, 8), labels=LABELS)
    text = refused(tmp_path, tmp_path / "model", data="x.npz")
    assert "task t: nothing says how images become inputs of the model\nhint: give size:" in text
    task = opened(tmp_path, tmp_path / "model", data="x.npz", mean=0.5, std=0.5)
    assert task.evaluation.inputs["pixel_values"].shape == (4, 1, 8, 8)


def processor(model: Path, **changes: Any) -> None:
    settings = {"image_processor_type": "ViTImageProcessor", "do_resize": False, **changes}
    (model / "preprocessor_config.json").write_text(json.dumps(settings))


def test_an_image_processor_and_fields_contradict_each_other(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    processor(model)
    np.savez(tmp_path / "x.npz", images=pictures(4, 8, 8), labels=LABELS)
    text = refused(tmp_path, model, data="x.npz", mean=0.5, std=0.5)
    assert "task t: 2 problems" in text
    assert "task t: mean: the model has an image processor of its own (hint: leave mean: out" in text


def test_image_processors_that_fail(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    np.savez(tmp_path / "x.npz", images=pictures(4, 8, 8) / 255, labels=LABELS)
    processor(model)
    assert "the model's image processor takes pixels of 8 bits, expected uint8, got float32" in refused(
        tmp_path, model, data="x.npz"
    )
    for number, name in enumerate("ab"):
        picture(tmp_path / f"data/cat/{name}.png", 8, 8 + number)
    assert "the model's image processor fails" in refused(tmp_path, model, data="data")
    processor(model, do_convert_rgb=True)
    np.savez(tmp_path / "x.npz", images=pictures(4, 8, 8), labels=LABELS)
    text = refused(tmp_path, model, data="x.npz")
    assert "does not make one image of each, expected (n, 1, height, width), got [4, 3, 8, 8]" in text
    (model / "preprocessor_config.json").write_text('{"image_processor_type": "Nobody"}')
    assert "the model's image processor cannot be loaded" in refused(tmp_path, model, data="x.npz")


# --- data sets ------------------------------------------------------------------------------------------------


def test_data_sets(tmp_path: Path) -> None:
    import datasets

    whole = datasets.Dataset.from_dict({"image": [[[0] * 8] * 8] * 2, "label": [0, 1], "file": ["a", "b"]})
    datasets.DatasetDict({"a": whole, "b": whole}).save_to_disk(tmp_path / "two")
    whole.save_to_disk(tmp_path / "one")
    whole.select([]).save_to_disk(tmp_path / "none")
    model = tiny(tmp_path)
    for fields, expected in (
        ({"data": "two"}, "two: a data set of several splits, expected split: a | b"),
        ({"data": "two", "split": "c"}, "two: no such split, expected a | b, got 'c'"),
        ({"data": "one", "split": "a"}, "one: a data set without splits, got split: a"),
        ({"data": "none"}, "none: the data set cannot be read"),
        ({"data": "one", "labels": "y"}, "one: no such column, expected image | label | file, got 'y'"),
        ({"data": "one", "images": "file"}, "one: file[0]: not an image, got str"),
    ):
        assert expected in refused(tmp_path, model, **fields)
    renamed = whole.rename_column("label", "target")
    renamed.save_to_disk(tmp_path / "renamed")
    text = refused(tmp_path, model, data="renamed")
    assert "got none of label, labels\nhint: name it by labels:" in text
    (tmp_path / "one/state.json").write_text("{}")
    assert "one: the data set cannot be read" in refused(tmp_path, model, data="one")


def test_data_sets_with_classes_of_other_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Array2D((8, 8), "uint8"), "label": datasets.ClassLabel(names=["cow", "dog"])}
    )
    rows = {"image": list(pictures(2, 8, 8)), "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    text = refused(tmp_path, tiny(tmp_path), data="data")
    assert "data: the data set's classes are not the model's, expected cat, dog, owl, got 'cow'" in text
    task = opened(tmp_path, tiny(tmp_path), data="data", classes=["dog", "emu", "cow"])
    assert task.evaluation.labels.tolist() == [2, 0]
    assert opened(tmp_path, tiny(tmp_path, names=None), data="data").evaluation.labels.tolist() == [0, 1]


@pytest.mark.parametrize("package", ["PIL.Image", "datasets"])
def test_packages_that_are_not_installed(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tmp_path)
    picture(tmp_path / "data/cat/a.png")
    if package == "datasets":
        (tmp_path / "data/state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    text = refused(tmp_path, model, data="data")
    assert text.startswith(f"the package {package.partition('.')[0]} is needed")
    assert text.endswith("hint: pip install 'unmergeable[audit]'")
