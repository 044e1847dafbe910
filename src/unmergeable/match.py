"""Match a spec against the tensors of a checkpoint: every slot found, every size right, nothing left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from .arithmetic import evaluate_size, lookup
from .depth import counted, gaps, takers
from .errors import Contradiction, InputError
from .fields import of_kind
from .spec import AS_FOUND, Site, Slot, Spec, bound, fill, name_regex
from .whole import in_block, lacking, misshapen, spellings

Shapes = Mapping[str, tuple[int, ...]]
Instance = tuple[int, ...]  # values of a site's name dims, in order


@dataclass(frozen=True)
class Part:
    """One tensor's part in one instance of a site."""

    site: int
    slot: Slot
    dims: Mapping[str, int]  # values of the dims in the tensor's name


@dataclass(frozen=True)
class MatchedSite:
    """A site with its sizes for this checkpoint and the instances that it has.

    Of a site whose layers differ in size there is one for every size.
    """

    site: Site
    sizes: Mapping[str, int]
    instances: tuple[Instance, ...]

    @property
    def acted(self) -> int:
        """Size of the acted dim."""
        return self.sizes[self.site.acts]

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch dims: how many elements an instance has."""
        return tuple(self.sizes[dim] for dim in self.site.batch_dims)

    @property
    def trivial(self) -> bool:
        """Whether there is nothing to choose: one head to a group, say, has one order."""
        return self.acted == 1 and self.site.group == "permutation"

    def label(self, instance: Instance) -> str:
        """The name of one instance, as streams and messages call it."""
        dims = dict(zip(self.site.name_dims, instance, strict=True))
        rest = [f"{dim}={number}" for dim, number in dims.items() if f"{{{dim}}}" not in self.site.name]
        return "|".join([fill_known(self.site.name, dims), *rest])


@dataclass(frozen=True)
class Match:
    """A spec laid over a checkpoint. `parts` names tensors as the checkpoint does."""

    spec: Spec
    sites: tuple[MatchedSite, ...]
    parts: Mapping[str, tuple[Part, ...]]
    prefix: tuple[str, str]  # what the checkpoint's names have instead of the spec's

    def name(self, pattern: str, dims: Mapping[str, int]) -> str:
        """The checkpoint's name for a spec's pattern."""
        return _exchange(fill(pattern, dims), self.prefix)

    def kept_axes(self, name: str) -> tuple[int, ...]:
        """The axes of a tensor that some site gives dims to."""
        return tuple(sorted({axis for part in self.parts[name] for axis in part.slot.axes}))


def fill_known(pattern: str, dims: Mapping[str, int]) -> str:
    """Fill the numbers that are known; a site that spans a dim keeps it as `{l}`."""
    return re.sub(r"\{(\w+)\}", lambda m: str(dims[m.group(1)]) if m.group(1) in dims else m.group(), pattern)


def match_spec(
    spec: Spec, shapes: Shapes, config: Mapping[str, Any], where: str = "checkpoint", *, whole: bool = True
) -> Match:
    """Lay a spec over the tensors of a checkpoint.

    Args:
        spec: the proven sites.
        shapes: every tensor of the checkpoint by name.
        config: the canonical config.
        whole: whether the spec must know every tensor, but for those of another head.

    Raises:
        Contradiction: a shape contradicts the config, or tensors are missing that no other name could stand for.
        InputError: a tensor is left that the spec does not know, or all names are others.
            All misses are named at once.
    """
    prefix = _prefix(spec, shapes) if whole else _any_prefix(spec, shapes)
    own = {name_regex(pattern) for pattern in spec.untouched if not pattern.startswith(spec.prefix)}
    known = {
        name if any(regex.fullmatch(name) for regex in own) else _exchange(name, prefix[::-1]): shape
        for name, shape in shapes.items()
    }
    wrong: list[str] = []
    problems: list[str] = []
    unknown: list[str] = []
    parts: dict[str, list[Part]] = {}
    sites: list[MatchedSite] = []
    for site in spec.sites:
        for some in _by_size(site, known, _chosen(site, config)):
            sites.append(_match_site(len(sites), site, some, known, config, parts, wrong, problems))
    if whole:
        unknown = _leftovers(spec, known, parts)
        problems += gaps(spec, known, config)
        problems += takers(spec, known, config)
        wrong += misshapen(spec, known, parts, config)
        problems += lacking(spec, known, parts, config, bare=bool(prefix[0]))
    # A head of another class reads what leaves the blocks, which no symmetry changes: by itself it may be there.
    inside = [name for name in unknown if in_block(name)]
    unexpected = unknown if wrong or problems else inside
    if (
        problems := wrong
        + problems
        + [f"unexpected {name} of shape {list(known[name])}" for name in unexpected]
    ):
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        # what is missing under one name may be there under another: then the layout is unknown, not the model broken
        kind = Contradiction if wrong or not unknown else InputError
        raise kind(
            "the checkpoint is not what its config says:\n  " + "\n  ".join(shown),
            where=where,
            hint=f"the spec is for {spec.architecture} ({spec.layout} names); "
            "check config.json, or prove a spec of your own with `unmergeable inspect`",
        )
    return Match(
        spec, tuple(sites), {_exchange(name, prefix): tuple(found) for name, found in parts.items()}, prefix
    )


def _chosen(site: Site, config: Mapping[str, Any]) -> dict[str, set[int]]:
    """The numbers that dims in names have where not all are meant."""
    found = {}
    for dim, text in site.only.items():
        path, _, entry = text.partition("=")
        entries = lookup(config, path) if entry else None
        if entry and not isinstance(entries, list):
            what = "the config does not say which layers are of one kind"
            raise InputError(what, where=site.name, expected=f"a list {path}", got=entries)
        found[dim] = (
            {number for number, one in enumerate(entries) if str(one) == entry}
            if entries is not None
            else {int(number) for number in text.split()}
        )
    return found


@dataclass(frozen=True)
class _Some:
    """The instances of a site that have one size, where only tensors know it.

    sizes: by dim. chosen: the numbers that dims in names may have. instances: which they are; None for all of these.
    """

    sizes: Mapping[str, int]
    chosen: Mapping[str, set[int]]
    instances: set[Instance] | None = None

    def has(self, instance: Instance, dims: Mapping[str, int]) -> bool:
        """Whether a tensor with these numbers in its name is of them."""
        meant = all(dims[dim] in numbers for dim, numbers in self.chosen.items())
        return meant and (self.instances is None or instance in self.instances)


def _bound(site: Site, slot: Slot, shapes: Shapes) -> Iterator[tuple[str, dict[str, int], Instance]]:
    """The tensors that a slot's pattern names: name, the numbers in it, and the instance of the site."""
    for name, dims in bound(slot.tensor, shapes):
        yield name, dims, tuple(dims[dim] for dim in site.name_dims)


def _by_size(site: Site, shapes: Shapes, chosen: Mapping[str, set[int]]) -> list[_Some]:
    """The instances of a site by the sizes that only tensors know; all of them at once where there is none."""
    free = [dim for dim, text in site.sizes.items() if text == AS_FOUND]
    if not free:
        return [_Some({}, chosen)]
    found: dict[Instance, dict[str, int]] = {}
    for dim in free:
        slot, axis = site.alone(dim) or (site.slots[0], 0)
        for name, dims, instance in _bound(site, slot, shapes):
            if axis < len(shapes[name]) and _Some({}, chosen).has(instance, dims):
                found.setdefault(instance, {})[dim] = shapes[name][axis]
    groups: dict[tuple[int, ...], set[Instance]] = {}
    for instance, sizes in found.items():
        groups.setdefault(tuple(sizes.get(dim, 1) for dim in free), set()).add(instance)
    none = [_Some(dict.fromkeys(free, 1), chosen)]
    return [
        _Some(dict(zip(free, sizes, strict=True)), chosen, groups[sizes]) for sizes in sorted(groups)
    ] or none


def _match_site(
    number: int,
    site: Site,
    some: _Some,
    shapes: Shapes,
    config: Mapping[str, Any],
    parts: dict[str, list[Part]],
    wrong: list[str],
    problems: list[str],
) -> MatchedSite:
    given = reduce(of_kind, site.only.values(), config)
    sizes = {
        dim: evaluate_size(str(some.sizes.get(dim, text)), given, site.name)
        for dim, text in site.sizes.items()
    }
    found: dict[int, dict[Instance, set[tuple[int, ...]]]] = {}
    for k, slot in enumerate(site.slots):
        others = sorted(slot.name_dims - set(site.name_dims))
        for name, dims, instance in _bound(site, slot, shapes):
            if not some.has(instance, dims):
                continue
            shape = shapes[name]
            found.setdefault(k, {}).setdefault(instance, set()).add(tuple(dims[dim] for dim in others))
            parts.setdefault(name, []).append(Part(number, slot, dims))
            for axis, index in slot.axes.items():
                total = index.view(sizes).total
                got = shape[axis] if axis < len(shape) else None
                if got != total:
                    wrong.append(f"{name}: axis {axis} is '{index.text}' = {total} by the config, got {got}")
    if not found:
        problems.append(f"no tensor of the site {site.name}, as {site.slots[0].tensor}")
        return MatchedSite(site, sizes, ())
    instances = sorted(set().union(*found.values()))
    for k, slot in enumerate(site.slots):
        _check_complete(site, sizes, slot, found.get(k, {}), instances, problems)
    for position, dim in enumerate(site.name_dims):
        if dim in sizes and len({instance[position] for instance in instances}) != sizes[dim]:
            got = len({instance[position] for instance in instances})
            problems.append(f"{site.name}: {sizes[dim]} of '{dim}' by the config, got {got}")
    group_check(site, sizes)
    return MatchedSite(site, sizes, tuple(instances))


def group_check(site: Site, sizes: Mapping[str, int]) -> None:
    """Raise InputError where the site's group does not exist for its size."""
    from .groups import group

    group(site.group).check(sizes[site.acts], site.name)


def _check_complete(
    site: Site,
    sizes: Mapping[str, int],
    slot: Slot,
    found: Mapping[Instance, set[tuple[int, ...]]],
    instances: Iterable[Instance],
    problems: list[str],
) -> None:
    others = sorted(slot.name_dims - set(site.name_dims))
    every = set().union(*found.values()) if found else set()
    for instance in instances:
        have = found.get(instance)
        if have is None:
            dims = dict(zip(site.name_dims, instance, strict=True))
            problems.append(f"missing {fill_known(slot.tensor, dims)}, which {site.name} needs")
            continue
        want = every
        if others == [site.acts]:
            want = {(number,) for number in range(sizes[site.acts])}
        for gone in sorted(want - have):
            dims = dict(zip(site.name_dims, instance, strict=True)) | dict(zip(others, gone, strict=True))
            problems.append(f"missing {fill(slot.tensor, dims)}, which {site.name} needs")
        for extra in sorted(have - want):
            dims = dict(zip(site.name_dims, instance, strict=True)) | dict(zip(others, extra, strict=True))
            problems.append(f"unexpected {fill(slot.tensor, dims)}: {site.name} has {sizes[site.acts]}")


def _leftovers(spec: Spec, shapes: Shapes, parts: Mapping[str, object]) -> list[str]:
    """Names that the spec does not know."""
    known = [name_regex(pattern) for pattern in spec.untouched]
    return [
        name
        for name in counted(spec, shapes)
        if name not in parts and not any(regex.fullmatch(one) for one in spellings(name) for regex in known)
        if not _is_mask(name, shapes[name])
    ]


def _is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is a causal mask, which classes stored with the weights once, and compute and do not read now."""
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return square and name.endswith((".bias", "mask"))


def _prefix(spec: Spec, shapes: Shapes) -> tuple[str, str]:
    """(spec's prefix, checkpoint's): a bare base model is saved without its own name in front."""
    if spec.prefix and not any(name.startswith(spec.prefix) for name in shapes):
        return spec.prefix, ""
    return "", ""


def _any_prefix(spec: Spec, shapes: Shapes) -> tuple[str, str]:
    """As `_prefix`; or the checkpoint's own: of a base model that was given a head since, its name stands in front."""
    slots = [name_regex(slot.tensor) for site in spec.sites for slot in site.slots]

    def known(own: str) -> int:
        bare = (name.removeprefix(own) for name in shapes if name.startswith(own))
        return sum(any(regex.fullmatch(name) for regex in slots) for name in bare)

    usual = _prefix(spec, shapes)
    if usual[0] or known(""):
        return usual
    return "", max({name.partition(".")[0] + "." for name in shapes}, key=known, default="")


def _exchange(name: str, prefix: tuple[str, str]) -> str:
    spec_prefix, own = prefix
    if name.startswith(spec_prefix) and (spec_prefix or own):
        return own + name[len(spec_prefix) :]
    return name
