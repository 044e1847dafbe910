"""Conjecture sites of linear attention (the gated delta rule, arXiv 2412.06464) and state spaces (arXiv 2405.21060).

Queries and keys, or what is written to states and read from them, meet in inner products alone, but behind a
convolution of every channel and an activation: their coordinates may change places, and no more. So may those of
values; in all heads alike where these share the weights of a norm. Heads have a decay and a rate of their own, which
move along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..fields import SIZES, STATE_EXPANSION, STATE_GROUPS
from ..spec import Site, Slot
from .attention import divided
from .inventory import Pattern
from .ladders import site_of
from .sizes import Sizes

_FIELDS = {
    "g": "linear_num_key_heads",
    "h": "linear_num_value_heads",
    "k": "linear_key_head_dim",
    "v": "linear_value_head_dim",
}
_CHANNELS = ("[g k | g k | g r v]", "kkv")
_BEHIND = {"conv1d": _CHANNELS, "A_log": ("g r", "h"), "dt_bias": ("g r", "h"), "norm": ("v", "n")}
#: How a block is laid out: {module or parameter: (index string, what its parts are)}; then comes the output.
_DELTA: tuple[dict[str, tuple[str, str]], ...] = (
    {
        "in_proj_qkv": _CHANNELS,
        "in_proj_z": ("g r v", "v"),
        "in_proj_b": ("g r", "h"),
        "in_proj_a": ("g r", "h"),
        **_BEHIND,
    },
    {"in_proj_qkvz": ("g [k | k | r v | r v]", "kkvv"), "in_proj_ba": ("g [r | r]", "hh"), **_BEHIND},
)
_STATES: dict[str, tuple[str, str]] = {
    "in_proj": ("[g r v | g r v | g k | g k | g r]", "vvkkh"),
    "conv1d": ("[g r v | g k | g k]", "vkk"),
    "norm": ("g r v", "v"),
    "A_log": ("g r", "h"),
    "D": ("g r", "h"),
    "dt_bias": ("g r", "h"),
}
_BARE = frozenset(["A_log", "D", "dt_bias"])  # parameters of the block itself
_OPTIONAL = frozenset(["norm", "D", "dt_bias"])


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
        yield site_of(self, "qk", "k", ("g",), "permutation", self.keys)
        per = () if self.norms else ("g", "r")
        yield site_of(self, "vo", "v", per, "permutation", (*self.values, *self.norms))

    def outer(self) -> Iterator[Site]:
        """Value heads of one key, and key heads."""
        own = (*self.values, *self.heads)
        yield site_of(self, "heads", "r", ("g",), "permutation", own, suffix="heads.r")
        yield site_of(self, "heads", "g", (), "permutation", (*self.keys, *own), suffix="heads.g")


def find_linear(stock: Sequence[Pattern], sizes: Sizes) -> Iterator[Linear]:
    """Blocks with a convolution of queries, keys and values, and all that a layout of names has."""
    known = {pattern.name: pattern for pattern in stock}
    for scope in (name.removesuffix(".conv1d.weight") for name in known if name.endswith(".conv1d.weight")):
        for layout, fields_of in ((_STATES, _state_fields), *((layout, _fields) for layout in _DELTA)):
            needed = {*layout, "out_proj"} - _OPTIONAL
            if all(_tensors(scope, name)[0] in known for name in needed):
                fields = fields_of(scope, known, sizes)
                if fields is not None:
                    yield _block(scope, layout, known, fields)


def _fields(scope: str, known: Mapping[str, Pattern], sizes: Sizes) -> dict[str, str] | None:
    """Expressions for the dims, of fields beside each other that give the channels of the convolution."""
    starts = [path.removesuffix(_FIELDS["g"]) for path in sizes.fields if path.endswith(_FIELDS["g"])]
    for names in ({dim: start + leaf for dim, leaf in _FIELDS.items()} for start in starts):
        found = [values for name in names.values() if (values := sizes.values(name)) is not None]
        if len(found) < len(names):
            continue
        channels = tuple(2 * g * k + h * v for g, h, k, v in zip(*found, strict=True))
        if channels == known[f"{scope}.conv1d.weight"].axes[0]:
            key_heads, value_heads = names["g"], names["h"]
            return {"g": key_heads, "r": f"{value_heads} // ({key_heads})", "k": names["k"], "v": names["v"]}
    return None


def _state_fields(scope: str, known: Mapping[str, Pattern], sizes: Sizes) -> dict[str, str] | None:
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
    if count is None or group is None or groups is None or sizes.values(f"{count} // ({group})") is None:
        return None
    # A class may work out the size of a head, from a width that is said or a multiple of the residual one.
    widths = [*named["state_width"], f"{STATE_EXPANSION} * hidden_size"]
    k = first(divided(both, groups, (2,) * len(both)), *named["state_dim"])
    v = first(divided(inner, heads), *named["state_head_dim"], *(f"{width} // ({count})" for width in widths))
    if k is None or v is None:
        return None
    return {"g": group, "r": f"{count} // ({group})", "k": k, "v": v}


def _tensors(scope: str, name: str) -> tuple[str, ...]:
    """Patterns of a module's or parameter's tensors, of which the first has to be there."""
    whole = f"{scope}.{name}"
    return (whole,) if name in _BARE else (f"{whole}.weight", f"{whole}.bias")


def _block(
    scope: str, layout: Mapping[str, tuple[str, str]], known: Mapping[str, Pattern], sizes: dict[str, str]
) -> Linear:
    parts: dict[str, list[Slot]] = {kind: [] for kind in "kvhn"}
    for name, (index, kinds) in layout.items():
        for tensor in _tensors(scope, name):
            if tensor in known:
                for place, kind in enumerate(kinds):
                    parts[kind].append(Slot(tensor, {0: f"{index}.{place}" if "[" in index else index}))
    parts["v"].append(Slot(f"{scope}.out_proj.weight", {1: "g r v"}))
    return Linear(scope, sizes, *(tuple(parts[kind]) for kind in "kvhn"))
