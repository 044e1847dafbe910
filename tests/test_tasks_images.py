"""Image classification from every form of data, with every way of preparing pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from task_data import saved, set_config
from unmergeable import zoo
from unmergeable.stock import load_module
from unmergeable.tasks import open_task
from unmergeable.tasks.augment import shaken
from unmergeable.tasks.images import _natural
from unmergeable.tasks.task import Examples, TensorTask

NAMES = ["cat", "dog", "owl"]


def tiny(folder: Path, channels: int = 1, names: list[str] | None = NAMES, size: int = 8) -> Path:
    """A model of three classes for images of 8 × 8."""
    given: dict[str, Any] = {"num_labels": 3}
    if names is not None:
        given = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }
    model, _ = saved(folder / "model", "vit", num_channels=channels, image_size=size, **given)
    return model


def pictures(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def opened(folder: Path, model: Path, **fields: Any) -> TensorTask:
    task = open_task("t", {"kind": "image-classification", **fields}, folder=folder, model=model)
    assert isinstance(task, TensorTask)
    return task


def pixels(task: TensorTask) -> torch.Tensor:
    return task.evaluation.inputs["pixel_values"]


# --- the embedded zoo -----------------------------------------------------------------------------------------


def zoo_folder(folder: Path, task: str = "fashion", count: int = 40) -> Path:
    """The first test images of a task as a folder with a folder a class."""
    images, labels = zoo.images(task)
    names = zoo.labels(task)
    for number, (image, label) in enumerate(zip(images[:count], labels[:count], strict=True)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / names[label] / f"{number}.png")
    return folder


def zoo_task(folder: Path, name: str, **fields: Any) -> TensorTask:
    images, labels = zoo.images(name)
    few, few_labels = zoo.images(name, "few")
    arrays = {"test_images": images, "test_labels": labels, "few_images": few, "few_labels": few_labels}
    np.savez(folder / "zoo.npz", **arrays)
    train = {"data": "zoo.npz", "images": "few_images", "labels": "few_labels"}
    chosen = {"images": "test_images", "labels": "test_labels", "train": train, **fields}
    return opened(folder, zoo.model_path(name), data="zoo.npz", **chosen)


def test_accuracy_on_the_embedded_zoo(tmp_path: Path) -> None:
    name, limit = "fashion", 100
    task = zoo_task(tmp_path, name, limit=limit)
    images, labels = zoo.images(name)
    assert (len(task), task.classes, task.batch, task.screen) == (limit, 10, 50, 96)
    np.testing.assert_allclose(pixels(task).numpy(), zoo.pixels(images[:limit]), atol=1e-6)
    assert task.evaluation.labels.tolist() == labels[:limit].tolist()
    own = load_module(zoo.model_path(name))
    other: Any = zoo.load_model(zoo.model_path(zoo.BASE))
    assert task.score(own, range(limit)).mean() == zoo.accuracy(own, name, limit)
    expected = zoo.accuracy(other, name, limit)
    other.classifier = own.get_submodule("classifier")  # the base's head has the classes of all tasks
    assert task.score(other, range(limit)).mean() == expected
    assert np.bincount(task.few(2, 0).labels.numpy()).tolist() == [2] * 10
    assert task.training is not None
    assert len(task.training) == len(zoo.images(name, "few")[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.tasks())
def test_accuracy_on_all_of_the_embedded_zoo(name: str, tmp_path: Path) -> None:
    task = zoo_task(tmp_path, name)
    module = load_module(zoo.model_path(name))
    assert task.score(module, range(len(task))).mean() == zoo.accuracy(module, name)


def test_a_folder_of_pictures_is_the_same_as_arrays(tmp_path: Path) -> None:
    images, labels = zoo.images("fashion")
    zoo_folder(tmp_path / "pictures")
    task = opened(tmp_path, zoo.model_path("fashion"), data="pictures")
    rows = sorted(
        (label, tuple(x))
        for label, x in zip(labels[:40], zoo.pixels(images[:40]).reshape(40, -1), strict=True)
    )
    found = sorted(
        (int(label), tuple(x))
        for label, x in zip(task.evaluation.labels, pixels(task).reshape(40, -1).numpy(), strict=True)
    )
    assert [label for label, _ in rows] == [label for label, _ in found]
    np.testing.assert_allclose([x for _, x in found], [x for _, x in rows], atol=1e-6)
    score = task.score(load_module(zoo.model_path("fashion")), range(40)).mean()
    assert score == zoo.accuracy(zoo.model_path("fashion"), "fashion", limit=40)


# --- forms of data --------------------------------------------------------------------------------------------


def test_classes_come_in_turn_and_files_in_natural_order(tmp_path: Path) -> None:
    shades = {"cat/2.png": 10, "cat/10.png": 20, "dog/x1.png": 30, "owl/a.bmp": 40, "cat/1.png": 5}
    for name, shade in shades.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), shade, np.uint8)).save(tmp_path / "data" / name)
    (tmp_path / "data/README.txt").write_text("beside the classes")
    (tmp_path / "data/cat/.hidden").write_text("")
    model = tiny(tmp_path)
    task = opened(tmp_path, model, data="data")
    assert task.evaluation.labels.tolist() == [0, 1, 2, 0, 0]
    assert (pixels(task)[:, 0, 0, 0] * 127.5 + 127.5).round().int().tolist() == [5, 30, 40, 10, 20]
    limited = opened(tmp_path, model, data="data", limit=3)
    assert limited.evaluation.labels.tolist() == [0, 1, 2]
    renamed = opened(tmp_path, model, data="data", classes=["owl", "dog", "cat"])
    assert renamed.evaluation.labels.tolist() == [2, 1, 0, 2, 2]
    assert renamed.digest != task.digest


def test_folders_that_are_numbers_of_classes(tmp_path: Path) -> None:
    for name in ("0", "2", "1"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(pictures(1, 8, 8)[0]).save(tmp_path / "data" / name / "a.png")
    task = opened(tmp_path, tiny(tmp_path, names=None), data="data")
    assert task.evaluation.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("channels", "shape"),
    [
        (1, (8, 8)),
        (1, (8, 8, 1)),
        (1, (1, 8, 8)),
        (3, (8, 8, 3)),
        (3, (3, 8, 8)),
        (3, (8, 8)),
        (3, (1, 8, 8)),
    ],
)
def test_channels_are_found_in_any_place(tmp_path: Path, channels: int, shape: tuple[int, ...]) -> None:
    images = pictures(4, *shape)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([0, 1, 2, 0]))
    task = opened(tmp_path, tiny(tmp_path, channels), data="x.npz")
    if shape == (8, 8, 3):
        plain = images.transpose(0, 3, 1, 2)
    elif shape == (3, 8, 8):
        plain = images
    else:
        plain = np.repeat(images.reshape(4, 1, 8, 8), channels, axis=1)
    np.testing.assert_allclose(pixels(task).numpy(), plain / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_floats_are_pixels_from_0_to_1(tmp_path: Path, dtype: type) -> None:
    images = (pictures(4, 8, 8) / 255).astype(dtype)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array(["owl", "cat", "dog", "2"]))
    task = opened(tmp_path, tiny(tmp_path), data="x.npz")
    assert task.evaluation.labels.tolist() == [2, 0, 1, 2]
    np.testing.assert_allclose(pixels(task)[:, 0].numpy(), images.astype(np.float32) * 2 - 1, atol=1e-6)


def test_the_only_arrays_that_can_be_meant(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=pictures(4, 8, 8), y=np.array([0, 1, 2, 0]), scale=np.array(3.0))
    assert opened(tmp_path, tiny(tmp_path), data="x.npz").evaluation.labels.tolist() == [0, 1, 2, 0]


def test_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    images = pictures(6, 8, 8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "owl", "cat"])}
    )
    rows = {"image": [Image.fromarray(image) for image in images], "label": [0, 1, 2, 0, 1, 2]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": whole.select([0, 1, 2]), "test": whole.select([3, 4, 5])}).save_to_disk(
        tmp_path / "both"
    )
    whole.save_to_disk(tmp_path / "whole")
    model = tiny(tmp_path)
    task = opened(tmp_path, model, data="both", split="test", train={"data": "both", "split": "train"})
    assert task.evaluation.labels.tolist() == [1, 2, 0]  # by name: the order of the data set is another
    np.testing.assert_allclose(pixels(task)[:, 0].numpy(), images[3:] / 127.5 - 1, atol=1e-6)
    assert task.training is not None
    np.testing.assert_allclose(
        task.training.inputs["pixel_values"][:, 0].numpy(), images[:3] / 127.5 - 1, atol=1e-6
    )
    assert len(opened(tmp_path, model, data="whole", limit=2)) == 2


def test_a_saved_data_set_of_arrays(tmp_path: Path) -> None:
    import datasets

    images = pictures(3, 8, 8)
    features = datasets.Features({"x": datasets.Array2D((8, 8), "uint8"), "y": datasets.Value("int64")})
    datasets.Dataset.from_dict({"x": list(images), "y": [2, 0, 1]}, features=features).save_to_disk(
        tmp_path / "data"
    )
    task = opened(tmp_path, tiny(tmp_path), data="data", images="x", labels="y")
    assert task.evaluation.labels.tolist() == [2, 0, 1]
    np.testing.assert_allclose(pixels(task)[:, 0].numpy(), images / 127.5 - 1, atol=1e-6)


def test_natural_order() -> None:
    names = ["a10", "²", "2a", "a", "10", "a1b", "02", "a1", "2", "a01"]
    assert sorted(names, key=_natural) == ["02", "2", "2a", "10", "a", "a01", "a1", "a1b", "a10", "²"]


# --- preparing ------------------------------------------------------------------------------------------------


def test_mean_std_and_size_of_the_fields(tmp_path: Path) -> None:
    images = pictures(3, 16, 12, 3)
    images[0] = [[[255, 128, 0]]]  # of one colour: the same in any size
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([0, 1, 2]))
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 1.0]
    task = opened(tmp_path, tiny(tmp_path, 3), data="x.npz", size=8, mean=mean, std=std)
    assert pixels(task).shape == (3, 3, 8, 8)
    expected = [(1 - 0.1) / 0.5, (128 / 255 - 0.2) / 0.25, -0.3]
    np.testing.assert_allclose(pixels(task)[0, :, 3, 4], expected, atol=1e-6)
    own = torch.from_numpy(images[1:2]).permute(0, 3, 1, 2).float() / 255
    scaled = torch.nn.functional.interpolate(own, (8, 8), mode="bilinear", antialias=True)[0]
    wanted = (scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(pixels(task)[1], wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_image_processor_of_the_model(tmp_path: Path, channels: int) -> None:
    from transformers import AutoImageProcessor

    model = tiny(tmp_path, channels)
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8},
        "do_rescale": True, "do_normalize": True, "image_mean": [0.4] * channels, "image_std": [0.2] * channels,
    }  # fmt: skip
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    images = pictures(70, 12, 10, *([3] if channels == 3 else []))  # more than are prepared at a time
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(70) % 3)
    processor = AutoImageProcessor.from_pretrained(str(model))
    expected = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    found = pixels(opened(tmp_path, model, data="x.npz"))
    assert found.shape == (70, channels, 8, 8)
    torch.testing.assert_close(found, expected)


def test_pictures_become_what_the_model_takes(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "cat"
    folder.mkdir(parents=True)
    colour = pictures(1, 8, 8, 3)[0]
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    Image.fromarray(colour).save(folder / "a.png")
    Image.fromarray(colour).convert("RGBA").save(folder / "b.png")
    Image.fromarray(colour[::-1, ::-1]).save(folder / "c.png", exif=turned)
    Image.fromarray(colour[..., 0]).save(folder / "d.png")
    three = pixels(opened(tmp_path, tiny(tmp_path / "3", 3), data="data"))
    expected = torch.from_numpy(colour / 127.5 - 1).permute(2, 0, 1).float()
    for row in range(3):
        torch.testing.assert_close(three[row], expected)
    torch.testing.assert_close(three[3], expected[:1].repeat(3, 1, 1))
    one = pixels(opened(tmp_path, tiny(tmp_path / "1", 1), data="data"))
    grey = np.asarray(Image.fromarray(colour).convert("L")) / 127.5 - 1
    torch.testing.assert_close(one[0, 0], torch.from_numpy(grey).float())


def test_a_model_that_says_no_size_takes_any_with_mean_and_std(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    set_config(model, image_size=[8, 6])
    np.savez(tmp_path / "x.npz", images=pictures(2, 8, 6), labels=np.array([0, 1]))
    assert pixels(opened(tmp_path, model, data="x.npz")).shape == (2, 1, 8, 6)


# --- augmentation ---------------------------------------------------------------------------------------------


def test_augmentation_is_light_random_and_reproducible() -> None:
    images, labels = zoo.images("digits")
    some = Examples(
        {"pixel_values": torch.from_numpy(zoo.pixels(images[:40]))}, torch.from_numpy(labels[:40])
    )
    first, again, other = (shaken(some, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.inputs["pixel_values"].shape == some.inputs["pixel_values"].shape
    assert first.inputs["pixel_values"].dtype == torch.float32
    assert torch.equal(first.labels, some.labels)
    assert first.digest() == again.digest() != other.digest()
    change = (first.inputs["pixel_values"] - some.inputs["pixel_values"]).flatten(1).norm(dim=1)
    assert float(change.min()) > 0.1
    module = zoo.load_model(zoo.model_path("digits"))
    with torch.inference_mode():
        right = [
            float((module(**each.inputs).logits.argmax(1) == each.labels).float().mean())
            for each in (some, first)
        ]
    assert right[1] > right[0] - 0.15


def test_augmentation_turns_pixels_not_proportions() -> None:
    """A disc stays a disc in an image that is not square."""
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(60.0), indexing="ij")
    disc = (((x - 29.5) ** 2 + (y - 9.5) ** 2) < 36).float()[None, None].repeat(200, 1, 1, 1)
    moved = shaken(Examples({"pixel_values": disc}, torch.zeros(200)), torch.Generator().manual_seed(0))
    pixel = moved.inputs["pixel_values"][:, 0].clamp(min=0.3) - 0.3  # without noise
    mass = pixel.sum((1, 2))

    def spread(along: torch.Tensor) -> torch.Tensor:
        middle = (pixel * along).sum((1, 2)) / mass
        return ((pixel * (along - middle[:, None, None]) ** 2).sum((1, 2)) / mass).sqrt()

    ratio = spread(x) / spread(y)
    assert float((ratio - 1).abs().max()) < 0.08
    size = mass / mass.mean()
    assert 1.1 < float(size.max() / size.min()) < 1.8  # scales from 0.88 to 1.12
    middle = (pixel * x).sum((1, 2)) / mass
    assert 2 < float((middle - 29.5).abs().max()) < 60 * 0.07 * 1.15
