"""Small specs of every kind of site, and the shapes of their tensors."""

from __future__ import annotations

from typing import Any

from unmergeable.spec import Spec

H = 20


def slot(tensor: str, index: dict[str, str], power: int = 1) -> dict[str, Any]:
    return {"tensor": tensor, "index": index, "power": power}


def site(
    name: str, kind: str, acts: str, per: list[str], group: str, *slots: dict[str, Any]
) -> dict[str, Any]:
    sizes = {dim: dim for dim in ("g", "r", "h", "c", "a", "j", "f", "e", "k", "n")}
    return {
        "name": name,
        "kind": kind,
        "acts": acts,
        "per": per,
        "group": group,
        "sizes": sizes,
        "slots": list(slots),
    }


def spec_of(*sites: dict[str, Any]) -> Spec:
    return Spec.from_dict(
        {
            "configs": [{}],
            "defaults": {},
            **{"format": 1, "architecture": "X", "model_type": "x", "layout": "disk", "refused": []},
            **{"untouched": [], "ignored": [], "sites": list(sites)},
        }
    )


SIZES = {"g": 3, "r": 2, "h": 5, "c": 2, "a": 4, "j": 8, "f": 12, "e": 4, "k": 6, "n": 3}


def grouped() -> tuple[Spec, dict[str, tuple[int, ...]]]:
    """GQA with rotary pairs, biases, sinks, relative biases, and rows that nothing acts on."""
    q, k = "l.{l}.q", "l.{l}.k"
    spec = spec_of(
        site(
            "l.{l}.qk",
            "qk",
            "c",
            ["l", "g", "a"],
            "complex",
            slot(q, {"0": "g r c a"}, -1),
            slot(q + ".bias", {"0": "g r c a"}, -1),
            slot(k, {"0": "[g c a | n].0"}),
        ),
        site(
            "l.{l}.vo",
            "vo",
            "j",
            ["l", "g"],
            "general_linear",
            slot("l.{l}.v", {"0": "g j"}),
            slot("l.{l}.v.bias", {"0": "g j"}),
            slot("l.{l}.o", {"1": "g r j"}, -1),
        ),
        site(
            "l.{l}.within",
            "heads",
            "r",
            ["l", "g"],
            "permutation",
            slot(q, {"0": "g r j"}),
            slot(q + ".bias", {"0": "g r j"}),
            slot("l.{l}.o", {"1": "g r j"}),
            slot("l.{l}.sinks", {"0": "g r"}),
            slot("l.{l}.relative", {"1": "g r"}),
        ),
        site(
            "l.{l}.heads",
            "heads",
            "g",
            ["l"],
            "permutation",
            slot(q, {"0": "g r j"}),
            slot(q + ".bias", {"0": "g r j"}),
            slot(k, {"0": "[g c a | n].0"}),
            slot("l.{l}.v", {"0": "g j"}),
            slot("l.{l}.v.bias", {"0": "g j"}),
            slot("l.{l}.o", {"1": "g r j"}),
            slot("l.{l}.sinks", {"0": "g r"}),
            slot("l.{l}.relative", {"1": "g r"}),
        ),
    )
    shapes = {}
    for n in (0, 1, 10):
        shapes |= {
            f"l.{n}.q": (48, H),
            f"l.{n}.q.bias": (48,),
            f"l.{n}.k": (27, H),
            f"l.{n}.v": (24, H),
            f"l.{n}.v.bias": (24,),
            f"l.{n}.o": (H, 48),
            f"l.{n}.sinks": (6,),
            f"l.{n}.relative": (7, 6),
        }
    return spec, shapes


def normed() -> tuple[Spec, dict[str, tuple[int, ...]]]:
    """A sign for each rotary pair under a query-key norm; values in any order; heads; fused q, k, v."""
    qkv = "[h c a | h c a | h j].{}"
    spec = spec_of(
        site(
            "qk",
            "qk",
            "c",
            ["h", "a"],
            "negation",
            slot("qkv", {"0": qkv.format(0)}, -1),
            slot("qkv", {"0": qkv.format(1)}),
        ),
        site(
            "vo",
            "vo",
            "j",
            ["h"],
            "permutation",
            slot("qkv", {"0": qkv.format(2)}),
            slot("o", {"1": "h j"}, -1),
        ),
        site(
            "heads",
            "heads",
            "h",
            [],
            "permutation",
            slot("qkv", {"0": qkv.format(0)}),
            slot("qkv", {"0": qkv.format(1)}),
            slot("qkv", {"0": qkv.format(2)}),
            slot("o", {"1": "h j"}),
        ),
    )
    return spec, {"qkv": (3 * 40, H), "o": (H, 40)}


def spanning() -> tuple[Spec, dict[str, tuple[int, ...]]]:
    """Heads in one order for all layers, because they share one table of relative biases."""
    names = ("l.{l}.q", "l.{l}.k", "l.{l}.v")
    spec = spec_of(
        site(
            "l.{l}.qk",
            "qk",
            "j",
            ["l", "h"],
            "general_linear",
            slot("l.{l}.q", {"0": "h j"}, -1),
            slot("l.{l}.k", {"0": "h j"}),
        ),
        site(
            "l.{l}.vo",
            "vo",
            "j",
            ["l", "h"],
            "orthogonal",
            slot("l.{l}.v", {"0": "h j"}),
            slot("l.{l}.o", {"1": "h j"}, -1),
        ),
        site(
            "heads",
            "heads",
            "h",
            [],
            "permutation",
            *(slot(name, {"0": "h j"}) for name in names),
            slot("l.{l}.o", {"1": "h j"}),
            slot("relative", {"1": "h"}),
        ),
    )
    shapes: dict[str, tuple[int, ...]] = {"relative": (9, 5)}
    for n in range(3):
        shapes |= {f"l.{n}.{name}": (40, H) for name in "qkv"} | {f"l.{n}.o": (H, 40)}
    return spec, shapes


def rows() -> tuple[Spec, dict[str, tuple[int, ...]]]:
    """MLPs: gated and fused among experts, gated and apart, squared ReLU, GELU."""
    spec = spec_of(
        site(
            "l.{l}.mlp",
            "mlp",
            "f",
            ["l", "e"],
            "monomial",
            slot("l.{l}.gu", {"0": "e", "2": "f [1 | 1].0"}, 0),
            slot("l.{l}.gu", {"0": "e", "2": "f [1 | 1].1"}),
            slot("l.{l}.gu.bias", {"0": "e", "1": "f [1 | 1].0"}, 0),
            slot("l.{l}.gu.bias", {"0": "e", "1": "f [1 | 1].1"}),
            slot("l.{l}.down", {"0": "e", "1": "f"}, -1),
        ),
        site(
            "l.{l}.x.{e}.named",
            "mlp",
            "f",
            ["l", "e"],
            "positive_monomial",
            slot("l.{l}.x.{e}.up", {"0": "f"}),
            slot("l.{l}.x.{e}.down", {"1": "f"}, -2),
        ),
        site(
            "l.{l}.gelu",
            "mlp",
            "f",
            ["l"],
            "permutation",
            slot("l.{l}.fc1", {"0": "f"}),
            slot("l.{l}.fc1.bias", {"0": "f"}),
            slot("l.{l}.fc2", {"1": "f"}),
        ),
        site(
            "l.{l}.fused",
            "experts",
            "e",
            ["l"],
            "permutation",
            slot("l.{l}.gu", {"0": "e"}),
            slot("l.{l}.gu.bias", {"0": "e"}),
            slot("l.{l}.down", {"0": "e"}),
            slot("l.{l}.out.bias", {"0": "e"}),
            slot("l.{l}.router", {"0": "e"}),
        ),
        site(
            "l.{l}.apart",
            "experts",
            "e",
            ["l"],
            "permutation",
            slot("l.{l}.x.{e}.up", {}),
            slot("l.{l}.x.{e}.down", {}),
            slot("l.{l}.x.router", {"1": "e"}),
        ),
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(2):
        shapes |= {
            f"l.{n}.gu": (4, H, 24),
            f"l.{n}.gu.bias": (4, 24),
            f"l.{n}.down": (4, 12, H),
            f"l.{n}.out.bias": (4, H),
            f"l.{n}.router": (4, H),
            f"l.{n}.x.router": (H, 4),
            f"l.{n}.fc1": (12, H),
            f"l.{n}.fc1.bias": (12,),
            f"l.{n}.fc2": (H, 12),
        }
        shapes |= {f"l.{n}.x.{e}.up": (12, H) for e in range(4)} | {
            f"l.{n}.x.{e}.down": (H, 12) for e in range(4)
        }
    return spec, shapes


def latent() -> tuple[Spec, dict[str, tuple[int, ...]]]:
    """Sites on both axes of one matrix: heads on its rows, the order of a latent on its columns."""
    spec = spec_of(
        site(
            "vo",
            "vo",
            "j",
            ["h"],
            "general_linear",
            slot("up", {"0": "h [n | j].1"}),
            slot("o", {"1": "h j"}, -1),
        ),
        site(
            "qk",
            "qk",
            "n",
            ["h"],
            "general_linear",
            slot("up", {"0": "h [n | j].0"}),
            slot("q", {"0": "h n"}, -1),
        ),
        site(
            "latent",
            "mlp",
            "k",
            [],
            "permutation",
            slot("down", {"0": "k"}),
            slot("norm", {"0": "k"}, 0),
            slot("up", {"1": "k"}),
        ),
        site(
            "heads",
            "heads",
            "h",
            [],
            "permutation",
            slot("up", {"0": "h [n | j].0"}),
            slot("up", {"0": "h [n | j].1"}),
            slot("q", {"0": "h n"}),
            slot("o", {"1": "h j"}),
        ),
    )
    return spec, {"down": (6, H), "norm": (6,), "up": (55, 6), "q": (15, H), "o": (H, 40)}


def one_group(group: str, n: int) -> tuple[Spec, dict[str, tuple[int, ...]]]:
    spec = spec_of(
        site(
            "one",
            "qk",
            "c" if n == 2 else "j",
            ["h"],
            group,
            slot("q", {"0": "h c" if n == 2 else "h j"}, -1),
            slot("k", {"0": "h c" if n == 2 else "h j"}),
            slot("k.bias", {"0": "h c" if n == 2 else "h j"}),
        ),
    )
    rows_ = 10 if n == 2 else 40
    return spec, {"q": (rows_, H), "k": (rows_, H), "k.bias": (rows_,)}


CASES = {
    "grouped": grouped,
    "normed": normed,
    "spanning": spanning,
    "rows": rows,
    "latent": latent,
    **{
        name: (lambda name=name: one_group(name, 8))
        for name in ("general_linear", "orthogonal", "diagonal", "sign", "scalar", "monomial", "negation")
    },
    "complex": lambda: one_group("complex", 2),
    "rotation": lambda: one_group("rotation", 2),
}
