"""Conjecture attention sites: which tensors may be queries, keys, values and output, and how rows are laid out.

Names give roles (a prior), shapes give the index strings that fit; several layouts may fit one fused tensor,
and a trial decides. Nothing here is believed without proof.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..spec import Slot
from .inventory import Pattern
from .sizes import Sizes, Values

_Q = (
    "q q_proj query wq to_q q_lin query_proj linear_q q_linear query_layer w_q query_projection q_b_proj wq_b"
    " query_linear q_up_proj q_attn"
)
_K = "k k_proj key wk to_k k_lin key_proj linear_k k_linear key_layer w_k key_projection key_linear k_attn"
_V = "v v_proj value wv to_v v_lin value_proj linear_v v_linear value_layer w_v value_projection value_linear v_attn"
_QKV = "qkv qkv_proj query_key_value c_attn wqkv in_proj to_qkv in_proj_weight qkv_linear att_proj"
_KV = "kv kv_proj to_kv key_value kv_b_proj wkv_b kv_linear"
_O = (
    "o o_proj out_proj wo to_out out_lin dense c_proj proj linear_out output out attention_output proj_out"
    " out_projection projection output_proj linear_o"
)
_ROLES = {
    word.lower(): role
    for role, words in (("q", _Q), ("k", _K), ("v", _V), ("qkv", _QKV), ("kv", _KV))
    for word in words.split()
}
_OUTPUT = frozenset(_O.split())
_WRAPPER = frozenset(["linear", "dense", "0", "base_layer", "layer", "projection", "conv", "proj"])


@dataclass(frozen=True)
class View:
    """One role's rows: the weight's pattern and axis, its bias if it has one, and its index string."""

    weight: Pattern
    axis: int
    bias: Pattern | None
    index: str

    def slots(self, power: int, index: str | None = None) -> list[Slot]:
        """The weight's and the bias's slots under an index string (default: the view's own)."""
        text = self.index if index is None else index
        slots = [Slot(self.weight.name, {self.axis: text}, power)]
        if self.bias is not None:
            slots.append(Slot(self.bias.name, {0: text}, power))
        return slots


@dataclass(frozen=True)
class Attention:
    """A conjectured layout of one attention block.

    Heads are "g r" (queries r of group g) or "g" alone; head dims are d for queries and keys, v for values. Without
    values of their own the keys are the values as well.
    `shared` holds keys that all heads share (a latent attention's rotary part). `gate` has as many rows as values, by
    which what a head gives is multiplied.
    """

    scope: str
    sizes: dict[str, str]
    q: View | None = None
    k: View | None = None
    v: View | None = None
    o: View | None = None
    rotary_q: View | None = None
    rotary_k: View | None = None
    gate: View | None = None
    spare: tuple[Pattern, ...] = ()
    layout: str = ""
    value_sizes: Values | None = None
    heads: tuple[str, ...] = field(default=("g",))

    @property
    def weights(self) -> set[str]:
        views = (self.q, self.k, self.v, self.o, self.rotary_q, self.rotary_k)
        return {view.weight.name for view in views if view is not None}


def find_blocks(stock: Sequence[Pattern], *, values: bool = True) -> dict[str, dict[str, Pattern]]:
    """Modules that hold query-, key- and value-like weights: {module: {role: weight}}.

    Args:
        values: False for those whose keys may be their values as well.
    """
    blocks: dict[str, dict[str, Pattern]] = {}
    for pattern in stock:
        path = pattern.name.split(".")
        if path[-1] == "weight":
            path.pop()
        elif not path[-1].endswith("_weight"):
            continue
        if len(pattern.axes) != 2:
            continue
        leaf = path.pop().lower()
        role = _ROLES.get(leaf)
        if role is None and leaf in _WRAPPER and path:
            role = _ROLES.get(path.pop().lower())
        if role is not None:
            blocks.setdefault(".".join(path), {}).setdefault(role, pattern)
    return {
        module: roles
        for module, roles in blocks.items()
        if "qkv" in roles or {"q", "kv"} <= roles.keys() or {"q", "k", *(["v"] * values)} <= roles.keys()
    }


def conjecture(
    module: str, roles: dict[str, Pattern], stock: Sequence[Pattern], sizes: Sizes
) -> Iterator[Attention]:
    """Layouts that the shapes allow for one block, the likeliest first."""
    biases = {pattern.name: pattern for pattern in stock if len(pattern.axes) == 1}
    # Biases that the block itself has, beside projections without one.
    own = {pattern.name: f"{module}.{role}_bias" for role, pattern in roles.items()}

    def view(pattern: Pattern, axis: int, index: str) -> View:
        twin = re.sub("weight$", "bias", pattern.name)
        bias = biases.get(twin) or biases.get(own.get(pattern.name, ""))
        return View(pattern, axis, bias if bias and bias.axes[0] == pattern.axes[axis] else None, index)

    spare = tuple(
        pattern
        for pattern in stock
        if pattern.name.startswith(module + ".") and pattern.name not in {p.name for p in roles.values()}
    )
    heads = sizes.heads(module)
    if {"q", "kv"} <= roles.keys():
        yield from _latent(module, roles, stock, sizes, heads, view, spare)
    if {"q", "k"} <= roles.keys():
        yield from _separate(module, roles, stock, sizes, heads, view, spare)
    if "qkv" in roles:
        yield from _fused(module, roles["qkv"], stock, sizes, heads, view, spare)


def _grouping(sizes: Sizes, heads: list[str], scope: str) -> Iterator[tuple[str, str | None, Values, Values]]:
    """Ways to count: (groups, queries a group or None, both as values)."""
    for count in heads:
        total = sizes.values(count)
        if total is None:
            continue
        yield count, None, total, tuple(1 for _ in total)
        for groups in [*heads, "1"]:
            few = sizes.values(groups)
            if groups == count or few is None or any(t % f for t, f in zip(total, few, strict=True)):
                continue
            each = tuple(t // f for t, f in zip(total, few, strict=True))
            if any(n > 1 for n in each):
                yield groups, (count if groups == "1" else f"{count} // ({groups})"), few, each


def divided(total: Values, *parts: Values) -> Values | None:
    """total / parts, where that leaves no rest anywhere."""
    out = []
    for position, whole in enumerate(total):
        for part in parts:
            if whole % part[position]:
                return None
            whole //= part[position]
        out.append(whole)
    return tuple(out) if all(n >= 2 for n in out) else None


def _outputs(
    module: str, stock: Sequence[Pattern], width: Values, taken: set[str]
) -> list[tuple[Pattern, int]]:
    """Weights that may read the heads' values: (pattern, axis), the likeliest first."""
    names = [pattern.name for pattern in stock]
    last = max((names.index(name) for name in taken if name in names), default=0)
    parent = module.rpartition(".")[0]
    ranked = []
    for position, pattern in enumerate(stock):
        if pattern.name in taken or len(pattern.axes) != 2 or not pattern.name.endswith("weight"):
            continue
        if not pattern.name.startswith((module + ".", parent + "." if parent else module + ".")):
            continue
        leaf = pattern.module.rpartition(".")[2].lower()
        inside = pattern.name.startswith(module + ".")
        rank = (
            (not inside) * 5
            + (leaf not in _OUTPUT) * 4
            + (position < last) * 1
            + min(abs(position - last), 9) / 10
        )
        ranked += [
            (rank + axis_rank * 0.01, pattern, axis)
            for axis_rank, axis in enumerate((1, 0))
            if pattern.axes[axis] == width
        ]
    ranked.sort(key=lambda item: item[0])
    return [(pattern, axis) for _, pattern, axis in ranked[:6]]


def _separate(module, roles, stock, sizes, heads, view, spare):  # type: ignore[no-untyped-def]
    q, k, v = roles["q"], roles["k"], roles.get("v")
    taken = {pattern.name for pattern in (q, k, v) if pattern is not None}
    for groups, repeat, few, each in _grouping(sizes, heads, module):
        d = divided(k.axes[0], few)
        e = d if v is None else divided(v.axes[0], few)
        if d is None or e is None:
            continue
        # Beside every head's queries there may be as many rows that gate what it gives.
        gated = v is not None and d == e and divided(q.axes[0], few, each) == tuple(2 * n for n in d)
        if not gated and divided(q.axes[0], few, each) != d:
            continue
        names = _sizes(
            sizes, module, {"g": (groups, few), "r": (repeat, each), "d": (None, d), "v": (None, e)}
        )
        if names is None:
            continue
        for rows in (("g r",) if repeat else ("g",)) + (
            ("r g",) if repeat and any(n > 1 for n in few) else ()
        ):
            width = tuple(a * b * c for a, b, c in zip(few, each, e, strict=True))
            for output, axis in _outputs(module, stock, width, taken):
                yield Attention(
                    module,
                    names,
                    q=view(q, 0, f"{rows} [d | v].0" if gated else f"{rows} d"),
                    k=view(k, 0, "g d"),
                    v=None if v is None else view(v, 0, "g v"),
                    o=View(output, axis, None, f"{rows} d" if v is None else f"{rows} v"),
                    gate=view(q, 0, f"{rows} [d | v].1") if gated else None,
                    spare=spare,
                    layout=f"separate {rows}",
                    value_sizes=e,
                    heads=("g", "r") if repeat else ("g",),
                )


def _fused(module, pattern, stock, sizes, heads, view, spare):  # type: ignore[no-untyped-def]
    for axis in (0, 1):
        for groups, repeat, few, each in _grouping(sizes, heads, module):
            both = tuple(f * (n + 2) for f, n in zip(few, each, strict=True))
            d = divided(pattern.axes[axis], both)
            if d is None:
                continue
            names = _sizes(
                sizes, module, {"g": (groups, few), "r": (repeat, each), "d": (None, d), "v": (None, d)}
            )
            if names is None:
                continue
            # one letter for all parts: a fused tensor's values are as wide as its keys
            rows, own = ("g r", "r") if repeat else ("g", "")
            layouts = {
                "[q | k | v]": [f"[{rows} d | g d | g d].{part}" for part in range(3)],
                "per head [q | k | v]": [f"g [{own} d | d | d].{part}" for part in range(3)],
            }
            if not repeat:
                layouts["interleaved q k v"] = [f"g d [1 | 1 | 1].{part}" for part in range(3)]
            width = tuple(a * b * c for a, b, c in zip(few, each, d, strict=True))
            for layout, (iq, ik, iv) in layouts.items():
                for output, at in _outputs(module, stock, width, {pattern.name}):
                    yield Attention(
                        module,
                        names,
                        q=view(pattern, axis, iq),
                        k=view(pattern, axis, ik),
                        v=view(pattern, axis, iv),
                        o=View(output, at, None, f"{rows} d"),
                        spare=spare,
                        layout=layout,
                        value_sizes=d,
                        heads=("g", "r") if repeat else ("g",),
                    )


def _latent(module, roles, stock, sizes, heads, view, spare):  # type: ignore[no-untyped-def]
    """Latent attention: per head [nope | rope] queries and [nope | value] keys; one rotary key for all heads."""
    q, kv = roles["q"], roles["kv"]
    dims = {
        leaf: [p for p in sizes.fields if p.endswith(leaf)]
        for leaf in ("nope_head_dim", "rope_head_dim", "v_head_dim")
    }
    if not all(dims.values()):
        return
    nope, rope, value = (found[0] for found in dims.values())
    sizes_of = {key: sizes.values(text) for key, text in (("n", nope), ("p", rope), ("v", value))}
    if None in sizes_of.values():
        return
    n, p, v = sizes_of["n"], sizes_of["p"], sizes_of["v"]
    for count in heads:
        h = sizes.values(count)
        if h is None or q.axes[0] != tuple(a * (b + c) for a, b, c in zip(h, n, p, strict=True)):
            continue
        if kv.axes[0] != tuple(a * (b + c) for a, b, c in zip(h, n, v, strict=True)):
            continue
        names = {
            "g": count,
            "n": nope,
            "p": rope,
            "v": value,
            "c": "2",
            "a": f"{rope} // 2",
            "d": f"{nope} + {rope}",
        }
        shared = [
            (w, rank)
            for w in spare
            if len(w.axes) == 2
            and w.name.endswith("weight")
            and (rank := tuple(x - y for x, y in zip(w.axes[0], p, strict=True)))
            and rank == kv.axes[1]
        ]
        width = tuple(a * b for a, b in zip(h, v, strict=True))
        for output, axis in _outputs(module, stock, width, {q.name, kv.name}):
            base = Attention(
                module,
                names,
                q=view(q, 0, "g [n | p].0"),
                k=view(kv, 0, "g [n | v].0"),
                v=view(kv, 0, "g [n | v].1"),
                o=View(output, axis, None, "g v"),
                spare=spare,
                layout="latent",
                value_sizes=v,
            )
            for weight, rank in shared:
                rank_text = sizes.find(rank, module, "rank")
                if rank_text is None:
                    continue
                yield replace(
                    base,
                    sizes={**names, "k": rank_text},
                    rotary_q=view(q, 0, "g [n | p].1"),
                    rotary_k=view(weight, 0, "[k | p].1"),
                )
            yield base


def _sizes(sizes: Sizes, scope: str, wanted: dict[str, tuple[str | None, Values]]) -> dict[str, str] | None:
    out: dict[str, str] = {}
    for dim, (text, values) in wanted.items():
        if text is None and dim == "r":
            continue
        found = text if text is not None else sizes.find(values, scope, "head|d_kv|dim")
        if found is None:
            return None
        out[dim] = found
    return out
