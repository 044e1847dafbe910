"""The verb `attack`: on a checkpoint by itself (`attacks`), or on merges of it that are scored on tasks (`audit`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from . import attacks
from .errors import UsageError

if TYPE_CHECKING:
    from .plan import ConfigLike, SpecLike

    Path_ = str | os.PathLike[str]

__all__ = ["attack"]


def attack(
    name: str,
    target: Path_,
    dst: Path_,
    *,
    audit: Path_ | None = None,
    base: Path_ | None = None,
    anchor: Path_ | None = None,
    seed: int = 0,
    config: ConfigLike | None = None,
    spec: SpecLike | None = None,
    progress: attacks.Progress | None = None,
    **options: Any,
) -> attacks.AttackReport:
    """Attack a checkpoint as a thief would, and write what he gets.

    Args:
        name: one of `attacks.ATTACKS`; with `audit`, one of `attacks.WITH_TASKS`.
        target: the protected model, a folder or a .safetensors file; never changed.
        dst: the new folder or file; it appears whole or not at all.
        audit: the configuration of an audit, for attacks that choose by how merges score: its base, others and
            tasks are the thief's, and the target stands in the place of its protected model.
        base: the model that the target was fine-tuned from.
        anchor: any other fine-tune of it, which attacks that need an anchor take in the base's place.
        seed: of everything random.
        config, spec: as in `lock`.
        progress: called with steps done, steps in all, and a label.
        options: of the attack itself.

    Raises:
        UsageError: no such attack or option, or what it needs is not given.
        InputError: a model, configuration or task that cannot be used; an attack that does not apply.
        RunError: reading, writing or training failed. Nothing is left at DST in any of these cases.
    """
    if audit is None:
        return attacks.attack(
            name,
            target,
            dst,
            base=base,
            anchor=anchor,
            seed=seed,
            config=config,
            spec=spec,
            progress=progress,
            **options,
        )
    given = {"--base": base, "--anchor": anchor, "--config": config, "--spec": spec}
    if extra := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"{', '.join(extra)} and --audit", hint="the configuration names the models")
    from .audit.single import attack_on_tasks

    return attack_on_tasks(name, target, dst, audit, seed=seed, options=options, progress=progress)
