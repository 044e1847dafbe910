"""Attacks: what a thief can do to a protected model before, or instead of, merging it.

An attack is looked up by name and its module imported when it is used. Each declares what it needs, at which
level of access it stands, and what it costs. It sees tensors through a matched spec, by name, and answers with
elements to undo (the function stays what it was) or with tensors to put in place of others.

    attack("anchor-coupled", "locked", "attacked", anchor="another-fine-tune")

writes a checkpoint of the same layout that stock loaders open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..errors import UsageError

if TYPE_CHECKING:
    import os

    from ..groups import Element, Floats
    from ..match import Instance, Match
    from ..plan import ConfigLike, SpecLike
    from .thief import MergeAttack

    Tensors = Mapping[str, Floats]
    Elements = Mapping[tuple[int, Instance], Element]

__all__ = [
    "ATTACKS",
    "NEEDS",
    "Attack",
    "AttackReport",
    "Case",
    "Declared",
    "Outcome",
    "attack",
    "attack_named",
]

# name -> module and attribute, below this package
ATTACKS: dict[str, str] = {
    "align-permutation": ".align_permutation:ATTACK",
    "align-procrustes": ".align_procrustes:ATTACK",
    "align-canonical": ".align_canonical:ATTACK",
    "anchor-independent": ".anchor_independent:ATTACK",
    "anchor-coupled": ".anchor_coupled:ATTACK",
    "substitute-attention": ".substitute:ATTENTION",
    "substitute-mlp": ".substitute:MLP",
    "substitute-blocks": ".substitute:BLOCKS",
}

# Attacks that end in merges, chosen by how they score on tasks: name -> module and what makes one of options.
WITH_TASKS: dict[str, str] = {
    "substitute-blocks": ".blocks:Blocks",
    "wide": ".wide:Wide",
    "coefficients": ".coefficients:coefficients",
    "repair": ".repair:repair",
    "distil": ".distil:distil",
}

NEEDS = {
    "anchor": "the base, or any other fine-tune of it",
    "base": "the base itself",
    "experts": "other fine-tunes of the base",
    "inputs": "unlabelled inputs",
    "labels": "labelled examples of the tasks",
    "key structure": "which method the lock used",
}

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Case:
    """What an attack works on.

    Attributes:
        match: the spec laid over the attacked model.
        target: the attacked model's tensors by name, float64, read as they are asked for.
        anchor: the base or another fine-tune, under the target's names; None if there is none.
        seed: of everything random.
        progress: called with steps done, steps in all, and a label.
    """

    match: Match
    target: Tensors
    anchor: Tensors | None = None
    seed: int = 0
    progress: Progress | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of an attack: elements to undo, or tensors to put in the place of the target's.

    Attributes:
        elements: in the form of a lock's; undoing them leaves the function as it is.
        replace: the new values of a tensor of the target, float64; None leaves it. Only without elements.
        facts: JSON-ready figures for the report.
    """

    elements: Elements | None = None
    replace: Callable[[str], Floats | None] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, case: Case) -> dict[str, Floats]:
        """The attacked model in memory, all tensors by name."""
        if self.elements is not None:
            from .recover import undo

            return undo(case.match, self.elements, case.target)
        made = {name: self.replace(name) if self.replace else None for name in case.target}
        return {name: case.target[name] if values is None else values for name, values in made.items()}


class Declares(Protocol):
    """What every attack says of itself.

    about: one line. needs: keys of `NEEDS`. access: level of the suite, 0 to 3. budget: JSON-ready numbers, the most
    that it takes.
    """

    @property
    def about(self) -> str: ...
    @property
    def needs(self) -> tuple[str, ...]: ...
    @property
    def access(self) -> int: ...
    @property
    def budget(self) -> Mapping[str, int]: ...


class Attack(Declares, Protocol):
    """An attack, as the audit and the command line see it.

    cost: what it takes, in words. Its budget has examples, forward passes and most iterations. keeps_function:
    whether the attacked model computes what the target does, by construction.
    """

    @property
    def cost(self) -> str: ...
    @property
    def keeps_function(self) -> bool: ...
    @property
    def run(self) -> Callable[..., Outcome]:
        """`run(case, **options)`; raises UsageError for options that it does not know."""


@dataclass(frozen=True)
class Declared:
    """An attack whose work is one function."""

    about: str
    needs: tuple[str, ...]
    access: int
    cost: str
    keeps_function: bool
    run: Callable[..., Outcome]
    budget: Mapping[str, int] = field(default_factory=lambda: {"examples": 0, "forward_passes": 0})


@dataclass(frozen=True)
class AttackReport:
    """What an attack did.

    Attributes:
        attack, target, destination, anchor: the name of the attack, and paths.
        needs, access, cost, budget, keeps_function, seed: as declared, and what it ran with.
        spent: examples and forward passes that it took, empty for what takes none.
        seconds: wall clock, reading and writing included.
        before, after: ‖model − anchor‖ / ‖anchor‖ over the tensors of all sites.
        changed: how many tensors were written with other values than the target's.
        facts: what else the attack tells.
    """

    attack: str
    target: str
    destination: str
    anchor: str | None
    needs: tuple[str, ...]
    access: int
    cost: str
    budget: Mapping[str, int]
    keeps_function: bool
    seed: int
    seconds: float
    before: float | None
    after: float | None
    changed: int
    facts: Mapping[str, Any]
    spent: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, for `--json`."""
        return {
            "document": "unmergeable.attack",
            "version": 1,
            **asdict(self),
            "needs": list(self.needs),
            "budget": dict(self.budget),
            "spent": dict(self.spent),
            "facts": dict(self.facts),
        }


def attack_named(name: str) -> Attack:
    """The attack of this name.

    Raises:
        UsageError: no such attack.
    """
    if name not in ATTACKS:
        if name in WITH_TASKS:
            raise UsageError(f"{name} needs tasks to choose merges by", hint="give --audit CONFIG")
        raise UsageError("no such attack", where=f"'{name}'", expected=" | ".join(ATTACKS))
    module, attribute = ATTACKS[name].split(":")
    return cast(Attack, getattr(import_module(module, __name__), attribute))


def merge_attack_maker(name: str) -> Callable[..., MergeAttack]:
    """What makes an attack of `WITH_TASKS` of its options.

    Raises:
        UsageError: no such attack.
    """
    if name not in WITH_TASKS:
        if name in ATTACKS:
            raise UsageError(f"{name} takes no tasks", hint="leave --audit out")
        raise UsageError("no such attack on tasks", where=f"'{name}'", expected=" | ".join(WITH_TASKS))
    module, attribute = WITH_TASKS[name].split(":")
    return cast("Callable[..., MergeAttack]", getattr(import_module(module, __name__), attribute))


def attack(
    name: str,
    target: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    anchor: str | os.PathLike[str] | None = None,
    seed: int = 0,
    config: ConfigLike | None = None,
    spec: SpecLike | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AttackReport:
    """Attack a checkpoint and write the result: same tensors, shapes, dtypes and other files, no manifest.

    Args:
        name: one of `ATTACKS`.
        target: the protected model, a folder or a .safetensors file; never changed.
        dst: the new folder or file; it appears whole or not at all.
        base: the model that the target was fine-tuned from.
        anchor: any other fine-tune of it, which attacks that need an anchor take in the base's place.
        seed: of everything random.
        config, spec: as in `lock`.
        progress: called with steps done, steps in all, and a label.
        options: of the attack itself.

    Raises:
        UsageError: no such attack or option, or what it needs is not given.
        InputError: a model that cannot be used, or an anchor that is not of the target's shape.
        RunError: reading or writing failed. Nothing is left at DST in any of these cases.
    """
    from .files import attack_files

    return attack_files(
        name,
        target,
        dst,
        base=base,
        anchor=anchor,
        seed=seed,
        config=config,
        spec=spec,
        progress=progress,
        options=options,
    )


def need_anchor(case: Case) -> Tensors:
    """The anchor of a case. Raises UsageError where there is none."""
    if case.anchor is None:
        raise UsageError(
            "the attack needs an anchor", expected=NEEDS["anchor"], hint="give --base or --anchor"
        )
    return case.anchor


def no_options(name: str, options: Mapping[str, Any], known: tuple[str, ...] = ()) -> None:
    """Raises UsageError for an option that an attack does not have."""
    for option in options:
        if option not in known:
            raise UsageError(f"{name} has no such option", expected=" | ".join(known) or "none", got=option)
