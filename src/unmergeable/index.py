"""Index strings: how one axis of a tensor is laid out in heads, pairs, rows and fused parts.

An index string reads like an einops axis, in row-major order:

    "g r i"                   query rows: KV group, query of the group, channel
    "[g r i | g i | g i].1"   fused: all queries, then all keys, then all values; this view is the keys
    "g [r i | i | i].2"       fused per group; this view is the values
    "f [1 | 1].0"             gate and up rows interleaved; this view is the gate
    "h [[p | n] | [p | n]].1.0"  nested: the second half of each head, and of it the first part

Parsed once, it gives a strided view of the axis for any sizes; the sum of all parts must be the axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

_TOKEN = re.compile(r"\s*(?:([a-z][a-z0-9_]*)|(\d+)|([\[\]|]))")


@dataclass(frozen=True)
class Branch:
    """Segments laid one after another: `[q | k | v]`."""

    segments: tuple[tuple[str | int | Branch, ...], ...]


Product = tuple["str | int | Branch", ...]


@dataclass(frozen=True)
class View:
    """A strided view of an axis of `total` rows: position = offset + Σ index · stride."""

    total: int
    offset: int
    dims: tuple[tuple[str, int, int], ...]  # (name, size, stride), outermost first

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.dims)

    def positions(self, order: tuple[str, ...] | None = None) -> NDArray[np.int64]:
        """Positions on the axis, one array axis a dim, in `order` (default: as written)."""
        grid = np.full((1,) * len(self.dims), self.offset, dtype=np.int64)
        for k, (_, size, stride) in enumerate(self.dims):
            shape = [1] * len(self.dims)
            shape[k] = size
            grid = grid + (np.arange(size, dtype=np.int64) * stride).reshape(shape)
        if order is None:
            return grid
        return np.transpose(grid, [self.names.index(name) for name in order])


@dataclass(frozen=True)
class Index:
    """A parsed index string."""

    text: str
    product: Product
    path: tuple[int, ...]

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dims of the selected view, outermost first."""
        return tuple(_dims(self.product, self.path))

    @property
    def all_dims(self) -> frozenset[str]:
        """Names of every dim that is needed to size the axis."""
        return frozenset(_all_dims(self.product))

    def view(self, sizes: Mapping[str, int]) -> View:
        """The strided view for these sizes.

        Raises:
            InputError: a dim of the string has no size.
        """
        missing = sorted(self.all_dims - sizes.keys())
        if missing:
            raise InputError(
                f"no size for {', '.join(missing)}",
                where=f"index '{self.text}'",
                expected=f"sizes of {', '.join(sorted(self.all_dims))}",
                got=f"sizes of {', '.join(sorted(sizes)) or 'nothing'}",
            )
        offset, dims = _select(self.product, self.path, sizes)
        return View(_width(self.product, sizes), offset, tuple(dims))


@lru_cache(maxsize=4096)
def parse_index(text: str) -> Index:
    """Parse an index string.

    Raises:
        InputError: the string does not follow the grammar, names a dim twice in one view, or its path does
            not lead to a segment.
    """
    body = text
    path: tuple[int, ...] = ()
    if match := re.search(r"((?:\.\d+)+)\s*$", text):
        body = text[: match.start()]
        path = tuple(int(part) for part in match.group(1)[1:].split("."))
    product, rest = _parse_product(text, _tokens(text, body))
    if rest:
        raise _bad(text, f"unexpected '{rest[0]}'")
    index = Index(text, product, path)
    dims = list(_dims(product, path, text))
    if len(set(dims)) != len(dims):
        raise _bad(text, "a dim stands twice in one view")
    return index


def _tokens(text: str, body: str) -> list[str]:
    tokens, at = [], 0
    while at < len(body.rstrip()):
        match = _TOKEN.match(body, at)
        if match is None:
            raise _bad(text, f"cannot read '{body[at:]}'")
        tokens.append(match.group().strip())
        at = match.end()
    return tokens


def _parse_product(text: str, tokens: list[str]) -> tuple[Product, list[str]]:
    factors: list[str | int | Branch] = []
    while tokens and tokens[0] not in ("|", "]"):
        head, tokens = tokens[0], tokens[1:]
        if head != "[":
            factors.append(int(head) if head.isdigit() else head)
            continue
        segments: list[Product] = []
        while True:
            segment, tokens = _parse_product(text, tokens)
            segments.append(segment)
            if not tokens:
                raise _bad(text, "'[' is not closed")
            closing, tokens = tokens[0], tokens[1:]
            if closing == "]":
                break
        factors.append(Branch(tuple(segments)))
    if not factors:
        raise _bad(text, "an empty product")
    if sum(isinstance(factor, Branch) for factor in factors) > 1:
        raise _bad(text, "two '[…]' in one product")
    return tuple(factors), tokens


def _bad(text: str, what: str) -> InputError:
    return InputError(
        f"not an index string: {what}",
        where=f"'{text}'",
        expected="dims and '[… | …]' as in 'g [r i | i | i].1'",
    )


def _branch(product: Product, path: tuple[int, ...], text: str = "") -> tuple[Branch, Product]:
    branch = next((factor for factor in product if isinstance(factor, Branch)), None)
    if branch is None or not path or path[0] >= len(branch.segments):
        raise _bad(text, f"the path {'.'.join(map(str, path)) or '(none)'} leads to no segment")
    return branch, branch.segments[path[0]]


def _has_branch(product: Product) -> bool:
    return any(isinstance(factor, Branch) for factor in product)


def _dims(product: Product, path: tuple[int, ...], text: str = "") -> list[str]:
    if not _has_branch(product) and path:
        raise _bad(text, "the path is longer than the nesting")
    dims: list[str] = []
    for factor in product:
        if isinstance(factor, Branch):
            dims += _dims(_branch(product, path, text)[1], path[1:], text)
        elif isinstance(factor, str):
            dims.append(factor)
    return dims


def _all_dims(product: Product) -> set[str]:
    names: set[str] = set()
    for factor in product:
        if isinstance(factor, Branch):
            for segment in factor.segments:
                names |= _all_dims(segment)
        elif isinstance(factor, str):
            names.add(factor)
    return names


def _width(product: Product, sizes: Mapping[str, int]) -> int:
    return prod(
        sum(_width(segment, sizes) for segment in factor.segments)
        if isinstance(factor, Branch)
        else (sizes[factor] if isinstance(factor, str) else factor)
        for factor in product
    )


def _select(
    product: Product, path: tuple[int, ...], sizes: Mapping[str, int]
) -> tuple[int, list[tuple[str, int, int]]]:
    offset, stride = 0, 1
    dims: list[tuple[str, int, int]] = []
    for factor in reversed(product):
        if isinstance(factor, Branch):
            segments = factor.segments
            inner_offset, inner = _select(segments[path[0]], path[1:], sizes)
            before = sum(_width(segment, sizes) for segment in segments[: path[0]])
            offset += (before + inner_offset) * stride
            dims = [(name, size, step * stride) for name, size, step in inner] + dims
            stride *= sum(_width(segment, sizes) for segment in segments)
        elif isinstance(factor, str):
            dims = [(factor, sizes[factor], stride), *dims]
            stride *= sizes[factor]
        else:
            stride *= factor
    return offset, dims
