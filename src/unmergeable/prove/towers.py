"""An encoder and a decoder that a configuration puts together: what hangs on whether they are as wide as each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmergeable.config import coupled, width
from unmergeable.fields import SIZES

Config = dict[str, Any]

_HEADS, _WIDE = (5, 4, 3, 2), ("width", "linked")


def alike(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The decoder's fields that say that it is as wide as the encoder, where it is.

    Classes put a projection between the two only if they are not.
    """
    wide = width(config["encoder"]) if coupled(config) else None
    if wide is None:
        return ()
    return tuple(
        name for name, value in config["decoder"].items() if SIZES.get(name) in _WIDE and value == wide
    )


def couple(node: Config, fields: tuple[str, ...]) -> None:
    """Make the decoder as wide as the encoder, in place. fields: of the decoder, as `alike` found them."""
    wide = width(node["encoder"]) if fields else None
    if wide is None:
        return
    decoder = node["decoder"]
    for name in fields:
        decoder[name] = wide
    for name, value in decoder.items():
        if SIZES.get(name) == "heads" and isinstance(value, int) and wide % value:
            decoder[name] = next(count for count in _HEADS if not wide % count)
