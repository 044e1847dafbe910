"""A document of an audit as one is written, its levels judged from its rows; and the page of one as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unmergeable.audit.report import render
from unmergeable.audit.results import AuditResult, Requirement
from unmergeable.audit.rows import SIDES, Cost, Look, Point, Row, Side
from unmergeable.audit.scores import Reference, curve, judge
from unmergeable.audit.separation import separation

HOSTILE = "<script>alert(1)</script>&\"'"
LONG = "a-fine-tune-with-a-name-that-nobody-would-want-to-type_" + "0123456789abcdef" * 6
OWN = ("digits", "latin", "cyrillic")
BASE = {"digits": 0.655, "latin": 0.398, "cyrillic": 0.385}
PLAIN = {"digits": 0.975, "latin": 0.855, "cyrillic": 0.848}
EXAMPLES = {"validation": 200, "test": 400}


class Try(NamedTuple):
    """An attack: the best (value, own) of its merges on either model, and what it takes."""

    chain: tuple[str, ...]
    level: int
    needs: tuple[str, ...]
    about: str
    plain: tuple[float, float]
    protected: tuple[float, float]
    forwards: float
    tried: int = 6
    labelled: int = 0
    size: float = 1.0


TRIES = (
    Try(("linear",), 0, ("experts",), "weighted mean", (0.41, 0.52), (-0.30, -0.12), 12_000),
    Try(("task_arithmetic",), 0, ("base", "experts"),
        "base + Σ weight · task vector", (0.53, 0.54), (-0.27, -0.03), 24_000),
    Try(("ties",), 0, ("base", "experts"),
        "trim, elect signs, weighted mean", (0.60, 0.51), (-0.39, -0.74), 36_000, 15),
    Try(("dare_ties",), 0, ("base", "experts"),
        "random dropping with rescaling, then signs elected", (0.47, 0.40), (-0.35, -0.61), 36_000),
    Try(("slerp",), 0, ("experts",),
        "spherical interpolation of two models", (0.35, 0.30), (-0.2, 0.01), 12_000),
    Try(("karcher",), 0, ("experts",),
        "Karcher mean on the sphere", (0.40, 0.49), (-0.31, -0.2), 9_000, 1),
    Try(("model_stock",), 0, ("base", "experts"),
        "mean pulled towards the base", (0.12, 0.14), (0.0, 0.01), 8_000, 1),
    Try(("full_dose",), 0, ("base", "experts"),
        "one model at nearly its full dose, the others added", (0.54, 0.53), (0.94, 0.05), 51_000, 36),
    Try(("iso_c",), 0, ("base", "experts"), "isotropic merging", (0.58, 0.55), (-0.1, -0.05), 30_000),
    Try(("align-permutation", "task_arithmetic"), 1, ("anchor", "experts"),
        "rows and heads matched, then merged", (0.52, 0.54), (0.02, 0.2), 26_000),
    Try(("align-procrustes", "ties"), 1, ("anchor", "experts"),
        "rotated to the anchor, then merged", (0.55, 0.5), (0.08, 0.21), 31_000),
    Try(("anchor-independent", "task_arithmetic"), 1, ("anchor", "experts"),
        "each matrix solved for by itself", (0.44, 0.47), (0.18, 0.26), 31_000),
    Try(("anchor-coupled", "ties"), 1, ("anchor", "experts", "key structure"),
        "coupled solves per site, then merged", (0.60, 0.51), (0.55, 0.49), 48_000, 15),
    Try(("substitute-attention", "ties"), 1, ("base", "experts"),
        "the base's attention put in, then merged", (0.31, 0.52), (0.22, 0.5), 30_000),
    Try(("substitute-blocks",), 1, ("base", "experts"),
        "blocks taken whole, the rest merged", (0.66, 0.52), (0.42, 0.28), 420_000, 160),
    Try(("wide",), 1, ("experts",),
        "both models side by side, block by block", (0.72, 0.55), (0.64, 0.50), 90_000, 12, 0, 3.4),
    Try(("regmean",), 2, ("base", "experts", "inputs"),
        "least squares on the inputs of every layer", (0.63, 0.6), (-0.2, 0.11), 64_000),
    Try(("entropy",), 2, ("base", "experts", "inputs"),
        "coefficients learnt by entropy", (0.74, 0.63), (0.05, 0.41), 1_900_000, 9),
    Try(("coefficients",), 3, ("base", "experts", "labels"),
        "coefficients learnt from labels", (0.79, 0.71), (0.38, 0.55), 5_200_000, 12, 400),
    Try(("anchor-coupled", "ties", "repair"), 3, ("anchor", "experts", "labels"),
        "aligned, merged, then trained on a few labels", (0.84, 0.78), (0.78, 0.75), 7_400_000, 8, 400),
)  # fmt: skip


# Attacks that did not simply run: chain, level, side, state, why.
REASONS = (
    (("nuslerp",), 0, SIDES, "refused", "spherical interpolation takes two models, and the thief holds four"),
    (("align-canonical", "ties"), 1, ("protected",), "unreliable",
        "undoes 3 of the 4 locks that it must: a <weak> attack"),
    (("fisher",), 2, ("plain",), "failed", "out of memory after 12 of 96 tensors & nothing kept"),
)  # fmt: skip
# Preparations on their known cases: state, reason, and how far from the fine-tune they end.
PROOFS = (
    ("anchor-coupled", "done", None, 0.004),
    ("align-canonical", "unreliable", "a known lock (rotations) is not undone: 0.93 of the distance is left", 0.93),
)  # fmt: skip
LEFT_OUT = ("distil", 2, "the budget of 8,000,000 forward passes was spent")


class _Examples:
    """Scores of models on examples, paired: all models fail on the same hard ones first."""

    def __init__(self, protected: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.base = {protected: 0.562, **BASE}
        self.plain = {protected: 0.788, **PLAIN}
        self.order = {
            (half, task): self.rng.permutation(size) for half, size in EXAMPLES.items() for task in self.base
        }

    def at(self, half: str, values: Mapping[str, float], noise: float = 0.0) -> dict[str, np.ndarray]:
        """Scores of a model with these values."""
        found = {}
        for task, value in values.items():
            rate = self.base[task] + value * (self.plain[task] - self.base[task])
            rate = min(1.0, max(0.0, rate + noise * self.rng.standard_normal()))
            size = EXAMPLES[half]
            found[task] = (self.order[half, task] < round(size * rate)).astype(float)
        return found


def audit(
    *, name: str = "fashion-locked", task: str = "fashion", copies: int = 1, seed: int = 0
) -> AuditResult:
    """What an audit found: 20 attacks on three sides, times `copies`, and those that did not run."""
    examples = _Examples(task, seed)
    tasks = (task, *OWN)
    halves = tuple(EXAMPLES)
    reference = Reference(
        task,
        OWN,
        {half: examples.at(half, dict.fromkeys(tasks, 0.0)) for half in halves},
        {half: examples.at(half, dict.fromkeys(tasks, 1.0)) for half in halves},
        alone=0.04,
    )
    apart = {one: separation(reference.base["test"][one], reference.plain["test"][one]) for one in tasks}
    rows = tuple(_rows(examples, tasks, copies))
    levels = [judge(rows, reference, level, resamples=200) for level in (0, 1, 3)]
    unjudged = replace(
        judge(rows, reference, 2, resamples=2),
        recovered=np.nan,
        interval=(np.nan, np.nan),
        reason="merges of the unprotected model give no more than merges without it (Σ G -0.03): "
        "there is nothing that could be recovered",
    )
    upper = {level.level: level.interval[1] for level in levels}
    return AuditResult(
        suite=1,
        seed=seed,
        levels=(*levels[:2], unjudged, levels[2]),
        rows=rows,
        reference=reference,
        config={
            "base": "models/base",
            "protected": {"model": f"models/{name}", "plain": "models/fashion", "task": task},
            "others": {own: {"model": f"models/{own}", "data": "déjà-vu.npz"} for own in OWN},
            "levels": [0, 1, 2, 3],
            "seed": seed,
        },
        machine={
            "processor": "x86_64", "cores": 2, "memory_gib": 7.8, "device": "cpu", "system": "Linux",
            "python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.1"
        },
        models=_models(name),
        tasks={
            one: {
                "kind": "image-classification",
                "metric": "accuracy",
                "role": "protected" if one == task else "own",
                **EXAMPLES,
                "base": apart[one].base,
                "plain": apart[one].plain,
                "standard_error": apart[one].error,
                "separation": apart[one].times,
                "sha256": _digest(10 + len(one)),
            }
            for one in tasks
        },
        standalone={
            "alone": reference.alone, "plain": 0.788, "protected": 0.785, "difference": -0.003,
            "interval": [-0.0075, 0.0025], "same_answers": 0.9925
        },
        curve={side: curve(rows, reference, side) for side in ("protected", "plain")},
        grid=_grid(),
        left_out=[
            {"attack": LEFT_OUT[0], "level": LEFT_OUT[1], "side": side, "reason": LEFT_OUT[2]} for side in SIDES
        ],
        notes=[
            "The protected model carries the manifest of a lock: a thief sees which method it was.",
            f"The name {name} is not the name in its manifest.",
        ],
        requirements=[
            Requirement(0, 0.75, 1 - upper[0]), Requirement(1, 0.5, 1 - upper[1]), Requirement(2, 0.5, None)
        ],
        command="unmergeable audit audit.yaml -o audit --seed 0",
        seconds=812.4,
    )  # fmt: skip


def document(**changes: Any) -> dict[str, Any]:
    """The JSON document of `audit`."""
    return audit(**changes).as_dict()


def _rows(examples: _Examples, tasks: tuple[str, ...], copies: int) -> Iterator[Row]:
    for copy in range(copies):
        for one in TRIES:
            chain = one.chain if copy == 0 else (*one.chain[:-1], f"{one.chain[-1]}-{copy}")
            for side in SIDES:
                # Nobody prepares a model that nothing was done to: this control is the merge by itself.
                if side == "protected" or one.chain[0] not in ("align-procrustes", "align-permutation"):
                    yield _row(examples, tasks, one._replace(chain=chain), side)
    for name, state, reason, left in PROOFS:
        facts = {
            "case": "dense",
            "locked": 7.21,
            "attacked": left,
            "to_anchor": 0.02,
            "holds": state == "done",
        }
        about, cost = "coupled solves per site", Cost(seconds=3.1)
        yield Row(
            (name, "proof"),
            "plain",
            1,
            about,
            ("anchor",),
            cost=cost,
            state=state,
            reason=reason,
            facts=facts,
        )
    for chain, level, sides, state, reason in REASONS:
        simple = Try(chain, level, ("base", "experts"), "as in its paper", (0.4, 0.4), (0.1, 0.2), 40_000)
        for side in SIDES:
            row = _row(examples, tasks, simple, side)
            if side not in sides:
                yield row
            elif state == "unreliable":  # it ran, and what it found stands
                yield replace(row, state=state, reason=reason)
            else:
                yield replace(row, state=state, reason=reason, points=(), looks=(), cost=Cost())


def _row(examples: _Examples, tasks: tuple[str, ...], one: Try, side: Side) -> Row:
    value, own = {"plain": one.plain, "protected": one.protected, "without": (0.02, one.plain[1] + 0.06)}[
        side
    ]
    looks = []
    points = []
    for step in range(one.tried):
        tilt = 0.24 * (step / max(1, one.tried - 1) - 0.5)
        looks.append(Look({"weight": round(0.5 + tilt, 2)}, value - tilt, own + tilt))
    for tilt in (-0.12, 0.0, 0.12):
        wanted = {tasks[0]: value - tilt, **{task: own + tilt + 0.05 * k for k, task in enumerate(tasks[1:])}}
        points.append(
            Point(
                {"weight": round(0.5 + tilt, 2), "density": 0.5},
                examples.at("validation", wanted, 0.004),
                examples.at("test", wanted, 0.004),
            )
        )
    cost = Cost(
        inputs=500 if "inputs" in one.needs else 0,
        labelled=one.labelled,
        forwards=one.forwards,
        seconds=one.forwards / 9000,
        size=one.size,
    )
    return Row(one.chain, side, one.level, one.about, one.needs, tuple(points), tuple(looks), cost)


def _models(name: str) -> dict[str, dict[str, Any]]:
    def model(
        index: int, role: str, path: str, distance: float | None, lock: str | None = None
    ) -> dict[str, Any]:
        return {
            "role": role,
            "path": f"models/{path}",
            "sha256": _digest(index),
            "parameters": 612_490,
            "distance": distance,
            "lock": lock,
        }

    return {
        "base": model(1, "base", "base", None),
        "protected": model(2, "protected", name, 15.2, "exact"),
        "plain": model(3, "plain", "fashion", 0.18),
        "digits": model(4, "own", "digits", 0.16),
        "latin": model(5, "own", LONG, 0.21),
        "cyrillic": model(6, "own", "cyrillic", 0.19),
    }


def _digest(index: int) -> str:
    return np.random.default_rng(index).bytes(32).hex()


def _grid() -> dict[str, Any]:
    doses, others = (0.3, 0.5, 0.7, 0.85, 1.0, 1.15), (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)

    def plain(dose: float, other: float) -> float:
        return 0.6 - 1.4 * (dose - 0.6) ** 2 - 1.9 * (other - 0.45) ** 2

    def protected(dose: float, other: float) -> float:
        return 0.05 - 0.9 * abs(dose - 1) - 0.6 * (other - 0.2)

    grid: dict[str, Any] = {
        "attack": "full_dose",
        "x": "others",
        "y": "dose",
        "xs": list(others),
        "ys": list(doses),
    }
    for side, joint in (("protected", protected), ("plain", plain)):
        grid[side] = [[round(joint(dose, other), 4) for other in others] for dose in doses]
    grid["protected"][5][5] = None  # a merge that could not be scored
    return grid


# --- the page ------------------------------------------------------------------------------------------------

CSS = Path(render.__code__.co_filename).parent / "templates" / "style.css"
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


@dataclass
class Node:
    """An element."""

    tag: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """All elements in here, this one first."""
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def find(self, *tags: str) -> list[Node]:
        return [node for node in self.walk() if node.tag in tags]

    @property
    def text(self) -> str:
        """Its text as one line; elements stand apart."""
        parts = [child if isinstance(child, str) else f" {child.text} " for child in self.children]
        return " ".join("".join(parts).split())

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()


class Tree(HTMLParser):
    """A page as a tree; an element that is closed wrongly is an error."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root], f"not closed: {[node.tag for node in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)
