"""Conjecture sites of linear attention (the gated delta rule, arXiv 2412.06464) and state spaces (arXiv 2405.21060).

Queries and keys, or what is written to states and read from them, meet in inner products alone, but behind a
convolution of every channel and an activation: their coordinates may change places, and no more. So may those of
values; in all heads alike where these share the weights of a norm. Heads have a decay and a rate of their own, which
move along.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..fields import SIZES, STATE_EXPANSION, STATE_GROUPS
from ..spec import Site, Slot
from .inventory import Pattern
from .sizes import Sizes

_FIELDS = {
    "g": "linear_num_key_heads",
    "h": "linear_num_value_heads",
    "k": "linear_key_head_dim",
    "v": "linear_value_head_dim",
}
_CHANNELS = "[g k | g k | g r v]"
#: How what is read from the residual stream is laid out: {weight: (index string, what its parts are)}.
_LAYOUTS: tuple[dict[str, tuple[str, str]], ...] = (
    {
        "in_proj_qkv": (_CHANNELS, "qkv"),
        "in_proj_z": ("g r v", "v"),
        "in_proj_b": ("g r", "h"),
        "in_proj_a": ("g r", "h"),
    },
    {"in_proj_qkvz": ("g [k | k | r v | r v]", "qkvv"), "in_proj_ba": ("g [r | r]", "hh")},
)


@dataclass(frozen=True)
class Linear:
    """The slots of one block by what they are of: queries and keys, values, or heads as a whole.

    norms: of values, one for all heads; without one values have an order in every head.
    """

    scope: str
    sizes: dict[str, str]
    keys: tuple[Slot, ...]
    values: tuple[Slot, ...]
    heads: tuple[Slot, ...]
    norms: tuple[Slot, ...]

    @property
    def weights(self) -> set[str]:
        return {slot.tensor for slot in (*self.keys, *self.values, *self.heads, *self.norms)}

    def inner(self) -> Iterator[Site]:
        """Coordinates of keys, by head, and of values, of all heads alike."""
        yield self._site("qk", "qk", "k", ("g",), self.keys)
        yield self._site("vo", "vo", "v", () if self.norms else ("g", "r"), (*self.values, *self.norms))

    def outer(self) -> Iterator[Site]:
        """Value heads of one key, and key heads."""
        yield self._site("heads.r", "heads", "r", ("g",), (*self.values, *self.heads))
        yield self._site("heads.g", "heads", "g", (), (*self.keys, *self.values, *self.heads))

    def _site(self, name: str, kind: str, acts: str, per: tuple[str, ...], slots: Sequence[Slot]) -> Site:
        used = {dim for slot in slots for index in slot.axes.values() for dim in index.all_dims}
        sizes = {dim: text for dim, text in self.sizes.items() if dim in used}
        in_name = tuple(re.findall(r"\{(\w+)\}", self.scope))
        return Site(f"{self.scope}.{name}", kind, acts, (*in_name, *per), "permutation", sizes, tuple(slots))


def find_linear(stock: Sequence[Pattern], sizes: Sizes) -> Iterator[Linear]:
    """Blocks with a convolution of queries, keys and values, and all that a layout of names has."""
    known = {pattern.name: pattern for pattern in stock}
    for scope in (name.removesuffix(".conv1d.weight") for name in known if name.endswith(".conv1d.weight")):
        if all(f"{scope}.{name}" in known for name in ("in_proj.weight", "out_proj.weight", "A_log")):
            fields = _state_fields(scope, known, sizes)
            if fields is not None:
                yield _states(scope, known, fields)
        for layout in _LAYOUTS:
            wanted = {*layout, "conv1d", "out_proj", "norm"}
            if all(f"{scope}.{name}.weight" in known for name in wanted):
                fields = _fields(sizes, known[f"{scope}.conv1d.weight"])
                if fields is not None:
                    yield _block(scope, layout, known, fields)


def _fields(sizes: Sizes, convolution: Pattern) -> dict[str, str] | None:
    """Expressions for the dims, of fields beside each other that give the channels of the convolution."""
    starts = [path.removesuffix(_FIELDS["g"]) for path in sizes.fields if path.endswith(_FIELDS["g"])]
    for names in ({dim: start + leaf for dim, leaf in _FIELDS.items()} for start in starts):
        found = [values for name in names.values() if (values := sizes.values(name)) is not None]
        if len(found) < len(names):
            continue
        channels = tuple(2 * g * k + h * v for g, h, k, v in zip(*found, strict=True))
        if channels == convolution.axes[0]:
            key_heads, value_heads = names["g"], names["h"]
            return {"g": key_heads, "r": f"{value_heads} // ({key_heads})", "k": names["k"], "v": names["v"]}
    return None


def _block(
    scope: str, layout: dict[str, tuple[str, str]], known: dict[str, Pattern], sizes: dict[str, str]
) -> Linear:
    parts: dict[str, list[Slot]] = {"k": [], "v": [], "h": [], "n": []}
    every = {**layout, "conv1d": (_CHANNELS, "qkv")}
    for name, (index, kinds) in every.items():
        for leaf in ("weight", "bias"):
            if (tensor := f"{scope}.{name}.{leaf}") not in known:
                continue
            for place, kind in enumerate(kinds):
                text = f"{index}.{place}" if "[" in index else index
                parts["k" if kind == "q" else kind].append(Slot(tensor, {0: text}))
    parts["h"] += [Slot(f"{scope}.{name}", {0: "g r"}) for name in ("A_log", "dt_bias")]
    parts["n"].append(Slot(f"{scope}.norm.weight", {0: "v"}))
    parts["v"].append(Slot(f"{scope}.out_proj.weight", {1: "g r v"}))
    return Linear(scope, sizes, *(tuple(parts[kind]) for kind in "kvhn"))


def _state_fields(scope: str, known: dict[str, Pattern], sizes: Sizes) -> dict[str, str] | None:
    """Expressions for the dims of a state space, of fields by their role: small sizes are alike by chance."""
    rows, channels, inner, heads = (
        known[f"{scope}.{name}"].axes[axis]
        for name, axis in (("in_proj.weight", 0), ("conv1d.weight", 0), ("out_proj.weight", 1), ("A_log", 0))
    )
    # Twice the states of all groups: what is written and what is read.
    both = tuple(a - b for a, b in zip(channels, inner, strict=True))
    if any(row != b + c + h for row, b, c, h in zip(rows, inner, channels, heads, strict=True)):
        return None

    def first(wanted: tuple[int, ...] | None, *candidates: str) -> str | None:
        return next(
            (text for text in candidates if wanted is not None and sizes.values(text) == wanted), None
        )

    named = {
        role: [path for path in sizes.fields if SIZES.get(path.rpartition(".")[2]) == role]
        for role in ("state_heads", "state_dim", "state_head_dim", "state_width")
    }
    count = first(heads, *named["state_heads"])
    group = next((path for path in sizes.fields if path.rpartition(".")[2] in STATE_GROUPS), None)
    groups = sizes.values(group) if group is not None else None
    if count is None or group is None or groups is None or _parts(heads, groups) is None:
        return None
    # A class may work out the size of a head, from a width that is said or a multiple of the residual one.
    widths = [*named["state_width"], f"{STATE_EXPANSION} * hidden_size"]
    k = first(_parts(both, groups, 2), *named["state_dim"])
    v = first(_parts(inner, heads), *named["state_head_dim"], *(f"{width} // ({count})" for width in widths))
    if k is None or v is None:
        return None
    return {"g": group, "r": f"{count} // ({group})", "k": k, "v": v}


def _parts(whole: Sequence[int], counts: Sequence[int], twice: int = 1) -> tuple[int, ...] | None:
    """whole / (counts · twice), where that leaves no rest anywhere."""
    pairs = [(a, b * twice) for a, b in zip(whole, counts, strict=True)]
    return None if any(a % b for a, b in pairs) else tuple(a // b for a, b in pairs)


def _states(scope: str, known: dict[str, Pattern], sizes: dict[str, str]) -> Linear:
    def slots(name: str, index: str, *places: int) -> Iterator[Slot]:
        for leaf in (".weight", ".bias", ""):
            if f"{scope}.{name}{leaf}" in known:
                for place in places:
                    yield Slot(f"{scope}.{name}{leaf}", {0: f"{index}.{place}"})
                if not places:
                    yield Slot(f"{scope}.{name}{leaf}", {0: index})

    read, channels = "[g r v | g r v | g k | g k | g r]", "[g r v | g k | g k]"
    out = Slot(f"{scope}.out_proj.weight", {1: "g r v"})
    return Linear(
        scope,
        sizes,
        keys=(*slots("in_proj", read, 2, 3), *slots("conv1d", channels, 1, 2)),
        values=(*slots("in_proj", read, 0, 1), *slots("conv1d", channels, 0), *slots("norm", "g r v"), out),
        heads=(
            *slots("in_proj", read, 4),
            *(one for name in ("A_log", "D", "dt_bias") for one in slots(name, "g r")),
        ),
        norms=(),
    )
