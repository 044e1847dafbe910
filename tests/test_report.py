"""The audit's report as text: everything of the document is in it, escaped, and it needs nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from report_document import HOSTILE, LONG, document
from unmergeable.audit.report import bars, curve, numerals, render, tables
from unmergeable.errors import InputError

CSS = Path(render.__code__.co_filename).parent / "templates" / "style.css"
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
TAGS = {
    "html", "head", "meta", "link", "title", "style", "body", "main", "header", "footer", "section", "nav",
    "figure", "figcaption", "details", "summary", "div", "p", "span", "strong", "em", "h1", "h2", "h3", "ol", "ul",
    "li", "dl", "dt", "dd", "a", "abbr", "code", "pre",
    "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td",
    "svg", "g", "defs", "path", "use", "rect", "line", "text", "clippath",
}  # fmt: skip


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


def plain(text: str) -> str:
    """Text without what typesetting does to it: kinds of spaces and of minus signs."""
    return re.sub(r" %", "%", " ".join(text.replace("−", "-").split()))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return document()


@pytest.fixture(scope="module")
def page(found: dict[str, Any]) -> str:
    return render(found)


@pytest.fixture(scope="module")
def tree(page: str) -> Node:
    return Tree(page).root


def test_the_document_has_what_a_report_must_cope_with(found: dict[str, Any]) -> None:
    # Else the tests below would pass for want of cases.
    assert {row["state"] for row in found["rows"]} == {"done", "refused", "unreliable", "failed"}
    assert {row["side"] for row in found["rows"]} == {"protected", "plain", "without"}
    assert len(found["rows"]) >= 60
    assert found["left_out"]
    assert found["notes"]
    assert [level["reliable"] for level in found["levels"]] == [True, True, False, True]
    assert found["levels"][2]["recovered"] is None
    assert {requirement["holds"] for requirement in found["requirements"]} == {True, False}
    assert sum(task["role"] == "own" for task in found["tasks"].values()) == 3
    assert any(value is None for line in found["grid"]["protected"] for value in line)
    assert max(row["test"]["joint"] for row in found["rows"] if row["test"]) > 0.5


def test_nests_well_and_uses_no_other_element(tree: Node) -> None:
    assert {node.tag for node in tree.walk()} - {""} <= TAGS
    ids = Counter(node.attributes["id"] for node in tree.walk() if "id" in node.attributes)
    assert [name for name, count in ids.items() if count > 1] == []


def test_verdicts_and_requirements_in_words(found: dict[str, Any], tree: Node) -> None:
    (verdicts,) = [node for node in tree.find("section") if "verdicts" in node.classes]
    levels = verdicts.find("li")
    assert len(levels) == len(found["levels"])
    for level, shown in zip(found["levels"], levels, strict=True):
        assert plain(level["verdict"]) in plain(shown.text)
        assert bool(shown.find("svg")) == level["reliable"]
        if level["reliable"]:
            assert f"{level['recovered']:.0%} recovered" in plain(shown.text)
            low, high = level["interval"]
            assert f"95% interval: {low:.0%} to {high:.0%}" in plain(shown.text)
        else:
            assert "not judged" in shown.text
        for requirement in found["requirements"]:
            if requirement["level"] == level["level"]:
                word = "holds" if requirement["holds"] else "fails"
                assert f"{word} Required at level {level['level']}: protection of at least" in shown.text
    assert "fails Not everything that was required holds." in tree.text


def test_every_row_beside_its_control(found: dict[str, Any], tree: Node) -> None:
    rows = {row["id"]: row for row in found["rows"]}
    lines = {}
    for line in tree.find("tr"):
        for node in line.walk():
            if node.attributes.get("id", "").startswith("row-"):
                lines[int(node.attributes["id"].removeprefix("row-"))] = line
    assert set(lines) == set(rows)  # every row has its place
    for number, row in rows.items():
        cells = [node.text for node in lines[number].children if isinstance(node, Node)]
        text = lines[number].text
        if row["chain"][-1] == "proof":
            assert cells[0] == f"{row['chain'][0]} {row['about']}"
            assert f"attacked {row['facts']['attacked']:.3f}" in cells[1]
            continue
        assert cells[0].startswith(row["attack"])
        assert row["state"] in text
        if row["reason"]:
            assert row["reason"] in text
        # Where its three values stand: first of all, third of all, or first beside another row's.
        start = {"protected": 3, "plain": 6, "without": 4}[row["side"]]
        assert cells[start : start + 3] == values(row)
        if row["side"] == "protected":
            control = control_of(row, found["rows"])
            assert cells[6:9] == values(control)
            assert cells[1] == ", ".join(row["needs"])
            assert cells[2] == str(row["tried"])
            assert cells[10] == str(row["cost"]["labelled"])
            assert ("not prepared" in cells[13]) == (control["chain"] != row["chain"])
        if row["options"]:
            best = f"Best: weight {row['options']['weight']:g}, density 0.5."
            assert best in text or row["side"] == "plain"


def values(row: dict[str, Any]) -> list[str]:
    """Task, own and joint as they are printed."""
    if row["test"] is None:
        return ["–"] * 3
    printed = [f"{row['test'][key]:.2f}" for key in ("protected", "own", "joint")]
    return [one.removeprefix("-") if float(one) == 0 else one.replace("-", "−") for one in printed]


def control_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same chain on the unprotected model, else its merge alone."""
    controls = {tuple(one["chain"]): one for one in rows if one["side"] == "plain"}
    return controls.get(tuple(row["chain"])) or controls[row["chain"][-1],]


def test_reservations_notes_and_reproduction(found: dict[str, Any], tree: Node) -> None:
    (table,) = [node for node in tree.find("table") if "Attacks with a reservation" in node.text]
    for row in found["rows"]:
        assert row["reason"] is None or plain(row["reason"]) in plain(table.text)
    for one in found["left_out"]:
        assert f"{one['attack']} {one['level']}" in table.text
        assert one["reason"] in table.text
    for note in found["notes"]:
        assert note in tree.text
    pre = [node.text for node in tree.find("pre")]
    assert pre[0] == found["command"]
    configuration = "".join(str(child) for child in tree.find("pre")[1].find("code")[0].children)
    assert json.loads(configuration) == found["config"]
    for value in (f"seed {found['seed']}", f"suite {found['suite']}", f"unmergeable {found['tool']}"):
        assert value in tree.text
    for value in ("processor x86_64", "cores 2", "memory, GiB 7.8", "torch 2.13.0"):
        assert value in tree.text
    assert "A lock stops merges off the shelf." in tree.text


def test_models_tasks_and_hashes(found: dict[str, Any], tree: Node) -> None:
    titles = {node.attributes["title"] for node in tree.find("abbr")}
    for kind in ("models", "tasks"):
        for name, one in found[kind].items():
            assert name in tree.text
            assert one["sha256"] in titles
            assert one["sha256"] in tree.text  # for paper, and where nothing hovers
    assert LONG in tree.text
    for level in found["levels"]:
        for floor in level["floors"]:
            for side in ("protected", "plain", "without"):
                assert f"{floor[side]['value']:.2f}".replace("-0.00", "0.00").replace("-", "−") in tree.text


def test_needs_nothing_else(page: str, tree: Node) -> None:
    assert not re.search(r"https?://|//[a-z]", page)
    assert "<script" not in page
    for node in tree.walk():
        for name, value in node.attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert value.startswith(("#", "data:")), value
            assert "url(" not in value or re.search(r"url\(#[\w-]+\)", value)
    anchors = {node.attributes.get("id") for node in tree.walk()}
    for node in tree.find("a", "use"):
        assert node.attributes["href"].removeprefix("#") in anchors
    assert "url(" not in CSS.read_text(encoding="utf-8")
    assert "@import" not in page
    policy = [node for node in tree.find("meta") if "http-equiv" in node.attributes]
    assert policy[0].attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert tree.find("html")[0].attributes["lang"] == "en"


def test_headings_go_down_by_one(tree: Node) -> None:
    levels = [int(node.tag[1]) for node in tree.find("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_tables_say_what_they_are(tree: Node) -> None:
    tables = tree.find("table")
    assert len(tables) >= 10
    for table in tables:
        caption = table.children[1]
        assert isinstance(caption, Node)
        assert caption.tag == "caption"
        assert caption.text
        headers = table.find("th")
        assert {node.attributes.get("scope") for node in headers} <= {"col", "row", "colgroup", "rowgroup"}
        assert all(node.text for node in headers)
        assert {"col", "row"} <= {node.attributes["scope"] for node in headers}
    frames = [node for node in tree.walk() if "frame" in node.classes]
    assert len(frames) == len(tables)
    labels = [node.attributes["aria-label"] for node in frames]
    assert len(set(labels)) == len(labels)
    assert all(node.attributes["tabindex"] == "0" for node in frames)


def spoilt(value: Any) -> Any:
    """A document in which every name and text that is not of a fixed set is hostile."""
    fixed = {"side", "state", "document", "metric", "role"}
    if isinstance(value, dict):
        return {key: one if key in fixed else spoilt(one) for key, one in value.items()}
    if isinstance(value, list):
        return [spoilt(one) for one in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_text_of_others_is_text(found: dict[str, Any]) -> None:
    hostile = spoilt(document(name=HOSTILE + LONG, task=HOSTILE))
    hostile["models"][f"{HOSTILE} own"] = {**hostile["models"]["digits"], "role": HOSTILE, HOSTILE: HOSTILE}
    hostile["machine"][HOSTILE] = hostile["standalone"][HOSTILE] = 1
    page = render(hostile)
    tree = Tree(page).root
    assert {node.tag for node in tree.walk()} - {""} <= TAGS
    names = {name for node in tree.walk() for name in node.attributes}
    assert names <= {name for node in Tree(render(found)).root.walk() for name in node.attributes}
    assert "<script" not in page.lower()
    assert tree.text.count("<script>alert(1)</script>&\"'") > 200
    assert HOSTILE in " ".join(node.text for node in tree.find("pre"))


def test_same_document_same_bytes(found: dict[str, Any], page: str) -> None:
    assert render(found) == page
    code = (
        "import json, sys; from unmergeable.audit.report import render;"
        "sys.stdout.buffer.write(render(json.load(sys.stdin)).encode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(found).encode(),
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode() == page


def test_an_audit_that_found_nothing() -> None:
    empty = document() | {
        "levels": [], "rows": [], "grid": None, "left_out": [], "notes": [], "requirements": [], "holds": True,
        "curve": {"protected": [], "plain": []}, "models": {}, "tasks": {}, "standalone": {}, "machine": {},
        "seconds": None
    }  # fmt: skip
    tree = Tree(render(empty)).root
    for sentence in (
        "No protection was required of it",
        "there is no curve",
        "The coefficient grid was not tried.",
        "No attack was tried on the protected model.",
        "Nothing: every attack of the suite ran",
    ):
        assert sentence in tree.text
    assert "nan" not in tree.text.lower().split()
    named = render(empty | {"config": {**empty["config"], "attacks": ["full_dose"]}})
    assert "every attack that was named ran" in Tree(named).root.text


def test_a_requirement_of_a_level_that_was_not_audited(found: dict[str, Any]) -> None:
    asked = {"level": 7, "protection": 0.9, "found": None, "holds": False}
    tree = Tree(render({**found, "requirements": [asked], "holds": False})).root
    assert "fails Required at level 7: protection of at least 90 %. It could not be measured." in tree.text


@pytest.mark.parametrize("change", [{"document": "unmergeable.lock"}, {"version": 2}, {"document": None}])
def test_refuses_another_document(found: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"expected unmergeable\.audit, version 1"):
        render({**found, **change})


def test_refuses_half_a_document(found: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not whole, expected grid"):
        render({key: value for key, value in found.items() if key != "grid"})


def test_four_hundred_rows_in_a_second() -> None:
    large = document(copies=7)
    assert len(large["rows"]) >= 400
    spent = []
    for _ in range(3):
        start = time.process_time()
        render(large)
        spent.append(time.process_time() - start)
    assert min(spent) < 1


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
