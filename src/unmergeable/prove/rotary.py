"""The rotary part of a head in a small configuration: how wide a head is, and what has one entry a rotated pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FALLBACK_HEAD_DIMS = (8, 12, 16, 20, 24, 32, 40, 48, 64)


def head_dim(both: tuple[int, int], rotary: Any, shape: int) -> int:
    """A head size whose rotary part is even and has two pairs or more: one hides how they are laid out."""
    fractions = _fractions(rotary)
    if not fractions:
        return both[shape]

    def fits(size: int) -> bool:
        return all(int(size * part) >= 4 and int(size * part) % 2 == 0 for part in fractions)

    if all(fits(size) for size in both):
        return both[shape]
    options = [size for size in _FALLBACK_HEAD_DIMS if fits(size)]
    return options[min(shape, len(options) - 1)] if options else both[shape]


def resize(rotary: Any, real_head_dim: int | None, head_dim: int) -> None:
    """Resize what has one entry a rotated pair: frequency factors and the sections of several axes."""
    if not isinstance(rotary, dict) or not real_head_dim:
        return
    part = float(rotary.get("partial_rotary_factor") or 1.0)
    real_pairs, pairs = int(real_head_dim * part) // 2, int(head_dim * part) // 2
    for name, value in rotary.items():
        if isinstance(value, dict):
            resize(value, real_head_dim, head_dim)
        elif isinstance(value, list) and len(value) == real_pairs and name != "mrope_section":
            rotary[name] = [value[i * real_pairs // pairs] for i in range(pairs)]
        elif isinstance(value, list) and name == "mrope_section" and sum(value) == real_pairs:
            sections = [max(1, entry * pairs // real_pairs) for entry in value]
            sections[0] += pairs - sum(sections)
            rotary[name] = sections


def _fractions(rotary: Any) -> list[float]:
    if not isinstance(rotary, Mapping):
        return []
    own = rotary.get("partial_rotary_factor")
    nested = [part for value in rotary.values() for part in _fractions(value)]
    return nested if own is None else [float(own), *nested]
