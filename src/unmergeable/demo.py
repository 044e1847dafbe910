"""The whole of it on an embedded zoo: lock a fine-tune with every method, verify it, merge it, unlock it.

The zoo holds one base model and fine-tunes of it for four tasks, with test images of each. One fine-tune is
protected; a thief who has the base and the other fine-tunes wants all tasks in one model. Every merge is
chosen on one half of the images and reported on the other. Values are on the scale on which the base is 0
and a task's own fine-tune is 1.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import ClaimError, InputError
from .keys import Key, generate_key
from .lock import lock
from .merging import Merged, merge_method
from .methods import METHODS
from .unlock import unlock
from .verify import verify

if TYPE_CHECKING:
    from ._demo_scores import Scorer, Spread, State

__all__ = ["DemoResult", "demo"]

DOCUMENT, DOCUMENT_VERSION = "unmergeable.demo", 1
UNLOCKED = "none"
PROTECTED = "fashion"
# What a thief tries, as data: options of `merging`'s methods.
GRIDS: Mapping[str, tuple[dict[str, float], ...]] = {
    "task_arithmetic": tuple({"weight": weight} for weight in (0.2, 0.3, 0.4, 0.5, 0.6)),
    "ties": tuple(
        {"weight": weight, "density": density} for density in (0.2, 0.5) for weight in (0.5, 1.0, 1.5)
    ),
}

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Merge:
    """The best merge of one method, chosen on some images and measured on others.

    Attributes:
        protected: value of the protected task in the merged model.
        own: smallest value of the thief's own tasks.
        points: (protected, own) of every merge tried, on the images to choose on.
    """

    method: str
    options: Mapping[str, float]
    protected: float
    own: float
    accuracy: Mapping[str, float]
    points: tuple[tuple[float, float], ...]

    @property
    def joint(self) -> float:
        """What a thief of all tasks gets: the worse of the two."""
        return min(self.protected, self.own)


@dataclass(frozen=True)
class Locked:
    """One lock, or none.

    Attributes:
        standalone: accuracy of the protected model on its task.
        output_change: largest difference of an output, relative to the largest output.
        verified: what `verify` found; None without a lock.
        undone: "bit for bit", or the largest relative difference of a tensor after `unlock`.
        seconds: of lock, verify and unlock.
    """

    method: str
    standalone: float
    output_change: float
    verified: bool | None
    undone: str | float | None
    seconds: float
    merges: tuple[Merge, ...]

    @property
    def joint(self) -> float:
        """What the best merge gets for a thief of all tasks."""
        return max(merge.joint for merge in self.merges)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured; `as_dict` is demo.json.

    Attributes:
        protected, own: the protected task, and the thief's.
        images: by task, images that merges are chosen on, and reported on.
        base, plain: accuracy of the base, and of each task's own fine-tune.
        alone: (protected, own) of the protected model served by itself: what no lock can prevent.
        locks: no lock first.
        audit: what the audit of the lock `exact` says, a sentence a level of access.
        files: what was written.
    """

    protected: str
    own: tuple[str, ...]
    images: Mapping[str, tuple[int, int]]
    base: Mapping[str, float]
    plain: Mapping[str, float]
    alone: tuple[float, float]
    locks: tuple[Locked, ...]
    audit: tuple[str, ...]
    seconds: float
    files: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `unmergeable demo --json`."""
        document = {"document": DOCUMENT, "version": DOCUMENT_VERSION, "tool": __version__, **asdict(self)}
        for locked, written in zip(self.locks, document["locks"], strict=True):
            written["joint"] = locked.joint
        return document


def demo(
    output: str | os.PathLike[str] = "demo", *, full: bool = False, progress: Progress | None = None
) -> DemoResult:
    """Run the demo and write demo.json, demo.png and the report of an audit.

    Args:
        output: folder for both; it is made if it is missing, and files of an earlier demo are replaced.
        full: try the full-dose grid against every lock, not against `exact` alone.
        progress: called with steps done, steps in all, and what comes next.

    Raises:
        InputError: the folder cannot be made.
        ClaimError: a lock that does not verify, or does not come off.
    """
    from ._demo_audit import audited
    from ._demo_picture import draw
    from ._demo_scores import Scorer, one_core_each

    started = time.monotonic()
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("the folder cannot be made", where=folder, got=error.strerror) from None
    step = _steps(progress, 4 + 2 * len(METHODS))
    step("models")
    with one_core_each() as spread, tempfile.TemporaryDirectory(prefix="unmergeable-demo-") as work:
        scorer = Scorer(PROTECTED)
        step("merges without a lock")
        merges = _merges(scorer, scorer.expert, spread, full_dose=True)
        locks = [Locked(UNLOCKED, scorer.plain[PROTECTED], 0.0, None, None, 0.0, merges)]
        key = generate_key(Path(work, "owner.key"))
        for method in METHODS:
            locks.append(_locked(scorer, method, key, Path(work), full or method == "exact", step, spread))
        step("exact: audit")
        judged = audited(Path(work, "exact"), scorer.tasks, folder / "audit", Path(work))
    step("picture")
    result = DemoResult(
        protected=PROTECTED,
        own=tuple(scorer.own),
        images={task: scorer.sizes(task) for task in scorer.tasks},
        base=scorer.base,
        plain=scorer.plain,
        alone=scorer.alone(),
        locks=tuple(locks),
        audit=tuple(level["verdict"] for level in judged.as_dict()["levels"]),
        seconds=time.monotonic() - started,
        files=(str(folder / "demo.json"), str(folder / "demo.png"), str(folder / "audit" / "report.html")),
    )
    draw(result, folder / "demo.png")
    (folder / "demo.json").write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")
    return result


def _steps(progress: Progress | None, total: int) -> Callable[[str], None]:
    done = iter(range(total + 1))

    def step(label: str) -> None:
        if progress is not None:
            progress(next(done), total, label)

    return step


def _locked(
    scorer: Scorer,
    method: str,
    key: Key,
    work: Path,
    full_dose: bool,
    step: Callable[[str], None],
    spread: Spread,
) -> Locked:
    """Lock, verify, measure, merge and unlock by one method."""
    source, locked, back = scorer.path, work / method, work / f"{method}-unlocked"
    started = time.monotonic()
    step(f"{method}: lock, verify, unlock")
    lock(source, locked, key=key, method=method)
    checked = verify(source, locked, key=key)
    report = unlock(locked, back, key=key)
    seconds = time.monotonic() - started
    if method == "exact" and not _same_files(source, back):
        raise ClaimError("unlock did not bring back the very files that were locked", where=source)
    undone = "bit for bit" if report.bit_for_bit else scorer.distance(back)
    step(f"{method}: merges")
    expert = scorer.load(locked)
    return Locked(
        method,
        scorer.accuracy(expert, PROTECTED),
        scorer.output_change(expert),
        checked.holds,
        undone,
        seconds,
        _merges(scorer, expert, spread, full_dose=full_dose),
    )


def _merges(scorer: Scorer, expert: State, spread: Spread, *, full_dose: bool) -> tuple[Merge, ...]:
    """The best merge by each method, chosen on some images and measured on others."""
    from .merging.simple import FULL_DOSE_GRID

    grids: dict[str, list[dict[str, Any]]] = {name: list(grid) for name, grid in GRIDS.items()}
    if full_dose:
        grids["full_dose"] = [{"protected": PROTECTED, "dose": a, "others": b} for a, b in FULL_DOSE_GRID]
    experts = {**scorer.others, PROTECTED: expert}

    def merged(name: str, options: Mapping[str, Any]) -> Merged:
        return merge_method(name)(scorer.base_state, experts, **options)

    def point(tried: tuple[str, Mapping[str, Any]]) -> tuple[float, float]:
        value = scorer.values(merged(*tried), chosen=True)
        return value[PROTECTED], min(value[task] for task in scorer.own)

    def report(name: str) -> Merge:
        points = found[name]
        best = max(range(len(points)), key=lambda k: min(points[k]))
        options = grids[name][best]
        merge = merged(name, options)
        accuracy = {task: scorer.accuracy(merge.for_task(task), task) for task in scorer.tasks}
        value = {task: scorer.value(task, accuracy[task]) for task in scorer.tasks}
        return Merge(
            method=name,
            options={option: number for option, number in options.items() if option != "protected"},
            protected=value[PROTECTED],
            own=min(value[task] for task in scorer.own),
            accuracy=accuracy,
            points=tuple(points),
        )

    tried = [(name, options) for name, grid in grids.items() for options in grid]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in grids}
    for (name, _), pair in zip(tried, spread(point, tried), strict=True):
        found[name].append(pair)
    return tuple(spread(report, grids))


def _same_files(one: Path, other: Path) -> bool:
    def files(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    return files(one) == files(other)
