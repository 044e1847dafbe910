"""What a report shows of figures: numbers, bars, curves and heat maps, in colours that can be told apart."""

from __future__ import annotations

import re
from typing import Any

import pytest

from report_document import CSS, Tree
from unmergeable.audit.report import bars, curve, numerals, tables


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numerals.figure(-0.004), "0.00"),
        (numerals.figure(-0.306), "−0.31"),
        (numerals.figure(float("nan")), "–"),
        (numerals.figure(None), "–"),
        (numerals.figure(float("-inf")), "−∞"),
        (numerals.percent(0.876), "88\xa0%"),
        (numerals.percent(-0.034), "−3\xa0%"),
        (numerals.count(999_999), "999,999"),
        (numerals.count(1_234_567.0), "1.23\xa0M"),
        (numerals.count(51_200_000_000), "51.2\xa0B"),
        (numerals.duration(0.83), "0.8\xa0s"),
        (numerals.duration(99), "99\xa0s"),
        (numerals.duration(754), "13\xa0min"),
        (numerals.duration(9000), "2.5\xa0h"),
        (numerals.times(3.42), "3.4\xa0×"),
        (numerals.setting(0.85), "0.85"),
        (numerals.setting(-1e-05), "−1e−05"),
        (numerals.typeset("top-5, -12% and 95 % of (Σ G -0.03) in 2-3 steps, -0%"),
         "top-5, −12\xa0% and 95\xa0% of (Σ G −0.03) in 2-3 steps, 0\xa0%"),
        (numerals.sentence("out of memory"), "Out of memory."),
        (numerals.cell(0.00012).text, "1.20e−04"),
        (numerals.cell({"validation": 200, "kept": [True, None]}).text, "validation 200, kept yes, –"),
    ],
)  # fmt: skip
def test_numbers(text: str, expected: str) -> None:
    assert text == expected


def level(recovered: float | None, low: float | None, high: float | None, reliable: bool = True) -> Any:
    return {"recovered": recovered, "interval": [low, high], "reliable": reliable}


def test_bars_clip_nothing() -> None:
    levels = [
        level(0.4, 0.2, 0.6),
        level(-0.25, -0.5, 0.0),
        level(1.2, 1.0, 1.5),
        level(9.0, 8.0, 9.9, False),
    ]
    scale = bars.scale(levels)
    assert (scale.low, scale.high) == (-0.5, 1.5)
    first, negative, above, unjudged = (bars.bar(one, scale) for one in levels)
    assert unjudged is None
    assert bars.bar(level(None, None, None), scale) is None
    assert first is not None
    assert (first.zero, first.one) == (25, 75)
    assert (first.start, first.width, first.low, first.high) == (25, 20, 35, 55)
    assert [(at, anchor) for _, at, anchor in first.labels] == [(25, "middle"), (75, "middle")]
    assert negative is not None
    assert (negative.start, negative.width, negative.low) == (12.5, 12.5, 0)
    assert above is not None
    assert (above.start, above.width, above.high) == (25, 60, 100)
    assert bars.scale([]) == bars.Scale(0.0, 1.0)


@pytest.mark.parametrize(
    "points",
    [
        {"protected": [(0, 0.1)], "plain": [(0, 0.4)]},
        {"protected": [(0, -0.2), (300.0, 0.1)], "plain": [(0, 0.4), (1e9, 1.3)]},
        {"plain": [(5000, 0.4), (5001, 0.5)]},
        {"protected": [(0.5, 0.4)]},
    ],
)
def test_curves_of_every_kind(points: dict[str, Any]) -> None:
    curves = curve.clean({"protected": [], "plain": [], **points})
    svg = curve.draw(curves)
    drawing = Tree(svg).root
    texts = [node.text for node in drawing.find("text")]
    assert {"forward passes spent", "what the thief gets (mean gain)"} <= set(texts)
    assert ("protected" in texts, "unprotected" in texts) == ("protected" in curves, "plain" in curves)
    if any(price == 0 for one in curves.values() for price, _ in one):
        assert "0" in texts
    used = set(re.findall(r"#[0-9a-f]{6}\b", svg))
    assert used == set()  # no colour but the page's
    assert "var(--ink)" in svg
    assert not re.search(r"font-family|DejaVu|xmlns|<style|<metadata", svg)


def test_a_curve_in_words() -> None:
    told = curve.words({"plain": [(0, 0.25), (4000, 0.5), (2.5e6, 0.45)], "protected": [(100, 0.0)]})
    assert told == [
        "With the unprotected model a thief gets 0.25 for no forward pass, and 0.50 at most, from 4,000 forward "
        "passes on.",
        "With the protected model a thief gets 0.00 for 100 forward passes, and no more for any price that was "
        "tried.",
    ]
    assert curve.words({}) == [
        "With the unprotected model nothing was measured.", "With the protected model nothing was measured."
    ]  # fmt: skip
    nothing = {"plain": [[100, None], [200, float("nan")]], "protected": [[0, 0.5]]}
    assert curve.clean(nothing) == {"protected": [(0.0, 0.5)]}
    assert curve.steps({"plain": [(1, 0.25), (4, 0.5)], "protected": [(2, 0.1)]}) == [
        (1, None, 0.25), (2, 0.1, 0.25), (4, 0.1, 0.5)
    ]  # fmt: skip


def test_heat_maps_mark_the_best_and_survive_gaps() -> None:
    grid = {
        "xs": [0.1, 0.2],
        "ys": [1, 2],
        "protected": [[None, -0.4], [0.5, 1.7]],
        "plain": [[float("nan"), None]] * 2,
    }
    protected, unprotected = tables.heats(grid)
    assert [[cell.mix for cell in line] for line in protected.rows] == [[0, 0], [50, 100]]
    assert [[cell.best for cell in line] for line in protected.rows] == [[False, False], [False, True]]
    assert protected.best == (1.7, 0.2, 2)
    assert unprotected.best is None


# --- colours ------------------------------------------------------------------------------------------------


def palettes() -> list[dict[str, str]]:
    """The page's colours in light and in dark."""
    blocks = re.findall(r":root \{(.*?)\}", CSS.read_text(encoding="utf-8"), re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in blocks]


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_every_ground(dark: bool) -> None:
    both = palettes()
    assert len(both) == 2
    colours = {name: rgb(value) for name, value in both[dark].items()}
    for ground in ("paper", "faint"):
        for text in ("ink", "muted"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for text in ("holds", "fails", "warns"):
        assert contrast(colours[text], colours["paper"]) >= 4.5, text
    for share in range(101):  # heat maps: color-mix in srgb
        mixed = tuple(
            a * share / 100 + b * (1 - share / 100)
            for a, b in zip(colours["heat"], colours["faint"], strict=True)
        )
        assert contrast(colours["ink"], mixed) >= 4.5, share
    for line in ("protected", "plain"):  # of figures: 3:1
        assert contrast(colours[line], colours["paper"]) >= 3, line
