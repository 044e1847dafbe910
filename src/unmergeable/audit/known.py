"""What is known before the first attack: scores that values are relative to, hashes, and what looks odd."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..checkpoint import MANIFEST
from ..merging.write import FAR
from .bench import HALVES, Bench
from .config import RELEASE, ROLES, Config
from .machine import machine
from .scores import COVERAGE, RESAMPLES, Reference, check_separation, resample, separation


@dataclass(frozen=True)
class Known:
    """Everything that is known before the first attack."""

    config: Config
    reference: Reference
    hashes: Mapping[str, str]
    models: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]
    standalone: Mapping[str, Any]
    notes: Sequence[str]
    machine: Mapping[str, Any]


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
    by_itself = bench.measure(bench.alone("plain"), "validation")
    reference = replace(reference, alone=reference.pair("validation", by_itself)[1])
    apart = {
        task: separation(*(np.concatenate([s[half][task] for half in HALVES[1:]]) for s in (base, plain)))
        for task in reference.tasks
    }
    check_separation(apart)
    tasks = {
        name: {
            "kind": task.kind,
            "metric": task.metric,
            "role": "protected" if name == bench.protected else "own",
            **{half: len(bench.index[name][half]) for half in HALVES},
            "base": apart[name].base,
            "plain": apart[name].plain,
            "standard_error": apart[name].error,
            "separation": apart[name].times,
            "sha256": task.digest,
        }
        for name, task in bench.tasks.items()
    }
    hashes = {"base": _digest(bench.base), **{role: _digest(state) for role, state in bench.models.items()}}
    return Known(
        bench.config,
        reference,
        hashes,
        _models(bench, hashes),
        tasks,
        _standalone(bench, reference.alone, released, plain),
        _notes(bench),
        machine(bench.device),
    )


def _digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of names, shapes and float32 values of a model."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        found.update(tensor.flatten().numpy().tobytes())
    return found.hexdigest()


def _models(bench: Bench, hashes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    found = {}
    for role, written in bench.config.models():
        method = None
        manifest = bench.config.path(written) / MANIFEST
        if manifest.is_file():
            method = str(json.loads(manifest.read_text(encoding="utf-8")).get("method"))
        found[role] = {
            "role": "release" if role.startswith(RELEASE) else role if role in ROLES else "own",
            "path": written,
            "sha256": hashes[role],
            "parameters": bench.parameters[role],
            "distance": bench.distances.get(role),
            "lock": method,
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
    notes = []
    for role, far in bench.distances.items():
        if role != "protected" and not role.startswith(RELEASE) and far > FAR:
            notes.append(
                f"{role} is {far:.2f} of the base's norm away from it: is this its base? "
                "Merges of it mean little if not"
            )
    return notes
