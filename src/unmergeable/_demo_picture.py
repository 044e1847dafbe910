"""The demo's picture: what merges get without a lock and with it, and what each lock leaves of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # draws into files: no display is needed

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .demo import DemoResult

INK, FAINT = "#222222", "#bbbbbb"
COLOURS = {"none": "#2a7f62", "exact": "#b3392f"}
MARKERS = {"task_arithmetic": "o", "ties": "s", "full_dose": "."}
BARS = {"task_arithmetic": "#4c6a92", "ties": "#9db4d3", "full_dose": "#d08b3e"}
NAMES = {"task_arithmetic": "task arithmetic", "ties": "TIES", "full_dose": "full-dose grid"}


def draw(result: DemoResult, path: Path) -> None:
    """Draw the picture of a demo to a PNG file."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _merges(left, result)
    _bars(right, result)
    figure.savefig(path, metadata={"Software": None})


def _merges(axes: Any, result: DemoResult) -> None:
    """Every merge that was tried, by what it keeps of the protected task and of the thief's own."""
    for lock in result.locks:
        if lock.method not in COLOURS:
            continue
        title = "not locked" if lock.method == "none" else f"locked ({lock.method})"
        for merge in lock.merges:
            own, protected = [p[1] for p in merge.points], [p[0] for p in merge.points]
            axes.plot(
                own,
                protected,
                MARKERS[merge.method],
                color=COLOURS[lock.method],
                markersize=4 if merge.method == "full_dose" else 6,
                alpha=0.75,
                label=f"{title}: {NAMES[merge.method]}",
            )
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
    axes.plot([0], [0], "+", color=INK, markersize=9, label="the base")
    axes.plot(*result.alone[::-1], "*", color=INK, markersize=9, label="the protected model alone")
    axes.set_xlabel("worst of the thief's own tasks\n(0: base, 1: their own fine-tunes)", color=INK)
    axes.set_ylabel(f"protected task, {result.protected}\n(0: base, 1: its fine-tune)", color=INK)
    axes.set_title("Every merge that was tried", fontsize=11, color=INK)
    axes.legend(fontsize=7, frameon=False)
    _plain(axes)


def _bars(axes: Any, result: DemoResult) -> None:
    """What the best merge of each method gets for a thief of all tasks."""
    methods = list(BARS)
    width = 0.8 / len(methods)
    handles: dict[str, Any] = {}
    for k, lock in enumerate(result.locks):
        # Bars stand side by side around their tick, however many merges were tried.
        start = k - width * (len(lock.merges) - 1) / 2
        for n, merge in enumerate(lock.merges):
            at, value = start + n * width, merge.joint
            handles[merge.method] = axes.bar(at, value, width * 0.92, color=BARS[merge.method])
            above = value >= 0
            shift, side = (0.015, "bottom") if above else (-0.015, "top")
            axes.text(at, value + shift, f"{value:.2f}", ha="center", va=side, fontsize=6, color=INK)
    axes.axhline(0, color=INK, linewidth=0.8)
    names = ["no lock", *(lock.method for lock in result.locks[1:])]
    labels = [f"{name}\nalone {lock.standalone:.2f}" for name, lock in zip(names, result.locks, strict=True)]
    axes.set_xticks(range(len(result.locks)), labels)
    axes.set_ylabel("worse of protected and own\n(0: the base has as much)", color=INK)
    axes.set_title("What the best merge gets for a thief of all tasks", fontsize=11, color=INK)
    axes.legend(handles.values(), [NAMES[name] for name in handles], fontsize=8, frameon=False)
    axes.margins(y=0.12)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
