"""Checks that doubt the audit itself: attacks that must work on a known case, levels that stand on them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..attacks.prepare import PREPARATIONS
from .jobs import PROOF, Job
from .results import Requirement
from .rows import Row, Side
from .scores import Level, Reference
from .suite import STANDS_ON

# An unprotected merge must reach this worse of both values before a merge method's failure says anything.
WORKS = 0.1
# Preparations with a known case.
PROVEN = frozenset(one.name for one in PREPARATIONS if one.solves)


def controlled(rows: list[Row], reference: Reference) -> list[Row]:
    """Rows with what is known of their attacks: a control that failed, a known case that was not solved."""
    control: dict[str, float] = {}
    proofs: dict[str, Row] = {}
    for row in rows:
        if row.chain[-1] == PROOF:
            proofs[row.chain[0]] = row
        elif row.side == "plain" and row.points:
            best = max(min(reference.pair("validation", point.validation)) for point in row.points)
            control[row.chain[-1]] = max(best, control.get(row.chain[-1], -np.inf))
    needed = min(WORKS, max(control.values(), default=0.0) / 2)
    checked = []
    for row in rows:
        reasons = [row.reason] if row.reason else []
        if row.state == "done" and row.points and row.side != "without":
            reached = control.get(row.chain[-1], -np.inf)
            if reached < needed:
                got = "nothing" if reached == -np.inf else f"{reached:.2f}"
                reasons.append(
                    f"merges of the unprotected model reach {got} of both tasks, where {needed:.2f} shows that "
                    "the attack works at all"
                )
            for name in row.chain[:-1]:
                if why := _unproven(name, proofs.get(name)):
                    reasons.append(f"{name}: {why}")
            if reasons:
                row = replace(row, state="unreliable", reason="; ".join(reasons))
        checked.append(row)
    return checked


def _unproven(name: str, proof: Row | None) -> str | None:
    """Why a preparation is not believed; None if it has solved its known case, or there is none for the models."""
    if proof is None:
        return "its known case was not run" if name in PROVEN else None
    return proof.reason if proof.state in ("unreliable", "failed") else None


def doubt(rows: Sequence[Row], level: int, only: Collection[str] | None) -> str | None:
    """Why a level's figures say nothing: an attack that it stands on is missing or unreliable.

    Where `only` some attacks were to be run, and this one not, a level stands on any attack of its own.
    """
    tried = [row for row in rows if row.side == "protected" and row.chain[-1] != PROOF]
    for below in range(level + 1):
        of_level = [row for row in tried if row.level == below]
        name = STANDS_ON.get(below)
        if only is not None and name not in only:
            name = None
            if not of_level and below < level:
                continue  # it was not asked for
        mine = of_level if name is None else [row for row in of_level if name in row.chain]
        if any(row.state == "done" for row in mine):
            if only is None and below > max(STANDS_ON) and (why := _refused(of_level)):
                return f"of level {below}, {why}"
            continue
        what = name or f"every attack at level {below}"
        if not mine:
            return f"{name or 'an attack of its own'} was not run, and level {below} stands on it"
        reason = next((row.reason for row in mine if row.reason), "no reason given")
        return f"{what} is {mine[0].state}, and level {below} stands on it: {reason}"
    return None


def _refused(rows: Sequence[Row]) -> str | None:
    """Whether most of a level's attacks were refused, for want of data perhaps: what is left says little."""
    tried = {row.chain[-1] for row in rows if row.state != "refused"}
    refused = {row.chain[-1]: row.reason for row in rows if row.chain[-1] not in tried}
    if len(refused) <= len(tried):
        return None
    name, reason = next(iter(refused.items()))
    return f"{len(refused)} of {len(refused) + len(tried)} attacks were refused, {name} for one: {reason}"


def grounds(rows: Sequence[Row], reference: Reference, level: int) -> tuple[int, ...]:
    """Rows that a level's figure stands on, by their place: on each level up to it the best one that is believed.

    Where a level stands on an attack of its own, the best one with it.
    """
    found = []
    for below in range(level + 1):
        done = {
            number: max(min(reference.pair("validation", point.validation)) for point in row.points)
            for number, row in enumerate(rows)
            if row.side == "protected" and row.level == below and row.state == "done" and row.points
        }
        named = [number for number in done if STANDS_ON.get(below) in rows[number].chain]
        if done:
            found.append(max(named or done, key=lambda number: done[number]))
    return tuple(found)


def required(
    levels: Sequence[Level], level: int, protection: float, left_out: Sequence[Job] = ()
) -> Requirement:
    """Whether a level's lower limit reaches what was asked for; an attack that was not tried might take it."""
    found = next(one for one in levels if one.level == level)
    unknown = found.reason is not None or found.left_out or untried(left_out, level)
    lower = None if unknown else 1.0 - found.interval[1]
    return Requirement(level, protection, lower)


def untried(left_out: Sequence[Job], level: int) -> int:
    """How many of the attacks on the protected model that a thief of this level has were left out."""
    return sum(job.side == "protected" and job.level <= level for job in left_out)


def full_dose_grid(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The full-dose grid on the first look, the worse of both values, with and without protection."""
    sides: tuple[Side, ...] = ("protected", "plain")
    seen: dict[Side, dict[tuple[float, float], float]] = {}
    for side in sides:
        row = next((row for row in rows if row.chain == ("full_dose",) and row.side == side), None)
        if row is None or not row.looks:
            return None
        seen[side] = {(look.options["dose"], look.options["others"]): look.joint for look in row.looks}
    # A merge whose answers are no numbers is missing on its side alone.
    places = [place for at in seen.values() for place in at]
    doses, others = (sorted({place[axis] for place in places}) for axis in (0, 1))
    tables: dict[str, list[list[float | None]]] = {}
    for side in sides:
        at = seen[side]
        tables[side] = [[at.get((dose, other)) for other in others] for dose in doses]
    return {"attack": "full_dose", "x": "others", "y": "dose", "xs": others, "ys": doses, **tables}
