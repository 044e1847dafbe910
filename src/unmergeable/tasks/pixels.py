"""From pixels to a model's inputs: by its own image processor, or by a mean, a standard deviation and a size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoint.problems import Problems
from ..errors import InputError
from ..stock import quiet
from .fields import ImageClassification
from .sources import first_line

Pixels = NDArray[Any]  # (height, width, channels), uint8, or float32 in 0 … 1
Placed = tuple[Pixels, str]  # with where they are from, for messages

PORTION = 64  # images that are prepared at a time: pixels of photographs are large, inputs are not
PROCESSOR = "preprocessor_config.json"
DEFAULT = 0.5  # mean and standard deviation where nothing is said: inputs from -1 to 1


@dataclass(frozen=True)
class Preparation:
    """How pixels become inputs of one model.

    Attributes:
        channels: of its images.
        shape: height and width that it takes, where its configuration says.
        size: to scale to, square; None leaves images as they are.
        mean, std: a number a channel; None if nothing was said of them.
        processor: of transformers, which does all of it; None if the model has none.
        where: the task, for messages.
    """

    channels: int
    shape: tuple[int, int] | None
    size: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    processor: Any
    where: str

    def __call__(self, images: Iterable[Placed]) -> torch.Tensor:
        """Inputs of all of them, (n, channels, height, width), float32.

        Raises:
            InputError: images that are not of one size, or not of the model's.
        """
        stream = iter(images)
        found: list[torch.Tensor] = []
        while portion := list(islice(stream, PORTION)):
            inputs = self._processed(portion) if self.processor is not None else self._scaled(portion)
            if found and inputs.shape[1:] != found[0].shape[1:]:
                expected, got = (_by(tuple(each.shape[-2:])) for each in (found[0], inputs))
                raise InputError("images of different sizes", where=portion[0][1], expected=expected, got=got)
            found.append(inputs)
        return torch.cat(found)

    def _processed(self, portion: list[Placed]) -> torch.Tensor:
        from PIL import Image

        for pixels, place in portion:
            if pixels.dtype != np.uint8:
                what = "the model's image processor takes pixels of 8 bits"
                raise InputError(what, where=place, expected="uint8", got=pixels.dtype)
        images = [Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels) for pixels, _ in portion]
        with quiet():
            try:
                inputs = self.processor(images=images, return_tensors="pt")["pixel_values"]
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                what = "the model's image processor fails"
                raise InputError(what, where=portion[0][1], got=first_line(error)) from error
        if not isinstance(inputs, torch.Tensor) or inputs.ndim != 4 or inputs.shape[1] != self.channels:
            got = list(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
            what = "the model's image processor does not make one image of each"
            raise InputError(what, where=self.where, expected=f"(n, {self.channels}, height, width)", got=got)
        return inputs.float()

    def _scaled(self, portion: list[Placed]) -> torch.Tensor:
        found: list[torch.Tensor] = []
        for pixels, place in portion:
            image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float()
            if pixels.dtype == np.uint8:
                image /= 255
            if self.size is not None and image.shape[1:] != (self.size, self.size):
                image = torch.nn.functional.interpolate(
                    image[None], (self.size, self.size), mode="bilinear", align_corners=False, antialias=True
                )[0]
            self._check_shape((image.shape[1], image.shape[2]), place)
            if found and image.shape != found[0].shape:
                expected, got = _by(tuple(found[0].shape[1:])), _by(tuple(image.shape[1:]))
                hint = "scale them all by size:"
                raise InputError(
                    "images of different sizes", where=place, expected=expected, got=got, hint=hint
                )
            found.append(image)
        mean, std = (
            torch.tensor(values or (DEFAULT,) * self.channels)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (torch.stack(found) - mean) / std

    def _check_shape(self, shape: tuple[int, int], place: str) -> None:
        """What nobody has described must fit as it is."""
        hint = f"give size:, mean: and std:, or put the {PROCESSOR} of the model into its folder"
        if self.shape is None and self.mean is None:
            what = "nothing says how images become inputs of the model"
            raise InputError(what, where=self.where, hint=hint)
        if self.shape is not None and shape != self.shape:
            what = "an image that is not of the size that the model takes"
            raise InputError(what, where=place, expected=_by(self.shape), got=_by(shape), hint=hint)


def preparation(config: Any, given: ImageClassification, model: Path, where: str) -> Preparation:
    """How pixels become inputs of a model.

    Args:
        config: of the model.
        given: its fields size, mean and std.
        model: its folder.
        where: the task, for messages.

    Raises:
        InputError: fields that contradict each other or the model, or an image processor that cannot be loaded.
    """
    vision = getattr(config, "vision_config", None) or config
    channels = getattr(vision, "num_channels", None) or 3
    problems = Problems(where)
    size, means = given.size, {"mean": given.mean, "std": given.std}
    if (model / PROCESSOR).is_file():
        for name in ("size", "mean", "std"):
            if getattr(given, name) is not None:
                what = "the model has an image processor of its own"
                problems.add(what, where=f"{where}: {name}", hint=f"leave {name}: out, or remove {PROCESSOR}")
        problems.raise_any()
        return Preparation(channels, None, None, None, None, _processor(model), where)
    if None in means.values() and (size is not None or means["mean"] != means["std"]):
        said = ", ".join(f"{name}:" for name in ("size", "mean", "std") if getattr(given, name) is not None)
        problems.add("mean and std belong together, and to size", expected="mean: and std:", got=said)
    ready = {name: _each(name, value, channels, problems, where) for name, value in means.items()}
    problems.raise_any()
    return Preparation(channels, _shape(vision), size, ready["mean"], ready["std"], None, where)


def _each(
    name: str, value: float | list[float] | None, channels: int, problems: Problems, where: str
) -> tuple[float, ...] | None:
    """A number for each channel."""
    if value is None:
        return None
    numbers = tuple(value) if isinstance(value, list) else (value,) * channels
    if len(numbers) != channels:
        expected = f"one number, or one for each of {channels} channels"
        problems.add(
            "not as many numbers as channels", where=f"{where}: {name}", expected=expected, got=value
        )
    if name == "std" and min(numbers, default=1.0) <= 0:
        problems.add("not a standard deviation", where=f"{where}: {name}", expected="more than 0", got=value)
    return numbers


def _shape(vision: Any) -> tuple[int, int] | None:
    """Height and width that a configuration gives its images."""
    found = getattr(vision, "image_size", None)
    if isinstance(found, int):
        return found, found
    if isinstance(found, (list, tuple)) and len(found) == 2:
        return int(found[0]), int(found[1])
    return None


def _processor(model: Path) -> Any:
    from transformers import AutoImageProcessor

    with quiet():
        try:
            # By Pillow everywhere: another backend scales a little differently, and scores should not.
            return AutoImageProcessor.from_pretrained(
                str(model), local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
            what = "the model's image processor cannot be loaded"
            raise InputError(what, where=model / PROCESSOR, got=first_line(error)) from error


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
