"""Image classification: a folder with a folder for each class, arrays in an .npz, or a saved data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.problems import Problems, quoted
from ..errors import InputError
from .arrays import Array, Arrays
from .augment import shaken
from .classes import Classes, read_classes
from .fields import ImageClassification, Images, parse_fields
from .pixels import Pixels, Placed, Preparation, preparation
from .pretrained import read_config
from .sources import INSTALL, column, first_line, is_saved, load_saved, locate, needed, training_source
from .task import Examples, TensorTask

# What a picture can be stored as without losing anything that the model is to see. 16 bits would be cut off.
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"})


@dataclass(frozen=True)
class _Found:
    """Labelled images that are not read yet: labels as numbers, and pixels by position."""

    labels: list[int]
    image: Callable[[int], Placed]

    def __iter__(self) -> Iterator[Placed]:
        return (self.image(row) for row in range(len(self.labels)))


def read(name: str, fields: Mapping[str, Any], *, folder: Path, model: Path) -> TensorTask:
    """Open a task of image classification; see `tasks.open_task`.

    Of a folder with classes, examples come one of each class in turn, files in natural order: any first part is
    as balanced as can be.
    """
    where = f"task {name}"
    given = parse_fields(ImageClassification, fields, where)
    config = read_config(model)
    classes = read_classes(config, given.classes, model, where)
    prepare = preparation(config, given, model, where)
    training = training_source(given, given.train, ("images", "labels"), folder, where)
    return TensorTask(
        name=name,
        kind=given.kind,
        metric="accuracy",
        evaluation=_examples(given, classes, prepare, folder, where),
        training=None
        if training is None
        else _examples(training, classes, prepare, folder, f"{where}: train"),
        batch=given.batch,
        augment=shaken,
        classes=classes.count,
    )


def _examples(source: Images, classes: Classes, prepare: Preparation, folder: Path, where: str) -> Examples:
    import torch

    path = locate(folder, source.data, where)
    if path.is_dir():
        reader = _saved if is_saved(path) else _folders
    elif path.suffix == ".npz":
        reader = _arrays
    else:
        expected = "a folder with a folder for each class, an .npz file, or a folder saved by datasets"
        raise InputError("no form of images that is known", where=path, expected=expected)
    if source.split is not None and reader is not _saved:
        raise InputError(
            "only saved data sets have splits", where=f"{where}: split", got=quoted(source.split)
        )
    found = reader(path, source, classes, prepare.channels)
    return Examples({"pixel_values": prepare(found)}, torch.tensor(found.labels, dtype=torch.long))


# --- a folder for each class ----------------------------------------------------------------------------------


def _folders(path: Path, source: Images, classes: Classes, channels: int) -> _Found:
    Image = needed("PIL.Image", INSTALL)  # noqa: N806 - its name
    known = set(Image.registered_extensions())
    problems = Problems(path)
    names = sorted((entry.name for entry in _visible(path) if entry.is_dir()), key=_natural)
    if not names:
        problems.add("no folder of a class", expected="a folder for each class, with its images")
    strange = [name for name in names if classes.number(name) is None]
    if strange:
        shown = ", ".join(map(quoted, strange[:6])) + (f" and {len(strange) - 6} more" if strange[6:] else "")
        problems.add(
            "folders that are not named as the model's classes",
            expected=", ".join(classes.names[:12])
            or f"0 to {classes.count - 1}: the model's classes have no names",
            got=shown,
            hint="give their names by classes:, in the order of the model's outputs",
        )
    columns = []
    for name in names:
        files = sorted((entry for entry in _visible(path / name)), key=lambda file: _natural(file.name))
        for file in files:
            if not file.is_file() or file.suffix.lower() not in known:
                problems.add("not an image", where=file)
        if not files:
            problems.add("no images of a class", where=path / name)
        columns.append([(file, name) for file in files])
    problems.raise_any()
    chosen = [each for row in zip_longest(*columns) for each in row if each is not None][: source.limit]
    labels = classes.read([name for _, name in chosen], path, lambda row: str(chosen[row][0]))
    return _Found(labels, lambda row: (_open(chosen[row][0], channels), str(chosen[row][0])))


def _visible(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if not entry.name.startswith(".")]


def _natural(name: str) -> tuple[Any, ...]:
    """Numbers in names by their size: 2 before 10."""
    parts = re.split(r"([0-9]+)", name)  # text and numbers in turn
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts)), name


def _open(file: Path, channels: int) -> Pixels:
    Image = needed("PIL.Image", INSTALL)  # noqa: N806
    try:
        with Image.open(file) as picture:
            return _picture(picture, channels, str(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError("an image that cannot be read", where=file, got=first_line(error)) from error


def _picture(picture: Any, channels: int, place: str) -> Pixels:
    """Pixels of an image of Pillow, upright, in the model's channels."""
    turn: Any = needed("PIL.ImageOps", INSTALL)
    if picture.mode not in _MODES:
        raise InputError("an image of more than 8 bits", where=place, expected="8 bits", got=picture.mode)
    upright = turn.exif_transpose(picture)
    pixels = np.array(upright.convert("L" if channels == 1 else "RGB"))
    pixels = pixels[..., None] if channels == 1 else pixels
    if pixels.shape[2] != channels:
        raise InputError("pictures have 1 or 3 channels", where=place, expected=f"{channels} for this model")
    return pixels


# --- arrays ---------------------------------------------------------------------------------------------------


def _arrays(path: Path, source: Images, classes: Classes, channels: int) -> _Found:
    with Arrays(path) as file:
        name, raw = file.choose(source.images, "images", lambda array: array.ndim in (3, 4), "images")
        label_name, labels = file.choose(
            source.labels, "labels", lambda array: array.ndim == 1 and array.dtype.kind in "iuU", "labels"
        )
    place = f"{path}: {name}"
    images = _layout(raw, channels, place)
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        got = f"{labels.dtype} of shape {labels.shape}"
        raise InputError("not labels", where=f"{path}: {label_name}", expected="whole numbers, (n,)", got=got)
    if len(labels) != len(images):
        what = "not as many labels as images"
        raise InputError(what, where=path, expected=f"{len(images)} in {label_name}", got=len(labels))
    if not len(images):
        raise InputError("no examples", where=path)
    images = images[: source.limit]
    numbers = classes.read(labels[: source.limit].tolist(), path, lambda row: f"{label_name}[{row}]")
    return _Found(numbers, lambda row: (_values(images[row], f"{place}[{row}]"), f"{place}[{row}]"))


def _layout(images: Array, channels: int, place: str) -> NDArray[Any]:
    """Images with channels last, as many as the model has: grey ones are repeated.

    Raises:
        InputError: it cannot be told where the channels are, or they are too many.
    """
    expected = f"(n, height, width), or with {channels} channels last or behind n"
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4:
        last, first = (images.shape[axis] in {1, channels} for axis in (3, 1))
        if last == first:
            what = "channels could be first or last" if last else "not as many channels as the model takes"
            raise InputError(what, where=place, expected=expected, got=f"shape {images.shape}")
        if first:
            images = images.transpose(0, 2, 3, 1)
    else:
        raise InputError("not images", where=place, expected=expected, got=f"shape {images.shape}")
    return images if images.shape[3] == channels else np.repeat(images, channels, axis=3)


def _values(image: Array, place: str) -> Pixels:
    """Pixels as uint8, or as float32 in 0 … 1."""
    if image.dtype == np.uint8:
        return image
    hint = "store uint8, or floats from 0 to 1"
    if image.dtype.kind != "f":
        raise InputError(
            "pixels of a type that has no scale", where=place, expected="uint8 or floats", got=image.dtype
        )
    least, most = float(image.min()), float(image.max())
    if not (least >= 0 and most <= 1):  # NaN is neither
        got = f"{least:g} to {most:g}"
        raise InputError("pixels out of range", where=place, expected="0 to 1", got=got, hint=hint)
    return image.astype(np.float32)


# --- data sets ------------------------------------------------------------------------------------------------


def _saved(path: Path, source: Images, classes: Classes, channels: int) -> _Found:
    datasets = needed("datasets", INSTALL)
    found = load_saved(path, source.split)
    name = column(found, source.images, ("image", "images", "img", "pixel_values"), path, "images")
    label_name = column(found, source.labels, ("label", "labels"), path, "labels")
    if source.limit is not None:
        found = found.select(range(min(source.limit, len(found))))
    labels = classes.named(list(found[label_name]), found.features[label_name], path)
    numbers = classes.read(labels, path, lambda row: f"{label_name}[{row}]")
    pictures = isinstance(found.features[name], datasets.Image)
    rows = found.select_columns([name]) if pictures else found.select_columns([name]).with_format("numpy")

    def image(row: int) -> Placed:
        place = f"{path}: {name}[{row}]"
        try:
            value = rows[row][name]
        except (OSError, ValueError) as error:
            raise InputError("an image that cannot be read", where=place, got=first_line(error)) from error
        if pictures and value is not None:
            return _picture(value, channels, place), place
        if not isinstance(value, np.ndarray):
            raise InputError("not an image", where=place, got=type(value).__name__)
        small = value.dtype.kind in "iu" and value.size and value.min() >= 0 and value.max() <= 255
        plain = value.astype(np.uint8) if small else value
        return _values(_layout(plain[None], channels, place)[0], place), place

    return _Found(numbers, image)
