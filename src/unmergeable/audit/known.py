"""What is known before the first attack: scores that values are relative to, hashes, and what looks odd."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..checkpoint import MANIFEST
from ..checkpoint.files import load_json
from ..merging.write import FAR
from .bench import HALVES, Bench
from .config import RELEASE, ROLES, Config
from .lineage import doubtful_base
from .machine import machine
from .resampling import resample
from .scores import (
    COVERAGE,
    RESAMPLES,
    Reference,
)
from .separation import check_halves, check_separation, separation

# The part of what the plain model has learnt that a protected one must keep to go without a note.
KEPT = 0.95
# Test examples of a task below which percentiles of a bootstrap are too narrow.
FEW = 30


@dataclass(frozen=True)
class Known:
    """Everything that is known before the first attack.

    Attributes:
        answers: SHA-256 of what models score on tasks whose digest does not cover their data, by who holds them:
            "base" with the thief's own models, "plain", "protected". None where all tasks are covered.
    """

    config: Config
    reference: Reference
    hashes: Mapping[str, str]
    settings: Mapping[str, str]
    models: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]
    standalone: Mapping[str, Any]
    notes: Sequence[str]
    machine: Mapping[str, Any]
    answers: Mapping[str, str] = field(default_factory=dict)


def prepare(bench: Bench) -> Known:
    """Score what values are relative to, and refuse what cannot be measured."""
    own = bench.others
    base = {half: bench.measure(bench.alone("base"), half) for half in HALVES}
    plain: dict[str, dict[str, Any]] = {}
    released: dict[str, Any] = {}
    for half in HALVES:
        scores = dict(bench.measure(bench.alone("plain"), half, [bench.protected]))
        released[half] = bench.measure(bench.alone("protected"), half, [bench.protected])[bench.protected]
        for task in own:
            scores |= bench.measure(bench.alone(task), half, [task])
        plain[half] = scores
    reference = Reference(bench.protected, own, base, plain)
    apart = {
        task: separation(*(np.concatenate([s[half][task] for half in HALVES[1:]]) for s in (base, plain)))
        for task in reference.tasks
    }
    check_separation(apart)
    check_halves(reference)
    by_itself = bench.measure(bench.alone("plain"), "validation")
    itself = {task: by_itself[task] for task in reference.own}
    reference = replace(reference, alone=reference.pair("validation", by_itself)[1], itself=itself)
    tasks = {
        name: {
            "kind": task.kind,
            "metric": task.metric,
            "role": "protected" if name == bench.protected else "own",
            **{half: len(bench.index[name][half]) for half in HALVES},
            "base": apart[name].base,
            "plain": apart[name].plain,
            "standard_error": apart[name].error,
            "separation": apart[name].times if np.isfinite(apart[name].times) else None,
            "sha256": task.digest,
        }
        for name, task in bench.tasks.items()
    }
    standalone = _standalone(bench, reference.alone, released, plain)
    return Known(
        bench.config,
        reference,
        bench.hashes,
        bench.settings,
        _models(bench),
        tasks,
        standalone,
        [*_notes(bench), *_doubts(bench.protected, tasks, standalone)],
        machine(bench.device),
        _answers(bench, base, plain, released),
    )


def _answers(
    bench: Bench, base: Mapping[str, Any], plain: Mapping[str, Any], released: Mapping[str, Any]
) -> dict[str, str]:
    """What a function reads may change while the function does not; then what models score changes, too."""
    open_ended = [name for name, task in bench.tasks.items() if not task.complete]
    scores: dict[str, list[Any]] = {"base": [], "plain": [], "protected": []}
    for half in HALVES:
        for name in open_ended:
            scores["base"].append(base[half][name])
            if name == bench.protected:
                scores["plain"].append(plain[half][name])
                scores["protected"].append(released[half])
            else:
                scores["base"].append(plain[half][name])
    return {
        role: hashlib.sha256(np.concatenate(found).tobytes()).hexdigest()
        for role, found in scores.items()
        if found
    }


def _models(bench: Bench) -> dict[str, dict[str, Any]]:
    found = {}
    for role, written in bench.config.models():
        manifest = bench.config.path(written) / MANIFEST
        method = load_json(manifest).get("method") if manifest.is_file() else None
        found[role] = {
            "role": "release" if role.startswith(RELEASE) else role if role in ROLES else "own",
            "path": written,
            "sha256": bench.hashes[role],
            "parameters": bench.parameters[role],
            "distance": bench.distances.get(role),
            "lock": method if isinstance(method, str) else None,
        }
    return found


def _standalone(
    bench: Bench, alone: float, released: Mapping[str, Any], plain: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The protected task before and after protection, all examples, with an interval of the difference."""
    before = np.concatenate([plain[half][bench.protected] for half in HALVES[1:]])
    after = np.concatenate([released[half] for half in HALVES[1:]])
    drawn = (after - before)[resample(len(before), bench.seed, RESAMPLES)].mean(axis=1)
    edge = 50 * (1 - COVERAGE)
    return {
        "alone": alone,
        "plain": float(before.mean()),
        "protected": float(after.mean()),
        "difference": float((after - before).mean()),
        "interval": [float(limit) for limit in np.percentile(drawn, [edge, 100 - edge])],
        "same_answers": float((after == before).mean()),
    }


def _notes(bench: Bench) -> list[str]:
    return [
        *(
            f"{role} has another configuration than the protected model, and is run with that one's: its score is not "
            "what it gives by itself"
            for role in bench.unlike
        ),
        *_far(bench),
    ]


def _far(bench: Bench) -> list[str]:
    """What makes the base doubtful."""
    notes = []
    for role, far in bench.distances.items():
        if role != "protected" and not role.startswith(RELEASE) and far > FAR:
            notes.append(
                f"{role} is {far:.2f} of the base's norm away from it: is this its base? "
                "Merges of it mean little if not"
            )
    if notes:
        return notes
    # Those that no lock has moved.
    tuned = {role: bench.models[role] for role in ("plain", *bench.others)}
    if (doubtful := doubtful_base(bench.base, tuned)) is not None:
        notes.append(doubtful)
    return notes


def _doubts(
    protected: str, tasks: Mapping[str, Mapping[str, Any]], standalone: Mapping[str, Any]
) -> list[str]:
    """What makes figures say less than they seem to."""
    notes = []
    base, plain = tasks[protected]["base"], tasks[protected]["plain"]
    kept = (standalone["protected"] - base) / (plain - base)
    if kept < KEPT and standalone["interval"][1] < 0:
        notes.append(
            f"the protected model by itself is worse at its task than the plain one, {standalone['protected']:.4f} "
            f"against {standalone['plain']:.4f}: what it has lost nobody can take, and it counts as protection here"
        )
    few = [name for name, task in tasks.items() if task["test"] < FEW]
    if few:
        notes.append(
            f"less than {FEW} examples are left to report on in {', '.join(few)}: intervals are wider than they look"
        )
    return notes
