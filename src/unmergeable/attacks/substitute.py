"""Substitution: parts of the base in the place of the protected model's own.

Controls for every other attack (whatever the base's own attention or MLP gives, no alignment was needed for),
and the pieces of block substitution: what the base gives back where a lock or a trap sits, at the price of what
the fine-tune learned there. Parts are found through the spec: tensors of query-key, value-output and head sites
are attention, those of MLP and expert sites are MLP, and a weight's bias goes with it. A block is everything
whose name has its number: norms too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import InputError, UsageError
from ..groups import Floats
from ..match import Match
from . import Case, Declared, Outcome, no_options

PARTS = {"attention": ("qk", "vo", "heads"), "mlp": ("mlp", "experts")}


def part_tensors(match: Match, part: str, names: Sequence[str]) -> set[str]:
    """The tensors of one of `PARTS`, weights with their biases."""
    kinds = PARTS[part]
    found = {
        name
        for name, parts in match.parts.items()
        if any(match.sites[p.site].site.kind in kinds for p in parts)
    }
    stems = {name.rpartition(".")[0] for name in found if name.endswith((".weight", ".bias"))}
    return found | {f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias")} & set(names)


def block_numbers(match: Match, names: Sequence[str]) -> dict[str, int]:
    """The block that each tensor belongs to, by its name; tensors outside of all blocks are left out."""
    patterns = {slot.tensor for site in match.spec.sites for slot in site.slots if "{" in slot.tensor}
    stacks = {match.name(pattern[: pattern.index("{")], {}) for pattern in patterns}
    found = {}
    for name in names:
        for stack in stacks:
            if number := re.match(re.escape(stack) + r"(\d+)(?:\.|$)", name):
                found[name] = int(number.group(1))
    return found


def search_space(match: Match, names: Sequence[str]) -> list[dict[str, Any]]:
    """Options of substitute-blocks to try: the first and the last k blocks, single ones, whole or by part."""
    count = max(block_numbers(match, names).values(), default=-1) + 1
    everything = tuple(range(count))
    cuts: list[tuple[int, ...]] = [everything[:k] for k in range(1, count)] + [
        everything[k:] for k in range(1, count)
    ]
    chosen = list(dict.fromkeys([*cuts, *((k,) for k in everything)]))
    return [{"blocks": blocks, "part": part} for part in (None, *PARTS) for blocks in chosen]


def _run(case: Case, wanted: set[str], facts: Mapping[str, Any]) -> Outcome:
    if case.anchor is None:
        raise UsageError("the attack needs the base", hint="give --base")
    base = case.anchor
    for name in sorted(wanted):
        if name not in base:
            raise InputError(
                "the base lacks a tensor", where=name, hint="give a model of the same architecture"
            )

    def made(name: str) -> Floats | None:
        if name not in wanted:
            return None
        own, other = case.target[name], base[name]
        if own.shape != other.shape:
            raise InputError(
                "the base has another shape here", where=name, expected=list(own.shape), got=list(other.shape)
            )
        return other

    return Outcome(replace=made, facts={**facts, "tensors": len(wanted)})


def run_part(part: str, case: Case, **options: Any) -> Outcome:
    """The base's attention, or its MLP, in all blocks."""
    no_options(f"substitute-{part}", options)
    return _run(case, part_tensors(case.match, part, list(case.target)), {"part": part})


def run_blocks(
    case: Case, *, blocks: Sequence[int] | None = None, part: str | None = None, **options: Any
) -> Outcome:
    """Whole blocks of the base, or one of `PARTS` of them; by default the last half of all blocks.

    Raises:
        UsageError: no such block or part.
    """
    no_options("substitute-blocks", options, ("blocks", "part"))
    names = list(case.target)
    numbers = block_numbers(case.match, names)
    count = max(numbers.values(), default=-1) + 1
    chosen = sorted(set(range(count // 2, count) if blocks is None else blocks))
    if not chosen or not set(chosen) <= set(range(count)):
        raise UsageError("no such blocks", expected=f"some of 0 to {count - 1}", got=chosen)
    if part is not None and part not in PARTS:
        raise UsageError("no such part of a block", expected=" | ".join(PARTS), got=part)
    wanted = {name for name, number in numbers.items() if number in chosen}
    if part is not None:
        wanted &= part_tensors(case.match, part, names)
    return _run(case, wanted, {"blocks": chosen, "part": part})


def _declared(about: str, run: Any) -> Declared:
    return Declared(about, ("base",), 1, "copying", keeps_function=False, run=run)


ATTENTION = _declared("the base's attention in all blocks", partial(run_part, "attention"))
MLP = _declared("the base's MLPs in all blocks", partial(run_part, "mlp"))
BLOCKS = _declared("whole blocks of the base", run_blocks)
