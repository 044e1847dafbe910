"""A light random change of images that keeps their labels, for those who train on few."""

from __future__ import annotations

import torch

from .task import Examples

TURN = 0.25  # radians, about 14 degrees
SCALE = 0.12
SHIFT = 0.07  # of the width or height
NOISE = 0.02  # standard deviation, in units of inputs


def shaken(examples: Examples, generator: torch.Generator) -> Examples:
    """Images turned, scaled and shifted a little, each differently, with a little noise.

    Args:
        examples: with `pixel_values`, (n, channels, height, width); others of their inputs stay as they are.
        generator: all that is random; it may be on another device.
    """
    pixels = examples.inputs["pixel_values"]
    count, _, height, width = pixels.shape

    def draw(*shape: int) -> torch.Tensor:
        """Uniform in -1 … 1."""
        return 2 * torch.rand(shape, generator=generator, device=generator.device).to(pixels.device) - 1

    turn, scale = TURN * draw(count), 1 + SCALE * draw(count)
    shift = 2 * SHIFT * draw(count, 2)  # the grid is 2 wide and high
    cos, sin = turn.cos() / scale, turn.sin() / scale
    ratio = height / width  # a turn is one of pixels, not of the unit square
    rows = [
        torch.stack([cos, -sin * ratio, shift[:, 0]], -1),
        torch.stack([sin / ratio, cos, shift[:, 1]], -1),
    ]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(
        pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    noise = torch.randn(pixels.shape, generator=generator, device=generator.device).to(pixels.device)
    changed = (moved + NOISE * noise).to(pixels.dtype)
    return Examples({**examples.inputs, "pixel_values": changed}, examples.labels)
