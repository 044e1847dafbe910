"""The zoo's images: what `make_zoo.py` reads and draws, from packages only, and how it splits them."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Images = NDArray[np.uint8]  # (n, 28, 28), white on black

SIDE = 28
LATIN = "abcdefghijklmnopqrstuvwxyz"
CYRILLIC = "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
CLOTHES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
LABELS = {
    "fashion": CLOTHES,
    "digits": list("0123456789"),
    "latin": list(LATIN),
    "cyrillic": list(CYRILLIC),
}
TEST_A_CLASS = {"fashion": 100, "digits": 50, "latin": 32, "cyrillic": 28}
FEW_A_CLASS = 16  # the few-shot slice that ships, for attacks that are given labels

# Whole families are kept apart: no face of a test family is ever trained on.
TEST_FAMILIES = (
    *("PT Sans", "PT Serif", "PT Mono", "Cantarell", "EB Garamond", "JetBrains Mono", "Tuffy"),
    *("Gentium Plus", "Vollkorn", "mononoki"),
)
TRAIN_FAMILIES = (
    *("DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif", "Liberation Mono", "Liberation Sans"),
    *("Liberation Sans Narrow", "Liberation Serif", "FreeMono", "FreeSans", "FreeSerif", "Open Sans"),
    *("Roboto", "Roboto Condensed", "Linux Biolinum O", "Linux Libertine O", "Charis SIL", "Doulos SIL"),
    *("Andika", "Old Standard TT", "Fira Code", "Hack", "Go", "Go Mono", "Anonymous Pro", "Play", "Inter"),
    *("Lato", "Noto Mono", "Agave"),
)
FACES_A_FAMILY = 8  # at most, so that no family with many weights outvotes the rest


class Task(NamedTuple):
    """One task: images (n, 28, 28) and labels (n,), split. `offset`: its first row in the base's head."""

    train: Images
    train_labels: NDArray[np.int64]
    test: Images
    test_labels: NDArray[np.int64]
    offset: int
    classes: int


def read_fashion(folder: Path, part: str) -> tuple[Images, NDArray[np.int64]]:
    """Fashion-MNIST: `part` is "train" or "t10k"."""
    names = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
    return read_idx(*(gzip.decompress((folder / name).read_bytes()) for name in names))


def read_idx(pixels: bytes, labels: bytes) -> tuple[Images, NDArray[np.int64]]:
    """Images and labels of the idx format, which has a 16-byte and an 8-byte header."""
    return (
        np.frombuffer(pixels[16:], np.uint8).reshape(-1, SIDE, SIDE),
        np.frombuffer(labels[8:], np.uint8).astype(np.int64),
    )


def read_digits(file: Path) -> tuple[Images, NDArray[np.int64]]:
    """scikit-learn's digits, 8 x 8 with 17 grey levels, enlarged to 22 x 22 in the middle of 28 x 28."""
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    small = (table[:, :64].reshape(-1, 8, 8) * 255 // 16).astype(np.uint8)
    large = np.zeros((len(small), SIDE, SIDE), np.uint8)
    for image, target in zip(small, large, strict=True):
        target[3:25, 3:25] = np.asarray(Image.fromarray(image).resize((22, 22), Image.Resampling.BICUBIC))
    return large, table[:, 64]


def font_files(folder: Path, families: tuple[str, ...], letters: str) -> list[Path]:
    """The faces of the families that hold every letter in both cases, taking turns between families."""
    needed = {ord(c) for c in letters + letters.upper()}
    faces: dict[str, list[Path]] = {family: [] for family in families}
    for file in sorted([*folder.rglob("*.ttf"), *folder.rglob("*.otf")], key=lambda f: f.name):
        font = TTFont(file, lazy=True)
        name = font["name"].getDebugName(16) or font["name"].getDebugName(1)
        if name in faces and needed <= set(font.getBestCmap()) and len(faces[name]) < FACES_A_FAMILY:
            faces[name].append(file)
    if missing := [family for family, found in faces.items() if not found]:
        sys.exit(f"no usable face of {', '.join(missing)} under {folder}: install the packages listed above")
    turns = range(max(len(found) for found in faces.values()))
    return [found[turn] for turn in turns for found in faces.values() if turn < len(found)]


def draw(letter: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> Images:
    """A letter white on black, its longer side 17 to 23 pixels, up to 2 pixels off the middle."""
    left, top, right, bottom = font.getbbox(letter)
    glyph = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(glyph).text((-left, -top), letter, fill=255, font=font)
    scale = rng.integers(17, 24) / max(glyph.size)
    width, height = (max(2, round(side * scale)) for side in glyph.size)
    canvas = Image.new("L", (SIDE, SIDE))
    x, y = rng.integers(-2, 3, size=2)
    corner = ((SIDE - width) // 2 + int(x), (SIDE - height) // 2 + int(y))
    canvas.paste(glyph.resize((width, height), Image.Resampling.BOX), corner)
    return np.asarray(canvas)


def draw_letters(
    folder: Path, families: tuple[str, ...], letters: str, seed: int, a_class: int | None = None
) -> tuple[Images, NDArray[np.int64]]:
    """Every letter in every face, both cases as one class; only the first `a_class` of each letter."""
    rng = np.random.default_rng(seed)
    fonts = [ImageFont.truetype(str(file), 64) for file in font_files(folder, families, letters)]
    images, labels = [], []
    for label, letter in enumerate(letters):
        drawn = [draw(form, font, rng) for font in fonts for form in (letter, letter.upper())]
        images += drawn[:a_class]
        labels += [label] * len(drawn[:a_class])
    return np.stack(images), np.array(labels)


def first_of_each(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Indices of the first `count` of every class, taking turns: any prefix of them is balanced."""
    rows = [np.flatnonzero(labels == label)[:count] for label in range(int(labels.max()) + 1)]
    return np.stack(rows, axis=1).reshape(-1)


def load_tasks(fashion: Path, fonts: Path, digits: Path, seed: int) -> dict[str, Task]:
    """All four tasks, split into training and test images, both shuffled by the seed."""
    parts = {"fashion": (*read_fashion(fashion, "train"), *read_fashion(fashion, "t10k"))}
    # The file runs through its thirteen writers in turn: the last of every class are mostly other people's.
    images, labels = read_digits(digits)
    last = np.zeros(len(labels), bool)
    last[len(labels) - 1 - first_of_each(labels[::-1], TEST_A_CLASS["digits"])] = True
    parts["digits"] = (images[~last], labels[~last], images[last], labels[last])
    for name, letters in (("latin", LATIN), ("cyrillic", CYRILLIC)):
        parts[name] = (
            *draw_letters(fonts, TRAIN_FAMILIES, letters, seed),
            *draw_letters(fonts, TEST_FAMILIES, letters, seed + 1, TEST_A_CLASS[name]),
        )
    tasks, offset = {}, 0
    for name, (train, train_labels, test, test_labels) in parts.items():
        rng = np.random.default_rng(seed + 2)
        order, test_order = rng.permutation(len(train)), rng.permutation(len(test))
        train, train_labels, test, test_labels = (
            *(train[order], train_labels[order]),
            *(test[test_order], test_labels[test_order]),
        )
        chosen = first_of_each(test_labels, TEST_A_CLASS[name])
        tasks[name] = Task(train, train_labels, test[chosen], test_labels[chosen], offset, len(LABELS[name]))
        offset += len(LABELS[name])
    return tasks


def pixels(images: Images) -> torch.Tensor:
    """(n, 28, 28) uint8 -> (n, 1, 28, 28) float32 in -1 to 1."""
    return torch.from_numpy(images).unsqueeze(1).float().div(127.5).sub(1)


def jitter(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A small random affine map of every image: 8 % scale, 8 degrees, a little shear, 2 pixels."""
    n = len(x)
    noise = torch.rand(n, 6, generator=generator).mul(2).sub(1)
    angle, shear = noise[:, 0] * 0.14, noise[:, 1] * 0.1
    scale_x, scale_y = 1 + noise[:, 2] * 0.08, 1 + noise[:, 3] * 0.08
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale_x * angle.cos(), shear - angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin(), scale_y * angle.cos()
    theta[:, :, 2] = noise[:, 4:6] * (2 * 2 / SIDE)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # + 1: what comes in from outside is black


def batches(
    images: Images, labels: NDArray[np.int64], size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless jittered batches, epoch after epoch in a fresh order."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    x, y = pixels(images), torch.from_numpy(labels)
    order = np.empty(0, np.int64)
    while True:
        while len(order) < size:
            order = np.concatenate([order, rng.permutation(len(labels))])
        rows, order = torch.from_numpy(order[:size]), order[size:]
        yield jitter(x[rows], generator), y[rows]
