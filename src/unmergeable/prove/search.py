"""Search the sites of one layout of one class: conjecture, try from the largest group down, judge, refuse.

The order of the sites is the order in which they act: inside heads, inside MLPs, then heads within a group,
groups, experts.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..errors import InputError
from ..spec import Refusal, Site
from .attention import Attention, conjecture, find_blocks
from .inventory import Pattern
from .ladders import heads, of_all_layers, query_key, value_output, with_companions
from .linear import Linear, find_linear
from .mlp import expert_sites, find_groups, permutations, scaled
from .sizes import Sizes
from .trial import Judge, first_passing

Rungs = Callable[[Iterable[tuple[Site, ...]]], Iterator[tuple[Site, ...]]]


class Found:
    """What a search found so far."""

    def __init__(self) -> None:
        self.inner: list[Site] = []
        self.outer: list[Site] = []
        self.refused: list[Refusal] = []
        self.used: set[str] = set()

    @property
    def sites(self) -> tuple[Site, ...]:
        return (*self.inner, *self.outer)


def search(
    judge: Judge,
    stock: Sequence[Pattern],
    sizes: Sizes,
    uneven: Sequence[Pattern] = (),
    kinds: Mapping[str, Sequence[Pattern]] | None = None,
) -> Found:
    """Every site that holds on all miniatures, and a sentence for every place that was looked at in vain.

    Args:
        judge: of trials.
        stock: the patterns of one shape in all layers.
        sizes: the fields that sizes come from.
        uneven: the patterns of several shapes, among which MLPs are looked for.
        kinds: the patterns of one shape in the layers of a kind, in which attention of several shapes is looked for.
    """
    found = Found()
    for block in find_linear(stock, sizes):
        _linear(judge, block, found)
    stock = [pattern for pattern in stock if pattern.name not in found.used]
    blocks = find_blocks(stock)
    for module, roles in blocks.items():
        _attention(judge, module, roles, stock, sizes, found)
    _uneven_attention(judge, blocks, kinds or {}, sizes, found)
    mlps = _mlps(judge, stock, sizes, found)
    _mlps(judge, uneven, sizes, found, uneven=True)
    left = [pattern for pattern in uneven if len(pattern.axes) == 2 and pattern.name not in found.used]
    for scope in dict.fromkeys(pattern.module.rpartition(".")[0] for pattern in left):
        found.refused.append(Refusal(scope, "its weights have other shapes in other layers"))
    for site in expert_sites(mlps, stock, sizes):
        _keep(judge, [site], found, found.outer, "the order of experts matters (they are routed in groups)")
    return found


def _attention(
    judge: Judge,
    module: str,
    roles: dict[str, Pattern],
    stock: Sequence[Pattern],
    sizes: Sizes,
    found: Found,
) -> None:
    best = _layout(judge, module, roles, stock, sizes)
    across = best is None and _takes_from_others(roles)
    if across:
        best = _layout(judge, module, roles, stock, sizes, across=True)
    if best is None:
        found.refused.append(Refusal(module, "no layout of heads that the shapes allow keeps the function"))
        found.used |= {pattern.name for pattern in roles.values()}
        return
    block, values, keys = best
    found.used |= block.weights | {
        slot.tensor for rung in (values, keys) for s in rung or () for slot in s.slots
    }
    for kind, rung in (("qk", keys), ("vo", values)):
        if rung is None and (kind == "qk" or block.v is not None):
            found.refused.append(Refusal(f"{module}.{kind}", "no group of the ladder keeps the function"))
        else:
            _keep(judge, list(rung or ()), found, found.inner, "not proven")
    for candidates in heads(block, stock):
        if across and {slot.tensor for slot in candidates[0].slots} & {roles[role].name for role in "kv"}:
            candidates = [of_all_layers(site) for site in candidates]
        if _single(judge, candidates[0]):
            continue
        passing = next((site for site in candidates if judge.passes([site])), None)
        if passing is not None:
            _keep(judge, [passing], found, found.outer, "not proven")
            found.used |= {slot.tensor for slot in passing.slots}
        else:
            moved = judge.error([candidates[0]], 0)
            reason = (
                f"heads cannot change places: the output moves by {moved:.1e}; "
                "each has something of its own that is no tensor of the block, such as a slope of a position bias"
            )
            found.refused.append(Refusal(candidates[0].name, reason))


def _layout(
    judge: Judge,
    module: str,
    roles: dict[str, Pattern],
    stock: Sequence[Pattern],
    sizes: Sizes,
    *,
    across: bool = False,
) -> tuple[Attention, tuple[Site, ...] | None, tuple[Site, ...] | None] | None:
    """The layout that keeps the function with the largest groups, and its sites of values and of keys; None if none.

    Args:
        across: whether all layers have one element.
    """

    def rungs(ladder: Iterable[tuple[Site, ...]]) -> Iterator[tuple[Site, ...]]:
        for rung in ladder:
            yield tuple(map(of_all_layers, rung)) if across else rung

    best: tuple[int, Attention, tuple[Site, ...] | None, tuple[Site, ...] | None] | None = None
    for block in conjecture(module, roles, stock, sizes):
        values = first_passing(judge, rungs(value_output(block)))
        if values is None and best is not None:
            continue
        keys = first_passing(judge, rungs(query_key(block, sizes)))
        if _is_poor(keys) and block.spare:
            keys = _with_companions(judge, rungs, block, sizes) or keys
        score = 2 * (values is not None) + 2 * (keys is not None) - _is_poor(keys)
        if best is None or score > best[0]:
            best = score, block, values, keys
        if score == 4:
            break
    return None if best is None or best[0] <= 0 else best[1:]


def _takes_from_others(roles: Mapping[str, Pattern]) -> bool:
    """Whether some layers have queries and no keys and values of their own."""
    return {"q", "k", "v"} <= roles.keys() and max(roles["k"].count, roles["v"].count) < roles["q"].count


def _uneven_attention(
    judge: Judge, known: Container[str], kinds: Mapping[str, Sequence[Pattern]], sizes: Sizes, found: Found
) -> None:
    """Attention of which only layers of one kind are alike, kind by kind; not of the modules that are known."""
    blocks = {kind: find_blocks(patterns) for kind, patterns in kinds.items()}
    for module in dict.fromkeys(one for each in blocks.values() for one in each if one not in known):
        for kind, patterns in kinds.items():
            first = len(found.refused)
            roles = blocks[kind].get(module) or find_blocks(patterns, values=False).get(module)
            if roles is not None:
                _attention(judge.of({"l": kind}), module, roles, patterns, sizes.of(kind), found)
            else:
                found.refused.append(Refusal(module, "it has no queries and keys that are all its own"))
            found.refused[first:] = [
                replace(one, site=f"{one.site} ({kind})") for one in found.refused[first:]
            ]


def _linear(judge: Judge, block: Linear, found: Found) -> None:
    found.used |= block.weights
    for into, sites in ((found.inner, block.inner()), (found.outer, block.outer())):
        for site in sites:
            if not _single(judge, site):
                _keep(judge, [site], found, into, "not proven")


def _single(judge: Judge, site: Site) -> bool:
    """Whether there is but one head to permute."""
    return all(judge.match([site], on).sites[0].acted == 1 for on in range(len(judge.oracles)))


def _is_poor(rung: Sequence[Site] | None) -> bool:
    return rung is None or all(site.group in ("negation", "sign", "scalar") for site in rung)


def _with_companions(judge: Judge, rungs: Rungs, block: Attention, sizes: Sizes) -> tuple[Site, ...] | None:
    for rung in query_key(block, sizes):
        if _is_poor(rung):
            continue
        passing = first_passing(judge, rungs(with_companions(block, rung)))
        if passing is not None:
            return passing
    return None


def _mlps(
    judge: Judge, stock: Sequence[Pattern], sizes: Sizes, found: Found, *, uneven: bool = False
) -> list[Site]:
    mlps: list[Site] = []
    vocabulary = sizes.find_field("vocab_size")
    open_stock = [pattern for pattern in stock if not set(pattern.axes) & vocabulary]
    for group in find_groups(open_stock, found.used):
        if any(pattern.name in found.used for pattern, _, _ in group.members):
            continue
        for site in permutations(group, sizes, uneven=uneven):
            if not judge.passes([site]):
                continue
            plain = replace(site, slots=tuple(replace(slot, power=1) for slot in site.slots))
            best = next((option for option in scaled(site) if judge.passes([option])), plain)
            if _keep(judge, [best], found, found.inner, "not proven"):
                mlps.append(best)
                found.used |= {slot.tensor for slot in best.slots}
            break
    return mlps


def _keep(judge: Judge, sites: Sequence[Site], found: Found, into: list[Site], reason: str) -> bool:
    """Judge sites on all miniatures; keep those that hold, refuse the others."""
    kept = True
    for site in sites:
        try:
            verdict = judge.judge(site)
        except InputError as error:
            found.refused.append(Refusal(site.name, f"{reason}: {error.what}"))
            kept = False
            continue
        if verdict.holds:
            evidence = {"error": verdict.error, "guard": verdict.guard, "instances": verdict.instances}
            into.append(replace(judge.placed(site), evidence=evidence))
        else:
            found.refused.append(Refusal(site.name, f"{reason}: {verdict.reason}"))
            kept = False
    return kept
