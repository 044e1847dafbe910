"""The audit's report as text: everything of the document is in it, escaped, and it needs nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from report_document import CSS, HOSTILE, LONG, Node, Tree, document
from unmergeable.audit.report import render
from unmergeable.audit.report.tables import pairs
from unmergeable.errors import InputError

TAGS = {
    "html", "head", "meta", "link", "title", "style", "body", "main", "header", "footer", "section", "nav",
    "figure", "figcaption", "details", "summary", "div", "p", "span", "strong", "em", "h1", "h2", "h3", "ol", "ul",
    "li", "dl", "dt", "dd", "a", "abbr", "code", "pre",
    "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td",
    "svg", "g", "defs", "path", "use", "rect", "line", "text", "clippath",
}  # fmt: skip


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
            assert cells[10:13] == [f"{row['cost'][key]:,}" for key in ("inputs", "labelled", "tokens")]
            assert ("not prepared" in cells[15]) == (control["chain"] != row["chain"])
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


def test_a_chain_stands_beside_what_is_left_of_it_on_the_unprotected_model() -> None:
    def row(*chain: str, side: str = "protected") -> dict[str, Any]:
        return {"chain": list(chain), "side": side, "level": 1, "test": None}

    controls = [row("ties", side="plain"), row("quantise-4", "ties", side="plain")]
    targets = [row("align", "quantise-4", "ties"), row("align", "ties"), row("align", "wide")]
    (found,) = pairs([*controls, *targets])[0].values()
    assert [(pair.row, pair.control, pair.own) for pair in found] == [
        (targets[0], controls[1], False), (targets[1], controls[0], False), (targets[2], None, False),
    ]  # fmt: skip


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
