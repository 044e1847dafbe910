"""Jobs: which attack runs on which side, in an order in which what is most informative comes first.

Jobs come in waves. A wave may depend on the rows of the waves before it: chains are followed up by beam, from
the preparations that helped and the merges that did best on the unprotected model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..attacks.blocks import Blocks
from ..attacks.merges import PROBE_MERGE, Method
from ..attacks.merges import Coefficients as Grid
from ..attacks.prepare import COLLUSIONS, PREPARATIONS, THEN, one_by_one
from ..attacks.repair import Repair
from .finalists import finalists
from .rows import SIDES, Look, Row, Side
from .scores import Reference
from .suite import BEAM, CORE, FIRST, FOLLOW, STANDS_ON, merge_attack, merge_attacks

PROOF = "proof"
# What a preparation must add to Σ over the floors of the best value before it is followed up.
HELPS = 0.02
# Alignments, and of the distance to the base the part that one must leave at most to be followed in any case.
ANCHORED, NEARER = ("anchor-coupled", "anchor-coupled-other"), 0.8
# Preparations that undo nothing and change a model a little, and all that do not keep its function.
CHANGES = frozenset(one.name for one in PREPARATIONS if one.change is not None)
LOSSY = frozenset(one.name for one in PREPARATIONS if not one.keeps_function)
# Of the time that a budget leaves, what merges of level 0 may take before the best of them are followed up: a merge
# that works without a lock and was not tried aligned would pass for protection.
SHELF_SHARE = 0.6


@dataclass(frozen=True)
class Start:
    """A merge to begin a repair with: how to make it. `options` is JSON."""

    attack: str
    prepared: str | None
    options: str

    @classmethod
    def of(cls, attack: str, prepared: str | None, options: Mapping[str, Any]) -> Start:
        """A start that can be compared and hashed."""
        return cls(attack, prepared, json.dumps(options, sort_keys=True))

    def as_dict(self) -> dict[str, Any]:
        """For people and for JSON."""
        return {"attack": self.attack, "prepared": self.prepared, "options": json.loads(self.options)}


@dataclass(frozen=True)
class Job:
    """One row to be found: an attack on a side, or the known case of a preparation (attack PROOF)."""

    attack: str
    side: Side
    prepared: str | None = None
    starts: tuple[Start, ...] = ()

    @property
    def level(self) -> int:
        """Of access."""
        own = 1 if self.attack == PROOF else merge_attack(self.attack).access
        return max(own, 0 if self.prepared is None else 1)

    @property
    def label(self) -> str:
        """For people."""
        return f"{THEN.join([*one_by_one(self.prepared), self.attack])}, {self.side}"

    def as_dict(self) -> dict[str, Any]:
        """For the key of its row."""
        return asdict(self)


Found = Mapping[Job, Row]


class Waves:
    """The jobs of an audit.

    Args:
        top: the highest level of access.
        only: attacks and preparations to run, all if None.
        releases: whether there are further releases of the protected model.
        reference: what values are relative to, for choices between waves.
    """

    def __init__(self, top: int, only: Sequence[str] | None, releases: bool, reference: Reference) -> None:
        self.top, self.only, self.reference = top, None if only is None else set(only), reference
        self.preparations = [one.name for one in PREPARATIONS] + list(COLLUSIONS if releases else ())
        self.preparations = [name for name in self.preparations if self._wanted(name)]
        self.shelf = [a.name for a in merge_attacks().values() if a.access == 0 and a is not PROBE_MERGE]
        self.shelf = [name for name in self.shelf if self._wanted(name)]

    def _wanted(self, name: str) -> bool:
        return self.only is None or name in self.only

    def __iter__(self) -> Iterator[Any]:
        """Waves, each a function of the rows so far that gives jobs."""
        yield self._core
        if self.top >= 1:
            yield self._probes
            yield self._followed_first
            yield self._adaptive
        yield self._shelf
        if self.top >= 1:
            yield self.follow
            yield self.matched
        taught = range(2, self.top + 1)
        for first in (True, False):
            for level in taught:
                yield partial(self._taught, level=level, first=first)

    def share(self, wave: Any) -> float:
        """The part of the time left that a wave may take; what it does not get to may be done after all waves."""
        return SHELF_SHARE if wave == self._shelf and self.top >= 1 else 1.0

    def estimate(self) -> int:
        """About how many jobs there will be."""
        known = len(self._core({})) + len(self._shelf({}))
        if self.top >= 1:
            follow = BEAM * len(CORE) + (BEAM - 1) * len(CORE) + FOLLOW
            known += len(self._probes({})) + min(follow, len(self.shelf)) + len(self._adaptive({}))
        taught = (
            len(self._taught({}, level, one)) for level in range(2, self.top + 1) for one in (True, False)
        )
        return known + sum(taught)

    # --- waves -----------------------------------------------------------------------------------------------

    def _sides(self, name: str) -> tuple[Side, ...]:
        return SIDES if merge_attack(name).alone else ("protected", "plain")

    def _core(self, found: Found) -> list[Job]:
        chosen = [name for name in self.shelf if name in CORE]
        return [Job(name, side) for name in chosen for side in self._sides(name)]

    def _shelf(self, found: Found) -> list[Job]:
        chosen = [name for name in self.shelf if name not in CORE]
        return [Job(name, side) for name in chosen for side in self._sides(name)]

    def _probes(self, found: Found) -> list[Job]:
        if not self.preparations:
            return []
        sides: tuple[Side, ...] = ("protected", "plain")
        jobs = [Job(PROBE_MERGE.name, side) for side in sides]
        for name in self.preparations:
            if any(one.name == name and one.solves for one in PREPARATIONS):
                jobs.append(Job(PROOF, "plain", name))
            jobs += [Job(PROBE_MERGE.name, side, name) for side in sides]
        return jobs

    def _followed_first(self, found: Found) -> list[Job]:
        """The first merges of level 0 again, after each preparation of the beam.

        Where the attack that level 1 stands on is not among them there may be nothing to undo. That has to be seen of
        more than a probe, which may fail on the unprotected model as well: by the merge that level 0 stands on.
        """
        chosen, beam = [name for name in self.shelf if name in CORE], self.beam(found, "protected")
        jobs = [Job(name, "protected", prepared) for prepared in beam for name in chosen]
        if STANDS_ON[1] in self.preparations and STANDS_ON[0] in chosen and STANDS_ON[1] not in beam:
            jobs.append(Job(STANDS_ON[0], "protected", STANDS_ON[1]))
        return jobs

    def follow(self, found: Found) -> list[Job]:
        """The merges of level 0 that do best on the unprotected model, after the best preparation."""
        best = sorted(
            (name for name in self.shelf if name not in CORE and Job(name, "plain") in found),
            key=lambda name: -self.reference.worth(found.get(Job(name, "plain"))),
        )
        beam = self.beam(found, "protected")[:1]
        return [Job(name, "protected", prepared) for prepared in beam for name in best[:FOLLOW]]

    def matched(self, found: Found) -> list[Job]:
        """What did best on the unprotected model, as it is or after something was done to it, on the protected one.

        After what undoes its lock: a thief who has done so has what one of the unprotected model begins with. Without
        these he would have fewer tries, which would pass for protection.
        """
        undone = [name for name in self.beam(found, "protected")[:1] if name not in LOSSY]
        # What is in memory alone can be changed there, and not be attacked as a checkpoint.
        able = CHANGES if set(undone) & set(COLLUSIONS) else LOSSY
        known = [
            (job, Look(point.options, *self.reference.pair("validation", point.validation)))
            for job, row in found.items()
            if job.side == "plain" and job.level <= 1
            for point in row.points
        ]
        best = finalists([look for _, look in known], self.reference.floors, least=1)
        jobs = dict.fromkeys(known[number][0] for number in best)
        return [
            Job(job.attack, "protected", THEN.join(filter(None, [*undone, job.prepared])))
            for job in jobs
            if job.prepared in able or (undone and job.prepared is None)
        ]

    def _adaptive(self, found: Found) -> list[Job]:
        """Searches of level 1: on the model as it is, and after the best preparation where that matters."""
        jobs = []
        for name in ("substitute-blocks", "wide"):
            if self._wanted(name):
                for side in self._sides(name):
                    jobs += [Job(name, side, one) for one in (None, *self.beam(found, side)[:1])]
        return jobs

    def _taught(self, found: Found, level: int, first: bool) -> list[Job]:
        """Attacks with data of a level, its first ones or the rest.

        Repairs are of the best merges so far that can be made again at once; distillation sees the model's answers
        alone; all else is on the model that merges best so far.
        """
        jobs = []
        for name, attack in merge_attacks().items():
            if attack.access != level or (name in FIRST[level]) != first or not self._wanted(name):
                continue
            for side in self._sides(name):
                if isinstance(attack, Repair):
                    jobs.append(Job(name, side, starts=self._starts(found, side)))
                else:
                    whole = None if name.startswith("distil") else self._whole(found, side)
                    jobs.append(Job(name, side, whole))
        return jobs

    # --- choices ---------------------------------------------------------------------------------------------

    def beam(self, found: Found, side: Side) -> list[str]:
        """The preparations to follow on a side: an alignment that brought the model much nearer to the base, then what
        helped, the best first.

        The alignment whether it helped or not: merges of a hardened model fail aligned as well, but what is learnt from
        data, or taken block by block, is to be had in its own coordinates. And before all that damages the model, which
        may help more by the few merges of a probe. Of the unprotected model nothing has to be undone: what is done to
        it would be more tries, and no more.
        """
        if side != "protected":
            return []
        raw = self.reference.worth(found.get(Job(PROBE_MERGE.name, side)))
        gains = {
            name: self.reference.worth(found.get(Job(PROBE_MERGE.name, side, name))) - raw
            for name in self.preparations
        }
        helped = [name for name in self.preparations if gains[name] > HELPS]
        nearer = [name for name in ANCHORED if name in self.preparations and self._nearer(found, side, name)]
        return list(dict.fromkeys([*nearer[:1], *sorted(helped, key=lambda name: -gains[name])]))[:BEAM]

    def _nearer(self, found: Found, side: Side, prepared: str) -> bool:
        """Whether a preparation left little of the protected model's distance to the base."""
        before, after = (found.get(Job(PROBE_MERGE.name, side, name)) for name in (None, prepared))
        for key in ("distance", "moved"):  # rows that were found earlier know how far the merge is alone
            far, near = (None if row is None else row.facts.get(key) for row in (before, after))
            if far is not None and near is not None:
                return bool(near < NEARER * far)
        return False

    def _whole(self, found: Found, side: Side) -> str | None:
        """What to do to a model before anything is learnt from data: nothing that damages it."""
        return next((name for name in self.beam(found, side) if name not in LOSSY), None)

    def _starts(self, found: Found, side: Side) -> tuple[Start, ...]:
        """The best merge, the best with a quarter of the thief's own, and a plain mean of task vectors."""
        known: list[tuple[float, float, Start]] = []
        for job, row in found.items():
            if job.side == side and job.attack != PROOF and _quick(job.attack):
                for point in row.points:
                    pair = self.reference.pair("validation", point.validation)
                    known.append((*pair, Start.of(job.attack, job.prepared, point.options)))
        starts = [max(known, key=lambda one: min(one[:2]))[2]] if known else []
        within = [one for one in known if one[1] >= self.reference.floors[1]]
        if within:
            starts.append(max(within, key=lambda one: one[0])[2])
        half = {"others": 0.5} if side == "without" else {"dose": 0.5, "others": 0.5}
        starts.append(Start.of("task_arithmetic", self._whole(found, side), half))
        return tuple(dict.fromkeys(starts))


def _quick(name: str) -> bool:
    """Whether a merge of this attack can be made again without training."""
    return isinstance(merge_attack(name), Grid | Method | Blocks)
