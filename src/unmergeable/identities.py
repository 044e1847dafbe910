"""Per-site identities: whether two checkpoints are the same function, from sketches of their tensors alone.

Tensors and sites hang together in components. Of each, every site's invariants are computed for both checkpoints.
What is left is the order of MLP rows, heads, groups and experts: found once for all tables that share it, outermost
first, by signatures that no inner order changes; then the tables must agree cell by cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .grids import Grid, grids
from .groups import Floats
from .invariants import PERMUTING, Cells, invariants
from .match import Instance, Match, MatchedSite
from .ordering import find_order, reorder
from .rounding import EXACT_BOUND, Finding, Judged, errors, errors_of_zeros, limits, worst_of
from .sketch import Noise, Sketch
from .spec import Slot


@dataclass(frozen=True)
class Table:
    """Invariants of one site, or rows that no site acts on (`strict`: nothing may change them)."""

    site: int
    cells: Cells
    tensors: frozenset[str]
    strict: bool = False


def components(match: Match) -> list[Component]:
    """The connected parts of a match, in reading order of their tensors."""
    parent: dict[object, object] = {}

    def root(node: object) -> object:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for name, parts in match.parts.items():
        for part in parts:
            dims = match.sites[part.site].site.name_dims
            parent[root((part.site, tuple(part.dims[dim] for dim in dims)))] = root(name)
    found: dict[object, list[str]] = {}
    for name in sorted(match.parts, key=natural):
        found.setdefault(root(name), []).append(name)
    return [Component(match, tuple(names)) for names in found.values()]


def natural(name: str) -> list[tuple[int, str]]:
    """A sorting key that reads numbers as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Component:
    """Sites and tensors that hang together."""

    match: Match
    names: tuple[str, ...]

    @cached_property
    def sites(self) -> dict[int, list[Instance]]:
        """Instances by number of the site, in the order of the spec."""
        found: dict[int, set[Instance]] = {}
        for name in self.names:
            for part in self.match.parts[name]:
                dims = self.match.sites[part.site].site.name_dims
                found.setdefault(part.site, set()).add(tuple(part.dims[dim] for dim in dims))
        return {number: sorted(found[number]) for number in sorted(found)}

    @cached_property
    def views(self) -> dict[int, list[Grid]]:
        """The slots of every site, each with its tensors."""
        return {number: grids(self.match, number, self.names) for number in self.sites}

    @cached_property
    def permuters(self) -> list[int]:
        """Sites that change the order of their acted dim, inner first."""
        return [number for number in self.sites if self.match.sites[number].site.group in PERMUTING]

    def tensors(self, number: int) -> frozenset[str]:
        """All tensors of a site."""
        return frozenset(name for view in self.views[number] for name in view.names)

    # --- tables ---------------------------------------------------------------------------------------------

    @cached_property
    def _fresh(self) -> tuple[dict[tuple[int, str, int], NDArray[np.bool_]], dict[str, NDArray[np.bool_]]]:
        """Which cells of a tensor a slot is the first to act on, and which cells of it no slot acts on."""
        covered: dict[str, NDArray[np.bool_]] = {}
        fresh: dict[tuple[int, str, int], NDArray[np.bool_]] = {}
        for number, views in self.views.items():
            matched = self.match.sites[number]
            added: list[tuple[str, NDArray[np.bool_]]] = []
            for k, view in enumerate(views):
                for name in view.names:
                    mask = self._mask(matched, view.slot, name)
                    before = covered.setdefault(name, np.zeros(mask.shape, dtype=bool))
                    fresh[number, name, k] = mask & ~before
                    if matched.site.group != "permutation" and bool((mask & before).any()):
                        raise InputError(
                            "two sites act on the same rows, which no identity here covers",
                            where=f"{matched.site.name}: {name}",
                        )
                    added.append((name, mask))
            for name, mask in added:
                covered[name] = covered[name] | mask
        return fresh, {name: ~mask for name, mask in covered.items()}

    def _mask(self, matched: MatchedSite, slot: Slot, name: str) -> NDArray[np.bool_]:
        axes = self.match.kept_axes(name)
        totals = [self._total(name, axis) for axis in axes]
        mask = np.zeros(totals, dtype=bool)
        chosen = [
            slot.axes[axis].view(matched.sizes).positions().reshape(-1)
            if axis in slot.axes
            else np.arange(total)
            for axis, total in zip(axes, totals, strict=True)
        ]
        mask[np.ix_(*chosen)] = True
        return mask

    def _total(self, name: str, axis: int) -> int:
        for part in self.match.parts[name]:
            if axis in part.slot.axes:
                return part.slot.axes[axis].view(self.match.sites[part.site].sizes).total
        raise AssertionError(f"{name} has no site on axis {axis}")

    def tables(self, sketches: Mapping[str, Sketch]) -> list[Table]:
        """The invariants of all sites, from the sketches of this component's tensors.

        Raises:
            InputError: a spec whose sites no identity covers.
        """
        fresh, untouched = self._fresh
        tables: list[Table] = []
        for number, views in self.views.items():
            matched = self.match.sites[number]
            site = matched.site
            slots: list[tuple[int, Cells, frozenset[str]]] = []
            for k, view in enumerate(views):
                masks = [fresh[number, name, k] for name in view.names]
                if site.group == "permutation" and not any(mask.any() for mask in masks):
                    continue
                cells = self._cells(matched, view, sketches, masks)
                slots.append((view.slot.power, cells, frozenset(view.names)))
            if site.group == "permutation":
                tables += [Table(number, cells, names) for _, cells, names in slots]
                continue
            every = frozenset().union(*(names for _, _, names in slots))
            found = invariants(
                site.group, site.acts, [(power, cells) for power, cells, _ in slots], site.name
            )
            tables += [Table(number, cells, every) for cells in found]
        for name, mask in untouched.items():
            if mask.any():
                sketch = sketches[name]
                dims = tuple(f"axis {axis}" for axis in sketch.axes)
                cells = Cells(dims, sketch.values * mask[..., None], sketch.sizes * mask)
                tables.append(Table(self.match.parts[name][0].site, cells, frozenset((name,)), strict=True))
        return tables

    def _cells(
        self,
        matched: MatchedSite,
        view: Grid,
        sketches: Mapping[str, Sketch],
        masks: Sequence[NDArray[np.bool_]],
    ) -> Cells:
        values, norms = [], []
        dims: tuple[str, ...] = ()
        for name, mask in zip(view.names, masks, strict=True):
            sketch = sketches[name]
            size, all_values = sketch.sizes, sketch.values
            if not mask.all():
                # rows of other slots fall away below, rows that an inner site accounts for become zero
                size, all_values = size * mask, all_values * mask[..., None]
            dims, picked = self._pick(matched, view.slot, name, sketch.axes, all_values)
            values.append(picked)
            norms.append(self._pick(matched, view.slot, name, sketch.axes, size)[1])
        lead = tuple(len(value) for value in view.values)
        stacked = np.stack(values).reshape(*lead, *values[0].shape)
        return Cells((*view.dims, *dims), stacked, np.stack(norms).reshape(*lead, *norms[0].shape))

    def _pick(
        self, matched: MatchedSite, slot: Slot, name: str, axes: tuple[int, ...], array: Floats
    ) -> tuple[tuple[str, ...], Floats]:
        """The slot's part of a tensor's sketch, one array axis a dim."""
        dims: tuple[str, ...] = ()
        for at in reversed(range(len(axes))):
            names, sizes, positions = self._axis(matched, slot, name, axes[at])
            if positions is not None:
                array = np.take(array, positions, axis=at)
            array = array.reshape(*array.shape[:at], *sizes, *array.shape[at + 1 :])
            dims = names + dims
        return dims, array

    def _axis(
        self, matched: MatchedSite, slot: Slot, name: str, axis: int
    ) -> tuple[tuple[str, ...], tuple[int, ...], NDArray[np.int64] | None]:
        if axis in slot.axes:
            view = slot.axes[axis].view(matched.sizes)
            return view.names, tuple(size for _, size, _ in view.dims), view.positions().reshape(-1)
        total = self._total(name, axis)
        for part in self.match.parts[name]:  # another site's name for the whole of this axis
            if axis in part.slot.axes:
                view = part.slot.axes[axis].view(self.match.sites[part.site].sizes)
                sizes = tuple(size for _, size, _ in view.dims)
                if prod(sizes) == total and np.array_equal(view.positions().reshape(-1), np.arange(total)):
                    return view.names, sizes, None
        return (f"axis {axis}",), (total,), None

    # --- comparison -----------------------------------------------------------------------------------------

    def compare(
        self,
        before: Mapping[str, Sketch],
        after: Mapping[str, Sketch],
        noise: Mapping[str, Noise] | None = None,
        seed: int = 0,
    ) -> list[Finding]:
        """Compare two checkpoints at every site of this component.

        Args:
            before, after: sketches of this component's tensors.
            noise: the rounding of each tensor's dtype: errors may be four times what it does. None for exact
                locks, whose errors are at most 1e-10.
            seed: of the noise.

        Returns: one finding a site, in the order of the spec.

        Raises:
            InputError: a spec whose sites no identity covers.
        """
        source, target = self.tables(before), self.tables(after)
        judged = [Judged(table.cells, table.site, table.strict) for table in source]
        bounds = [np.full(one.cells.norms.shape, EXACT_BOUND) for one in judged]
        steps: list[Floats] | None = None
        if noise is not None:
            bounds, steps = limits(
                judged,
                lambda shaken: [table.cells for table in self.tables(shaken)],
                {name: before[name] for name in self.names},
                noise,
                seed,
            )
        # Every order is as good a proof as any other. Where the one that all tables find together fails, what was
        # changed at one site may have led it astray: then that of a single site fails at fewer.
        best: list[Finding] | None = None
        for guide in chain((None,), self._guides(source)):
            aligned = self._align(source, target, guide)
            apart = [errors(one.cells, moved) for one, moved in zip(judged, aligned, strict=True)]
            if steps is not None:
                apart = [
                    errors_of_zeros(found, one.cells, moved, step)
                    for found, one, moved, step in zip(apart, judged, aligned, steps, strict=True)
                ]
            found = self._findings(source, apart, bounds)
            if best is None or _failures(found) < _failures(best):
                best = found
            if not _failures(best):
                break
        assert best is not None
        return best

    def _findings(
        self, source: Sequence[Table], apart: Sequence[Floats], bounds: Sequence[Floats]
    ) -> list[Finding]:
        findings = {}
        for number in self.sites:
            own = [k for k, table in enumerate(source) if table.site == number]
            # a site that only orders others' rows is judged by the tables that it orders
            chosen = own or [k for k, table in enumerate(source) if self._orders(number, table)]
            found = [self._finding(number, source[k], apart[k], bounds[k]) for k in chosen]
            failed = [finding for finding in found if not finding.held]
            if failed:
                findings[number] = failed[0]
            elif found:
                findings[number] = max(found, key=lambda finding: finding.measured / finding.bound)
        return list(findings.values())

    def _finding(self, number: int, table: Table, apart: Floats, bounds: Floats) -> Finding:
        if not apart.size:
            return Finding(number, self._label(number, table, ()), 0.0, EXACT_BOUND)
        at, worst, bound = worst_of(apart.reshape(-1), bounds.reshape(-1))
        place = tuple(int(k) for k in np.unravel_index(at, apart.shape)) if apart.ndim else ()
        return Finding(number, self._label(number, table, place), worst, bound)

    def _label(self, number: int, table: Table, place: tuple[int, ...]) -> str:
        """The instance's name and the further dims of a cell, in brackets."""
        matched = self.match.sites[number]
        if table.strict:
            where = ", ".join(f"{dim} = {k}" for dim, k in zip(table.cells.dims, place, strict=False))
            return f"{min(table.tensors, key=natural)} [{where}]"
        numbers = dict(zip(table.cells.dims, place, strict=False))
        for view in self.views[table.site]:
            for dim, values in zip(view.dims, view.values, strict=True):
                if dim in numbers:
                    numbers[dim] = values[numbers[dim]] if numbers[dim] < len(values) else numbers[dim]
        named = matched.site.name_dims
        first = self.sites[number][0]
        instance = tuple(numbers.get(dim, first[k]) for k, dim in enumerate(named))
        shown = matched.label(instance)
        rest = [f"{dim} = {k}" for dim, k in numbers.items() if f"{{{dim}}}" not in matched.site.name]
        return f"{shown} [{', '.join(rest)}]" if rest else shown

    def _orders(self, number: int, table: Table) -> bool:
        site = self.match.sites[number].site
        return (
            site.group in PERMUTING
            and not table.strict
            and site.acts in table.cells.dims
            and (table.site == number or bool(self.tensors(number) & table.tensors))
        )

    def _guides(self, source: Sequence[Table]) -> Iterator[int]:
        """Sites whose tables alone give an order that others' tables are in as well."""
        for number in self.sites:
            orders = ([one.site for one in source if self._orders(other, one)] for other in self.permuters)
            if any(0 < owners.count(number) < len(owners) for owners in orders):
                yield number

    def _align(
        self, source: Sequence[Table], target: Sequence[Table], guide: int | None = None
    ) -> list[Cells]:
        """The target's tables with heads, experts and rows in the order of the source's.

        By the tables of one site where it has any that a permuting site orders, if `guide` names it.
        """
        out = [table.cells for table in target]
        for position in reversed(range(len(self.permuters))):
            number = self.permuters[position]
            site = self.match.sites[number].site
            moved = [k for k, table in enumerate(source) if self._orders(number, table)]
            for k in moved:
                missing = set(site.per) - set(source[k].cells.dims)
                if missing:
                    raise InputError(
                        f"the dims {', '.join(sorted(missing))} are not those of the sites inside it",
                        where=site.name,
                    )
            if not moved:
                continue
            seen = [k for k in moved if source[k].site == guide]
            pairs = []
            for k in seen or moved:
                inner = [
                    self.match.sites[other].site.acts
                    for other in self.permuters[:position]
                    if self._orders(other, source[k])
                ]
                pairs.append((source[k].cells, out[k], inner))
            perm = find_order(pairs, site.per, site.acts)
            for k in moved:
                out[k] = reorder(out[k], site.per, site.acts, perm)
        return out


def _failures(findings: Sequence[Finding]) -> int:
    return sum(not finding.held for finding in findings)
