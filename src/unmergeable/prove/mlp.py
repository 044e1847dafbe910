"""Conjecture MLP and expert sites, by shape alone: tensors of one module that share an inner size.

Names are not consulted: any two weights under one module with an axis of the same size in every miniature are
tried, fused gate-and-up weights by twice that size. The trial decides.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..spec import AS_FOUND, Site, Slot
from .inventory import Pattern
from .sizes import Sizes, Values

_MOST_TENSORS = 12
_FUSED = ("[f | f]", "f [1 | 1]")


@dataclass(frozen=True)
class Group:
    """Tensors under one module that share an inner size; `fused` ones have it twice."""

    scope: str
    inner: Values
    members: tuple[tuple[Pattern, int, bool], ...]  # (pattern, axis, fused)
    experts: Values | None  # size of axis 0 of stacked experts


def find_groups(stock: Sequence[Pattern], used: set[str]) -> Iterator[Group]:
    """Groups of tensors that may be an MLP, those of the innermost modules first."""
    free = [pattern for pattern in stock if pattern.name not in used]
    scopes: dict[str, None] = {}
    for pattern in free:
        path = pattern.module
        while path:
            scopes[path] = None
            path = path.rpartition(".")[0]
    for scope in sorted(scopes, key=lambda path: -path.count(".")):
        inside = [p for p in free if p.name.startswith(scope + ".") and p.name not in used]
        for inner in dict.fromkeys(size for p in inside if len(p.axes) >= 2 for size in p.axes):
            group = _group(scope, inner, inside)
            if group is not None:
                yield group


def _group(scope: str, inner: Values, inside: Sequence[Pattern]) -> Group | None:
    twice = tuple(2 * n for n in inner)
    members = []
    for pattern in inside:
        axes = [axis for axis, size in enumerate(pattern.axes) if size in (inner, twice)]
        if len(axes) == 1:
            members.append((pattern, axes[0], pattern.axes[axes[0]] == twice))
        elif axes:
            return None
    weights = [member for member in members if len(member[0].axes) >= 2]
    if not len(weights) >= 2 or len(members) > _MOST_TENSORS or all(fused for _, _, fused in weights):
        return None
    stacked = {pattern.axes[0] for pattern, axis, _ in weights if len(pattern.axes) == 3 and axis > 0}
    if len(stacked) > 1:
        return None
    experts = stacked.pop() if stacked else None
    if experts is not None:
        members = [m for m in members if m[0].axes[0] == experts and m[1] > 0]
    return Group(scope, inner, tuple(members), experts)


def permutations(group: Group, sizes: Sizes, *, uneven: bool = False) -> Iterator[Site]:
    """The group's tensors under one order of the inner dim, for both layouts of fused weights.

    uneven: of layers that differ in size, which no field gives: it is that of an axis that the dim has to itself.
    """
    inner = AS_FOUND if uneven else sizes.find(group.inner, group.scope, "inter|ffn|d_ff|inner|mlp")
    if inner is None:
        return
    dims = {"f": inner}
    per = tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", " ".join(p.name for p, _, _ in group.members))))
    if group.experts is not None:
        experts = sizes.find(group.experts, group.scope, "expert")
        if experts is None:
            return
        dims["e"] = experts
        per = (*per, "e")
    fused = any(fused for _, _, fused in group.members)
    for layout in _FUSED if fused else ("f",):
        slots: list[Slot] = []
        for pattern, axis, twice in group.members:
            lead = {0: "e"} if group.experts is not None else {}
            texts = [f"{layout}.{part}" for part in (0, 1)] if twice else ["f"]
            slots += [Slot(pattern.name, {**lead, axis: text}, 0) for text in texts]
        yield Site(f"{_common(group)}.mlp", "mlp", "f", per, "permutation", dims, tuple(slots))


def _common(group: Group) -> str:
    """The deepest module that holds all members."""
    paths = [pattern.module.split(".") for pattern, _, _ in group.members]
    shared = [
        parts[0]
        for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    ]
    return ".".join(shared)


def scaled(site: Site) -> Iterator[Site]:
    """The same site with rows scaled too: one weight up, another down, larger groups first."""
    weights = [k for k, slot in enumerate(site.slots) if not re.search("bias$", slot.tensor)]
    for name, power in (("monomial", -1), ("positive_monomial", -1), ("positive_monomial", -2)):
        for up, down in itertools.permutations(weights, 2):
            if power == -1 and up > down and name == "monomial" and not _has_bias(site, up):
                continue  # the inverse element: the same group
            powers = {up: 1, down: power}
            slots = []
            for k, slot in enumerate(site.slots):
                partner = k if k in powers else _weight_of(site, k)
                slots.append(replace(slot, power=powers.get(partner, 0) if partner is not None else 0))
            yield replace(site, group=name, slots=tuple(slots))


def _has_bias(site: Site, weight: int) -> bool:
    return any(_weight_of(site, k) == weight for k in range(len(site.slots)) if k != weight)


def _weight_of(site: Site, bias: int) -> int | None:
    """The weight that a bias belongs to: the same name but for the ending, the same part of a fused one."""
    slot = site.slots[bias]
    if not re.search("bias$", slot.tensor):
        return None
    stem = re.sub(r"[._]?bias$", "", slot.tensor)
    part = re.search(r"(\.\d+)?$", slot.index[max(slot.index)])
    for k, other in enumerate(site.slots):
        if k != bias and re.sub(r"[._]?weight$", "", other.tensor) == stem:
            theirs = re.search(r"(\.\d+)?$", other.index[max(other.index)])
            if part and theirs and part.group() == theirs.group():
                return k
    return None


def expert_sites(mlps: Sequence[Site], stock: Sequence[Pattern], sizes: Sizes) -> Iterator[Site]:
    """Orders of whole experts: their tensors, and whatever has one entry an expert beside them (the router)."""
    done: set[str] = set()
    for site in mlps:
        if "e" not in site.per:
            continue
        scope = re.split(r"\.\{e\}|\.[^.]*$", site.name.removesuffix(".mlp") + ".", maxsplit=1)[0]
        parent = scope.rpartition(".")[0] if "{e}" in site.name else scope
        parent = re.sub(r"\.[^.]*experts[^.]*$", "", parent) or parent
        if parent in done:
            continue
        done.add(parent)
        named = {p.name for p in stock if "{e}" in p.name and p.name.startswith(parent + ".")}
        first = site.slots[0]
        count = next(
            (p.axes[0] for p in stock if p.name == first.tensor and "{e}" not in p.name), None
        ) or _counted(stock, sizes, parent)
        if count is None:
            continue
        text = sizes.find(count, parent, "expert")
        if text is None:
            continue
        slots = [Slot(name, {}, 1) for name in sorted(named)]
        slots += [
            Slot(p.name, {p.axes.index(count): "e"}, 1)
            for p in stock
            if p.name.startswith(parent + ".") and p.name not in named and count in p.axes
        ]
        per = tuple(dim for dim in site.per if dim not in ("e",))
        yield Site(f"{parent}.experts", "experts", "e", per, "permutation", {"e": text}, tuple(slots))


def _counted(stock: Sequence[Pattern], sizes: Sizes, parent: str) -> Values | None:
    """How many experts there are, from a field that also is an axis of a tensor beside them."""
    for path, values in sizes.fields.items():
        if "expert" not in path or re.search("size|dim", path.rpartition(".")[2]) or None in values:
            continue
        if any(p.name.startswith(parent + ".") and "{e}" not in p.name and values in p.axes for p in stock):
            return values  # type: ignore[return-value]
    return None
