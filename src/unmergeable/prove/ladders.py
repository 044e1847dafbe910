"""From a conjectured layout to candidate sites, the largest group first.

A rung is a tuple of sites that belong together: a partly rotated head has one site for the rotated pairs and
one for the rest. Rungs stand in descending order of dimension, since the first that passes is taken.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from ..spec import Site, Slot
from .attention import Attention, View
from .inventory import Pattern
from .sizes import Sizes

_PAIRS = {"half-split": "c a", "interleaved": "a c"}


def expand(index: str, dim: str, inner: str, path: str = "") -> str:
    """Write a dim of an index string as a product or a branch: `expand("[g d | d].1", "d", "c a")`."""
    body, tail = index, ""
    if match := re.search(r"(\.\d+)+$", index):
        body, tail = index[: match.start()], match.group()
    return re.sub(rf"\b{dim}\b", inner, body) + tail + path


def value_output(block: Attention) -> Iterator[tuple[Site, ...]]:
    """Rungs of the value-output site."""
    if block.v is None or block.o is None:
        return
    dim = "v" if re.search(r"\bv\b", block.o.index) else "d"
    slots = (*block.v.slots(+1), Slot(block.o.weight.name, {block.o.axis: block.o.index}, -1))
    if block.gate is not None:
        for name in ("monomial", "permutation"):
            yield (site_of(block, "vo", dim, ("g",), name, (*slots, *block.gate.slots(0))),)
        return
    for name in ("general_linear", "orthogonal", "diagonal", "sign", "scalar", "negation"):
        yield (site_of(block, "vo", dim, ("g",), name, slots),)


def query_key(block: Attention, sizes: Sizes) -> Iterator[tuple[Site, ...]]:
    """Rungs of the query-key site."""
    if block.q is None or block.k is None:
        return
    if block.rotary_q is not None:
        yield from _latent(block)
        return

    def site(
        acts: str, per: tuple[str, ...], name: str, inner: str = "d", path: str = "", **more: str
    ) -> Site:
        assert block.q is not None
        assert block.k is not None
        slots = [
            *block.q.slots(-1, expand(block.q.index, "d", inner, path)),
            *block.k.slots(+1, expand(block.k.index, "d", inner, path)),
        ]
        if block.v is None and block.o is not None:  # what reads the values reads keys
            slots += block.o.slots(-1, expand(block.o.index, "d", inner, path))
        return site_of(block, "qk", acts, per, name, slots, **more)

    half = sizes_half(block.sizes["d"])
    yield (site("d", ("g",), "general_linear"),)
    for inner in _PAIRS.values():
        yield (site("c", ("g", "a"), "complex", inner, c="2", a=half),)
    partial = list(_partial(block, sizes))
    for a, n in partial:
        for inner in _PAIRS.values():
            yield (
                site("c", ("g", "a"), "complex", f"[{inner} | n]", ".0", c="2", a=a, n=n),
                site("n", ("g",), "general_linear", f"[{inner} | n]", ".1", c="2", a=a, n=n),
            )
    yield (site("d", ("g",), "orthogonal"),)
    yield (site("d", ("g",), "diagonal"),)
    for inner in _PAIRS.values():
        yield (site("c", ("g", "a"), "rotation", inner, c="2", a=half),)
    yield (site("d", ("g",), "sign"),)
    for a, n in partial:
        for inner in _PAIRS.values():
            yield (
                site("c", ("g", "a"), "negation", f"[{inner} | n]", ".0", c="2", a=a, n=n),
                site("n", ("g",), "sign", f"[{inner} | n]", ".1", c="2", a=a, n=n),
            )
    for inner in _PAIRS.values():
        yield (site("c", ("g", "a"), "negation", inner, c="2", a=half),)
    yield (site("d", ("g",), "negation"),)


def of_all_layers(site: Site) -> Site:
    """The same with one element for all layers, where some take the keys and values of others."""
    return replace(site, per=tuple(dim for dim in site.per if dim not in site.name_dims))


def with_companions(block: Attention, rung: Sequence[Site]) -> Iterator[tuple[Site, ...]]:
    """The same rung with further projections of the block's width moving along (relative positions)."""
    assert block.q is not None
    assert block.k is not None
    width = block.k.weight.axes[block.k.axis]
    spare = [
        pattern
        for pattern in block.spare
        if len(pattern.axes) == 2 and pattern.axes[0] == width and pattern.name.endswith("weight")
    ][:3]
    biases = {pattern.name: pattern for pattern in block.spare if len(pattern.axes) == 1}
    taken = block.weights
    spare = [pattern for pattern in spare if pattern.name not in taken]
    for powers in itertools.product((1, -1, 0), repeat=len(spare)):
        if not any(powers):
            continue
        out = []
        for site in rung:
            key = next(slot for slot in site.slots if slot.tensor == block.k.weight.name and slot.power == 1)
            index = key.index[block.k.axis]
            more: list[Slot] = []
            for pattern, power in zip(spare, powers, strict=True):
                if power:
                    twin = re.sub("weight$", "bias", pattern.name)
                    more += View(pattern, 0, biases.get(twin), index).slots(power)
            out.append(replace(site, slots=(*site.slots, *more)))
        yield tuple(out)


def heads(block: Attention, stock: Sequence[Pattern]) -> Iterator[list[Site]]:
    """Head permutations, within a group and of groups: candidates, without companions first.

    Companions are tensors with one entry (or one block) a head: sinks, full-width norms, relative-position
    tables. A table that one layer keeps for all of them makes the order the same in every layer.
    """
    for dim in reversed(block.heads):
        per = ("g",) if dim == "r" else ()
        plain = tuple(_head_slots(block, dim))
        counted = tuple(_head_companions(block, stock, rows=False))
        wide = tuple(_head_companions(block, stock, rows=True))
        options = [plain]
        options += [(*plain, *more) for more in (counted, wide, (*counted, *wide)) if more]
        sites = [
            site_of(block, "heads", dim, per, "permutation", slots, suffix=f"heads.{dim}")
            for slots in options
        ]
        yield sites + [replace(site, per=per) for site in sites[1:]]


def _head_slots(block: Attention, dim: str) -> Iterator[Slot]:
    for view, power in ((block.q, 1), (block.k, 1), (block.v, 1)):
        if view is None:
            continue
        index = view.index
        if block.layout == "latent":
            if view is block.q:
                index = "g d"  # nope and rotary rows of a head go together
            elif view is block.k:
                index = "g [n | v].0"
        elif view is block.q and block.gate is not None:
            yield from block.gate.slots(power)
        if dim in re.findall(r"[a-z]+", _selected(index)):
            yield from view.slots(power, index)
    if block.o is not None:
        yield Slot(block.o.weight.name, {block.o.axis: block.o.index}, 1)


def _selected(index: str) -> str:
    """The dims of the selected view, as text."""
    from ..index import parse_index

    return " ".join(parse_index(index).dims)


def _head_companions(block: Attention, stock: Sequence[Pattern], *, rows: bool) -> Iterator[Slot]:
    """Further tensors of the block with one entry a head, or with `rows` one block of entries a head."""
    assert block.o is not None
    assert block.q is not None
    assert block.k is not None
    order = re.sub(r"\s*\b[dv]\b$", "", block.o.index)
    count = _head_count(block, block.o.weight.axes[block.o.axis])
    wide = {}
    if "[" not in block.q.index:
        wide = {block.k.weight.axes[0]: block.k.index, block.q.weight.axes[0]: block.q.index}
    own = re.sub("weight$", "bias", block.o.weight.name)
    taken = {slot.tensor for slot in _head_slots(block, block.heads[0])} | {own}
    for pattern in stock:
        if not pattern.name.startswith(block.scope + ".") or pattern.name in taken:
            continue
        for axis, size in enumerate(pattern.axes):
            index = wide.get(size) if rows else (order if size == count else None)
            if index is not None:
                yield Slot(pattern.name, {axis: index}, 1)
                break


def _head_count(block: Attention, width: tuple[int, ...]) -> tuple[int, ...] | None:
    each = block.value_sizes
    if each is None or any(w % e for w, e in zip(width, each, strict=True)):
        return None
    return tuple(w // e for w, e in zip(width, each, strict=True))


def _latent(block: Attention) -> Iterator[tuple[Site, ...]]:
    assert block.q is not None
    assert block.k is not None
    assert block.rotary_q is not None
    assert block.rotary_k is not None
    nope = (*block.q.slots(-1), *block.k.slots(+1))
    for name in ("general_linear", "orthogonal", "sign"):
        for inner in _PAIRS.values():
            for rotary in ("complex", "rotation", "negation"):
                slots = (
                    *block.rotary_q.slots(-1, expand(block.rotary_q.index, "p", inner)),
                    *block.rotary_k.slots(+1, expand(block.rotary_k.index, "p", inner)),
                )
                yield (
                    site_of(block, "qk", "n", ("g",), name, nope, suffix="qk.nope"),
                    site_of(block, "qk", "c", ("a",), rotary, slots, suffix="qk.rotary"),
                )


def _partial(block: Attention, sizes: Sizes) -> Iterator[tuple[str, str]]:
    """Rotated pairs and unrotated rest of a head, where a config field gives a part of it."""
    d = block.sizes["d"]
    total = sizes.values(d)
    if total is None:
        return
    for path, values in sizes.fractions.items():
        if all(
            int(t * v) >= 4 and int(t * v) < t and int(t * v) % 2 == 0
            for t, v in zip(total, values, strict=True)
        ):
            rotated = f"int(({d}) * {path})"
            yield f"{rotated} // 2", f"({d}) - {rotated}"
    for path, counts in sizes.fields.items():
        pairs = list(zip(total, counts, strict=True))
        if re.search(r"rotary_dim|rope_dim", path) and all(v and v < t and v % 2 == 0 for t, v in pairs):
            yield f"{path} // 2", f"({d}) - {path}"


def sizes_half(expression: str) -> str:
    """Half of a size expression."""
    return f"({expression}) // 2" if " " in expression else f"{expression} // 2"


class Block(Protocol):
    """What a site is named after, and the sizes of its dims."""

    @property
    def scope(self) -> str: ...

    @property
    def sizes(self) -> dict[str, str]: ...


def site_of(
    block: Block,
    kind: str,
    acts: str,
    per: tuple[str, ...],
    name: str,
    slots: Sequence[Slot],
    *,
    suffix: str = "",
    **more: str,
) -> Site:
    """A site of a block, in every layer that its name stands for."""
    used = {dim for slot in slots for index in slot.axes.values() for dim in index.all_dims}
    sizes = {dim: text for dim, text in {**block.sizes, **more}.items() if dim in used or dim == acts}
    in_name = tuple(re.findall(r"\{(\w+)\}", block.scope))
    return Site(f"{block.scope}.{suffix or kind}", kind, acts, (*in_name, *per), name, sizes, tuple(slots))
