"""One attack on tasks by itself: what `unmergeable attack` does with the configuration of an audit."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..attacks import AttackReport, merge_attack_maker
from ..attacks.repair import Repair
from ..attacks.thief import MergeAttack, Pair, Subject, Thief, detached
from ..attacks.wide import Wide, fill
from ..checkpoint import check_destination, open_checkpoint
from ..errors import InputError
from ..merging import Merged
from ..merging.check import facts
from ..merging.tensors import load_state
from ..merging.vectors import is_adapter
from ..merging.wide_checkpoint import wide_checkpoint
from ..merging.write import saved_state, write_merged
from ..options import declared, unknown
from .bench import Bench
from .config import make_config, read_config
from .explore import MIXES, Explorer
from .finalists import promising
from .known import prepare
from .suite import merge_attack
from .work import one_thread

Progress = Callable[[int, int, str], None]


def attack_on_tasks(
    name: str,
    target: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    audit: str | os.PathLike[str],
    *,
    seed: int,
    options: Mapping[str, Any],
    progress: Progress | None,
) -> AttackReport:
    """As `attack.attack` with a configuration."""
    started = time.monotonic()
    maker = merge_attack_maker(name)
    known = declared(maker)
    for option in options:
        if option not in known:
            raise unknown(name, option, known)
    attack = maker(**options)
    _check_target(Path(target))
    read = read_config(audit)
    fields = read.fields.model_dump(mode="json", exclude_none=True)
    fields["protected"]["model"] = os.path.abspath(target)
    fields["seed"] = seed
    config = make_config(fields, read.folder, read.where)
    with open_checkpoint(target) as source:
        check_destination(source.root, dst, source.nbytes)
    with one_thread(), tempfile.TemporaryDirectory(prefix="unmergeable-attack-") as work:
        bench = Bench(config, Path(work))
        explorer = _Told(bench, prepare(bench).reference, progress)
        starts = _starts(bench, explorer) if isinstance(attack, Repair) else ()
        thief = bench.thief("protected", starts=starts)
        attack.explore(thief, explorer)
        if not explorer.looks:
            raise InputError("the attack found no merge that gives answers", where=name)
        chosen, subject, pairs = _best(attack, thief, explorer)
        if isinstance(attack, MIXES):
            _check_mix(thief, subject, name)
        _write(attack, bench, chosen, subject, Path(dst), Path(target))
    bill, (changed, size) = thief.bill, _compared(Path(target), Path(dst))
    return AttackReport(
        attack=name,
        target=str(target),
        destination=str(dst),
        anchor=None,
        needs=attack.needs,
        access=attack.access,
        cost=attack.about,
        budget=attack.budget,
        spent={
            "examples": sum(bill.inputs.values()) + sum(bill.labelled.values()),
            "forward_passes": round(bill.forwards + explorer.forwards),
        },
        keeps_function=False,
        seed=seed,
        seconds=time.monotonic() - started,
        before=None,
        after=None,
        changed=changed,
        facts={
            "tried": len(explorer.looks),
            "size": round(size, 2),
            "options": {key: _plain(value) for key, value in chosen.items()},
            "values": {half: {"protected": pair[0], "own": pair[1]} for half, pair in pairs.items()},
        },
    )


def _check_target(target: Path) -> None:
    """Merges are run to be scored, so a model's folder is needed, and all of its weights.

    Raises:
        InputError: a file by itself, or an adapter.
    """
    if target.is_file():
        what = "a file of weights cannot be run by itself"
        raise InputError(what, where=target, expected="the folder of a model, with its config.json")
    if is_adapter(target):
        what = "an adapter has no weights of its own to put a merge in the place of"
        raise InputError(what, where=target, hint="merge it into its base first")


@dataclass(eq=False)
class _Told(Explorer):
    """An explorer that tells how many merges it has looked at."""

    progress: Progress | None = None

    def peek(self, subject: Subject) -> Pair:
        pair = super().peek(subject)
        if self.progress is not None:
            self.progress(len(self.looks) + 1, len(self.looks) + 1, "merges looked at")
        return pair


def _starts(bench: Bench, explorer: Explorer) -> list[tuple[Mapping[str, Any], Merged]]:
    """The best merge of the full-dose grid, to be repaired."""
    grid, thief = merge_attack("full_dose"), bench.thief("protected")
    grid.explore(thief, explorer)
    if not explorer.looks:
        raise InputError("no merge that could be repaired gives answers", where=grid.name)
    best = max(explorer.looks, key=lambda look: look.joint)
    merged = grid.make(thief, best.options)
    assert isinstance(merged, Merged)
    explorer.looks.clear()
    return [(best.options, detached(merged))]


def _best(
    attack: MergeAttack, thief: Thief, explorer: Explorer
) -> tuple[Mapping[str, Any], Subject, dict[str, Pair]]:
    """The merge with the best worse of both values on validation examples, and its values on both halves."""
    reference, bench = explorer.reference, explorer.bench
    best: tuple[float, int, Pair] | None = None
    for number in promising(explorer.looks, reference.floors):
        subject = explorer.kept.get(number) or attack.make(thief, explorer.looks[number].options)
        with suppress(InputError):  # answers that are no numbers
            pair = reference.pair("validation", explorer.measure(subject, "validation"))
            if best is None or min(pair) > best[0]:
                best = min(pair), number, pair
    if best is None:
        raise InputError("the attack found no merge that gives answers", where=attack.name)
    options = explorer.looks[best[1]].options
    subject = explorer.kept.get(best[1]) or attack.make(thief, options)
    tested = reference.pair("test", bench.measure(subject, "test"))
    return options, subject, {"validation": best[2], "test": tested}


def _check_mix(thief: Thief, subject: Subject, name: str) -> None:
    """Refuse what is called a merge and is none.

    Raises:
        InputError: a tensor that is made of something else than the models.
    """
    assert isinstance(subject, Merged)
    problems = facts(thief.base, thief.experts, subject.shared).problems
    if problems:
        raise InputError("not a merge", where=name, got="; ".join(problems))


def _write(
    attack: MergeAttack,
    bench: Bench,
    options: Mapping[str, Any],
    subject: Subject,
    dst: Path,
    target: Path,
) -> None:
    """What the thief gets, as a checkpoint with the target's files and head."""
    module: Any = bench.modules[bench.protected]
    if isinstance(subject, Merged):
        # Stock classes have names of their own in memory; saving brings back those that files have.
        fill(module, subject.for_task(bench.protected))
        write_merged(dst, saved_state(module, bench.work / "merged", target), target)
        return
    assert isinstance(attack, Wide)
    weights = {bench.protected: options["dose"], **dict.fromkeys(bench.others, options["others"])}
    paths = [target, *(bench.paths[task] for task in bench.others)]
    if options["base"]:
        weights["base"] = 1 - sum(weights.values())
        # Its body under the target's head: the base may be of another class.
        fill(module, bench.alone("base").for_task(bench.protected))
        base = bench.work / "wide-base"
        write_merged(base, saved_state(module, bench.work / "saved", target), target)
        paths.append(base)
    private = tuple(bench.heads["protected"])
    wide_checkpoint(dst, paths, list(weights.values()), private=private)


def _compared(target: Path, dst: Path) -> tuple[int, float]:
    """How many tensors were written that the target does not have just so; numbers over those of the target."""
    before, after = load_state(target), load_state(dst)
    changed = sum(name not in before or not torch.equal(before[name], after[name]) for name in after)
    own, made = (sum(tensor.numel() for tensor in state.values()) for state in (before, after))
    return changed, made / own


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
