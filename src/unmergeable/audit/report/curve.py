"""The security curve: what a thief gets for what he spends, as a figure and in words.

The figure is an SVG that stands in the page: its text is text in the page's font, its colours are the page's
variables, so that it follows a dark mode, and the same points give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .numerals import SPACE, count, figure, known

Points = Sequence[tuple[float, float]]

SIZE = (4.4, 3.2)  # inches
TICKS = 5  # decades with a label, at most
# What matplotlib draws with, and what the page has instead.
COLOURS = {
    "#010201": "var(--ink)",
    "#010202": "var(--line)",
    "#010203": "var(--plain)",
    "#010204": "var(--protected)",
    "#010205": "var(--muted)",
}
INK, LINE, PLAIN, PROTECTED, MUTED = COLOURS
# Side, its label, colour, dashes and width: the unprotected model is drawn last, so that both can be seen.
LINES: tuple[tuple[str, str, str, Any, float], ...] = (
    ("protected", "protected", PROTECTED, "solid", 2.4),
    ("plain", "unprotected", PLAIN, (0, (4, 2)), 1.6),
)
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "unmergeable", "path.simplify": False}


def clean(curve: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, list[tuple[float, float]]]:
    """The curves that have points, without those that are no numbers."""
    made = {
        side: sorted((float(price), float(gain)) for price, gain in curve.get(side, ()) if known(gain))
        for side in ("protected", "plain")
    }
    return {side: points for side, points in made.items() if points}


def draw(curves: Mapping[str, Points]) -> str:
    """The figure as an SVG element for a page that defines the colours. There must be points."""
    with matplotlib.rc_context(_STYLE):
        image = Figure(figsize=SIZE, layout="constrained")
        axes = image.subplots()
        edge = _horizontal(axes, [price for points in curves.values() for price, _ in points])
        for side, label, colour, dashes, width in LINES:
            if side in curves:
                prices, gains = zip(*curves[side], strict=True)
                axes.plot(
                    [*prices, edge],
                    [*gains, gains[-1]],
                    drawstyle="steps-post",
                    color=colour,
                    linestyle=dashes,
                    linewidth=width,
                    label=label,
                )
                axes.plot(prices[:1], gains[:1], "o", color=colour, markersize=4)
        _vertical(axes, [gain for points in curves.values() for _, gain in points])
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=2,
            frameon=False,
            fontsize=10,
            labelcolor=INK,
            borderaxespad=0.2,
            handlelength=2.4,
        )
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        image.savefig(written, format="svg", transparent=True, metadata=nothing)
    return _inline(written.getvalue())


def _horizontal(axes: Any, prices: Sequence[float]) -> float:
    """The scale of prices, logarithmic with a place for 0; returns its upper end."""
    positive = [price for price in prices if price > 0]
    first = math.floor(math.log10(min(positive, default=1)))
    last = max(math.ceil(math.log10(1.2 * max(positive, default=1))), first + 1)
    every = math.ceil((last - first) / TICKS)
    ticks = [10.0**power for power in range(first, last + 1, every)]
    if min(prices) <= 0:
        # Half a decade of its own for 0: linear up to the first power of ten.
        axes.set_xscale("symlog", linthresh=10.0**first, linscale=0.5)
        axes.set_xlim(-(10.0 ** (first - 1)), 10.0**last)
        ticks = [0.0, *ticks]
    else:
        axes.set_xscale("log")
        axes.set_xlim(10.0**first, 10.0**last)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda price, _: _price(price)))
    axes.set_xlabel("forward passes spent", color=INK, fontsize=10)
    return float(10.0**last)


def _vertical(axes: Any, gains: Sequence[float]) -> None:
    """The scale of gains: 0 to 1 at least, nothing clipped; and the frame."""
    low, high = min(0.0, *gains), max(1.0, *gains)
    margin = 0.04 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("what the thief gets (mean gain)", color=INK, fontsize=10)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda gain, _: figure(round(gain, 6), 1)))
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.axhline(0, color=MUTED, linewidth=0.9, zorder=1)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9.5, length=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)


def _price(price: float) -> str:
    """A round number of passes, short enough for a tick."""
    if 1000 <= price < 1e6:
        return f"{figure(price / 1000, 0)}{SPACE}k"
    for scale, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if price >= scale:
            return f"{figure(price / scale, 0)}{SPACE}{name}"
    return f"{price:g}"


def _inline(svg: str) -> str:
    """A written SVG file as an element of a page: no prologue, no sheet of its own, the page's colours and font."""
    svg = svg[svg.index("<svg") :].strip()
    # The page's parser knows the name spaces; a <style> in here would apply to all of the page.
    svg = re.sub(r"\s+xmlns(?::\w+)?=\"[^\"]*\"", "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"(?<=[\" ;])font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(
        r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true" focusable="false">', svg
    )
    for drawn, colour in COLOURS.items():
        svg = svg.replace(drawn, colour)
    return svg


def words(curves: Mapping[str, Points]) -> list[str]:
    """What the figure shows, a sentence a side."""
    names = {"plain": "the unprotected model", "protected": "the protected model"}
    told = []
    for side, name in names.items():
        points = curves.get(side)
        if not points:
            told.append(f"With {name} nothing was measured.")
            continue
        (first, gain), best = points[0], max(points, key=lambda point: point[1])
        sentence = f"With {name} a thief gets {figure(gain)} for {_passes(first)}"
        if best[1] > gain:
            sentence += f", and {figure(best[1])} at most, from {_passes(best[0])} on"
        else:
            sentence += ", and no more for any price that was tried"
        told.append(f"{sentence}.")
    return told


def _passes(price: float) -> str:
    return "no forward pass" if price <= 0 else f"{count(price)} forward passes"


def steps(curves: Mapping[str, Points]) -> list[tuple[float, float | None, float | None]]:
    """The table of the figure: at every price where one of them changes, the gain with either model."""
    prices = sorted({price for points in curves.values() for price, _ in points})

    def within(side: str, price: float) -> float | None:
        reached = [gain for spent, gain in curves.get(side, ()) if spent <= price]
        return reached[-1] if reached else None

    return [(price, within("protected", price), within("plain", price)) for price in prices]
