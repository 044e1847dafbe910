"""results.json and report.html of a real audit: their form, and that they say the same."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import thief_cases
import unmergeable as um
from audit_cases import ATTACKS, QUICK, REQUIRED, audit, configuration
from audit_form import FORM, complaints
from unmergeable._parser import build_parser
from unmergeable.attacks.prepare import COLLUDE
from unmergeable.audit.jobs import PROOF
from unmergeable.audit.report import render
from unmergeable.audit.results import AuditResult
from unmergeable.audit.rows import SIDES
from unmergeable.audit.scores import FLOORS

pytestmark = pytest.mark.filterwarnings("ignore")
PROTECTED, OWN = thief_cases.PROTECTED, thief_cases.OWN


def test_results_have_the_form_of_version_1(shared: tuple[Path, AuditResult]) -> None:
    folder, result = shared
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (document["document"], document["version"]) == ("unmergeable.audit", 1)
    assert document["tool"] == um.__version__
    assert document == json.loads(json.dumps(result.as_dict()))
    assert complaints(document, FORM) == []
    assert document["floors"] == list(FLOORS)
    assert sorted(os.listdir(folder)) == ["cache", "report.html", "results.json"]
    assert result.files == (str(folder / "report.html"), str(folder / "results.json"))


def test_rows_refer_to_each_other(shared: tuple[Path, AuditResult]) -> None:
    document = shared[1].as_dict()
    rows = document["rows"]
    assert [row["id"] for row in rows] == list(range(len(rows)))
    for level in document["levels"]:
        for floor in level["floors"]:
            for side in SIDES:
                number = floor[side]["row"]
                if number is not None:
                    assert rows[number]["side"] in (side, "without")
                    assert rows[number]["level"] <= level["level"]
        grounds = level["stands_on"]
        assert [one["level"] for one in grounds] == list(range(level["level"] + 1))
        assert all(rows[one["row"]]["attack"] == one["attack"] for one in grounds)
        assert "full_dose" in rows[grounds[0]["row"]]["chain"]
    assert rows[document["levels"][1]["stands_on"][1]["row"]]["chain"][0] == "anchor-coupled"
    for row in rows:
        if row["test"] is not None:
            assert row["test"]["joint"] == min(row["test"]["protected"], row["test"]["own"])
            assert set(row["scores"]) == set(thief_cases.CLASSES)


def test_the_report_says_what_the_results_say(shared: tuple[Path, AuditResult]) -> None:
    folder, result = shared
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    for name in (*thief_cases.CLASSES, "anchor-coupled", "full_dose", COLLUDE, "quantise-4"):
        assert name in page
    assert result.as_dict()["models"]["protected"]["sha256"] in page
    assert page.count("It stands on") == len(result.levels)


def test_the_report_says_what_is_not_counted(shared: tuple[Path, AuditResult]) -> None:
    document = shared[1].as_dict()
    said = "not counted on any side, for they failed on the protected model: ties"
    document["levels"][0]["notes"] = [said]
    assert f"{said[:1].upper()}{said[1:]}." in render(document)
    for level in document["levels"]:  # as earlier audits have written them
        del level["notes"], level["stands_on"]
    assert "It stands on" not in render(document)


def test_there_are_rows_on_all_sides(shared: tuple[Path, AuditResult]) -> None:
    result = shared[1]
    tried = {(row.attack, row.side) for row in result.rows}
    for name in ("task_arithmetic", "ties"):
        assert {side for attack, side in tried if attack == name} == set(SIDES)
    assert {side for attack, side in tried if attack == "full_dose"} == {"protected", "plain"}
    assert (f"anchor-coupled > {PROOF}", "plain") in tried
    assert ("anchor-coupled > full_dose", "protected") in tried
    for prepared in ("anchor-coupled", "quantise-4", COLLUDE):
        assert {(f"{prepared} > probe", side) for side in ("protected", "plain")} <= tried
    assert len(tried) == len(result.rows)
    assert {row.attack.split(" > ")[-1] for row in result.rows} <= {*ATTACKS, "probe", PROOF}
    assert result.left_out == []
    assert (
        "only a part of the suite was run: the figures are those of the attacks that were named"
        in result.notes
    )


def test_requirements_are_judged(shared: tuple[Path, AuditResult]) -> None:
    result = shared[1]
    low, high = result.requirements
    assert (low.level, low.holds) == (0, True)
    assert (high.level, high.holds) == (1, False)
    assert low.found == 1 - result.level(0).interval[1]
    assert not result.holds
    assert replace(result, requirements=(low,)).holds
    with pytest.raises(KeyError):
        result.level(2)


def test_the_command_does_it_again(shared: tuple[Path, AuditResult], models: Path, tmp_path: Path) -> None:
    assert shared[1].command == f"unmergeable.audit(config, {str(shared[0])!r}, require={REQUIRED!r})"
    path = tmp_path / "it's an audit.yaml"
    path.write_text(yaml.safe_dump(configuration(models, attacks=QUICK)))
    result = audit(path, tmp_path / "out", cache=shared[0] / "cache")
    again = f"""unmergeable audit '{tmp_path}/it'"'"'s an audit.yaml' -o {tmp_path}/out"""
    assert result.command == again
    # What decides the exit code, and what was left out, belongs to it.
    more = {"require": {0: 0.25}, "budget": 30.0}
    result = audit(path, tmp_path / "out", cache=shared[0] / "cache", **more)
    assert result.command == f"{again} --require 0=0.25 --budget 30"
    parsed = vars(build_parser().parse_args(shlex.split(result.command)[1:]))
    assert (dict(parsed["require"]), parsed["budget"]) == tuple(more.values())
