"""One trial: apply random elements of a conjectured site to the miniatures' stored tensors and ask the oracle.

The trial goes through the same matching and transformation code that locks real checkpoints, on the tensors
that a checkpoint would store; so what is proven is what will be run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..groups import Dense, Element, Monomial, group
from ..match import Instance, Match, match_spec
from ..spec import Site, Spec
from ..transform import apply_floats, compile_tensor
from .oracle import Oracle

TOLERANCE = 1e-9  # relative, in fp64; symmetries measure below 1e-13, everything else above GUARD
GUARD = 1e-6
CONDITION = 3.0
STRETCH = 10  # binary digits: how far scales go that no bound on activations may notice


class RandomStream:
    """Random words for trials, from a seed; the same interface as a key's stream."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def permutation(self, n: int, batch: int | None = None) -> NDArray[np.int64]:
        words = self._rng.random((batch or 1, n))
        # a rotation of a random order has no fixed point: a trial must move everything
        order = np.argsort(words, axis=1)
        out = np.empty_like(order)
        np.put_along_axis(out, order, np.roll(order, 1, axis=1), axis=1)
        return out if batch is not None else out[0]

    def words(self, n: int) -> NDArray[np.uint64]:
        return self._rng.integers(0, 2**64, n, dtype=np.uint64)

    def signs(self, shape: tuple[int, ...]) -> NDArray[np.int8]:
        signs = np.where(self._rng.random(shape) < 0.5, -1, 1).astype(np.int8)
        if signs.size:
            signs.reshape(-1)[0] = -1
        return signs

    def uniform(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return 0.2 + 0.7 * self._rng.random(shape)

    def integers(self, bound: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
        return self._rng.integers(0, bound, shape)


@dataclass(frozen=True)
class Verdict:
    """What the trials of one site measured: the worst error, the weakest guard, how many instances."""

    error: float
    guard: float
    instances: int
    reason: str = ""

    @property
    def holds(self) -> bool:
        return not self.reason


class Judge:
    """Trials of sites on several miniatures of one class.

    Args:
        only: of what sites in the search are, where that is not all layers: see `Site`.
    """

    def __init__(
        self,
        oracles: Sequence[Oracle],
        configs: Sequence[dict[str, Any]],
        only: Mapping[str, str] | None = None,
    ) -> None:
        self.oracles = oracles
        self.configs = configs
        self._only = dict(only or {})
        self._seed = 0

    def of(self, only: Mapping[str, str]) -> Judge:
        """The same for sites of some layers."""
        return Judge(self.oracles, self.configs, only)

    def placed(self, site: Site) -> Site:
        """A site with the layers that it is of."""
        return replace(site, only={**site.only, **self._only})

    def passes(self, sites: Sequence[Site]) -> bool:
        """Whether a random draw leaves the function of every miniature alone, and half of it does not.

        Scales are drawn a second time, so large that a bound on activations shows which small numbers never
        reach. A scale that a norm absorbs passes without being balanced: nothing is hidden in it, so it fails here.
        """
        scaled = any(group(site.group).scales != "none" for site in sites)
        for stretched in (False, True) if scaled else (False,):
            for on in range(len(self.oracles)):
                if not self.error(sites, on, limit=TOLERANCE, stretched=stretched) <= TOLERANCE:
                    return False
        return all(self._unbalanced(site) for site in sites)

    def _unbalanced(self, site: Site) -> bool:
        """Whether one side of the site alone moves the output of some miniature that has something to move."""
        for on in range(len(self.oracles)):
            match = self.match([site], on)
            if not match.sites[0].trivial:
                return self._guard(match, self.draw(match), on) >= GUARD
        return True

    def error(
        self, sites: Sequence[Site], on: int, *, limit: float = float("inf"), stretched: bool = False
    ) -> float:
        """The output's relative change under one draw for all instances of all sites; inf where it fits not."""
        try:
            match = self.match(sites, on)
        except InputError:
            return float("inf")
        elements = self.draw(match, stretched=stretched)
        return self.oracles[on].error(self.edit(match, elements, on), limit=limit)

    def judge(self, site: Site) -> Verdict:
        """Prove a site on every miniature: all instances together, and a guard on every single one.

        The guard applies the element to one side of the site alone, which must move the output: a place that
        the inputs never reach would let anything pass.
        """
        worst, weakest, instances = 0.0, float("inf"), 0
        for on in range(len(self.oracles)):
            match = self.match([site], on)
            for exact in (False, True):
                worst = max(
                    worst, self.oracles[on].error(self.edit(match, self.draw(match, exact=exact), on))
                )
            if not worst <= TOLERANCE:
                return Verdict(worst, 0.0, 0, f"the output moves by {worst:.1e}")
            elements = self.draw(match)
            for number, matched in enumerate(match.sites):
                if matched.trivial:
                    continue
                for instance in matched.instances:
                    whole = elements[number, instance]
                    for position in range(prod(matched.batch)):
                        instances += 1
                        single = {(number, instance): only(whole, position)}
                        weakest = min(weakest, self._guard(match, single, on))
                        if not weakest >= GUARD:
                            where = matched.label(instance)
                            reason = f"an unbalanced change at {where} moves the output by {weakest:.0e} only"
                            return Verdict(worst, weakest, instances, reason)
        if not instances:
            return Verdict(worst, 0.0, 0, "there is only one")
        return Verdict(worst, weakest, instances)

    def _guard(self, match: Match, elements: dict[tuple[int, Instance], Element], on: int) -> float:
        """The weakest of the one-sided changes: each weight alone, while the others stay."""
        site = match.spec.sites[0]
        main = [slot for slot in site.slots if slot.tensor.endswith("weight")] or list(site.slots)
        last = max(main, key=lambda slot: site.slots.index(slot))
        one_sided = replace(site, slots=(last,))
        alone = replace(
            match,
            spec=replace(match.spec, sites=(one_sided,)),
            parts={
                name: tuple(part for part in parts if part.slot is last)
                for name, parts in match.parts.items()
            },
        )
        changes = self.edit(alone, elements, on)
        return self.oracles[on].error(changes) if changes else 0.0

    def match(self, sites: Sequence[Site], on: int) -> Match:
        """Lay sites over one miniature's stored tensors."""
        shapes = {name: tensor.shape for name, tensor in self.oracles[on].tensors.items()}
        spec = Spec("", "", "", (), {}, tuple(map(self.placed, sites)))
        for site in spec.sites:
            site.check()
        return match_spec(spec, shapes, self.configs[on], whole=False)

    def draw(
        self, match: Match, *, exact: bool = False, stretched: bool = False
    ) -> dict[tuple[int, Instance], Element]:
        """A random element for every instance: of the whole group, or of its signed permutations."""
        elements: dict[tuple[int, Instance], Element] = {}
        for number, matched in enumerate(match.sites):
            which = group(matched.site.group)
            for instance in matched.instances:
                self._seed += 1
                stream, batch = RandomStream(self._seed), prod(matched.batch)
                elements[number, instance] = (
                    which.draw_exact(stream, batch, matched.acted)
                    if exact
                    else which.draw_dense(stream, batch, matched.acted, CONDITION)
                )
                if stretched:
                    elements[number, instance] = _stretch(
                        elements[number, instance], which.scales, RandomStream(self._seed)
                    )
        return elements

    def edit(
        self, match: Match, elements: dict[tuple[int, Instance], Element], on: int
    ) -> dict[str, NDArray[np.float64]]:
        """The stored tensors that these elements change."""
        tensors = self.oracles[on].tensors
        changes = {}
        for name in match.parts:
            plan = compile_tensor(match, elements, name)
            if plan.steps or plan.source != name:
                changes[name] = apply_floats(tensors[plan.source], plan.steps)
        return changes


def _stretch(element: Element, scales: str, stream: RandomStream) -> Element:
    """The element times large powers of two, up or down: of every coordinate, of all, or none."""
    if scales == "none":
        return element
    shape = (element.batch, element.n if scales == "each" else 1)
    factors = np.ldexp(1.0, (STRETCH * stream.signs(shape)).astype(np.int32))
    if isinstance(element, Dense):
        return Dense(element.forward * factors[..., None], element.contragredient / factors[..., None])
    return Monomial(element.perm, element.scale * factors)


def only(element: Element, position: int) -> Element:
    """The element at one position of the batch, the identity at all others; never the identity everywhere."""
    if isinstance(element, Dense):
        eye = np.broadcast_to(np.eye(element.n), element.forward.shape).copy()
        forward, contragredient = eye.copy(), eye
        forward[position], contragredient[position] = (
            element.forward[position],
            element.contragredient[position],
        )
        return Dense(forward, contragredient)
    perm = np.broadcast_to(np.arange(element.n), element.perm.shape).copy()
    scale = np.ones_like(element.scale)
    perm[position], scale[position] = element.perm[position], element.scale[position]
    if np.array_equal(perm[position], np.arange(element.n)) and np.all(scale[position] == 1.0):
        scale[position] = -1.0  # this one was drawn as the identity, which would move nothing
    return Monomial(perm, scale)


def first_passing(judge: Judge, ladder: Iterable[tuple[Site, ...]]) -> tuple[Site, ...] | None:
    """The first rung whose sites pass together on every miniature."""
    return next((rung for rung in ladder if judge.passes(rung)), None)
