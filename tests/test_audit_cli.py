"""`unmergeable audit` as it is typed: text, JSON, notes and exit codes of a real audit; and its completion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import thief_cases
from audit_cases import shared_configuration, zoo
from unmergeable import _completion, _parser, cli
from unmergeable.audit.results import AuditResult

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of the audit that all tests share, in a folder of its own."""
    fields = shared_configuration(zoo(tmp_path_factory))
    (tmp_path / "audit.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return Path("audit.yaml")


def run(
    capsys: pytest.CaptureFixture[str], shared: tuple[Path, AuditResult], *arguments: str
) -> tuple[int, str, str]:
    code = cli.main(
        ["audit", "audit.yaml", "-o", "out", "-w", "1", "--cache", str(shared[0] / "cache"), *arguments]
    )
    out, err = capsys.readouterr()
    return code, out, err


def test_text(config: Path, shared: tuple[Path, AuditResult], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, shared)
    assert code == 0
    lines = out.splitlines()
    assert re.match(r"audited +\S*/locked$", lines[0])
    result = shared[1]
    score = f"{result.standalone['plain']:.4f}"  # an exact lock leaves it as it is
    assert (
        lines[1].split() == f"task {thief_cases.PROTECTED}, {score} before protection, {score} after".split()
    )
    assert lines[2].split() == ["thief's", "own", "moons,", "suns"]
    for level in result.as_dict()["levels"]:
        assert level["verdict"] in lines
        for floor in result.level(level["level"]).floors:
            taken = [line for line in lines if re.match(rf"{level['level']} +{floor.floor:.2f} ", line)]
            assert len(taken) == 1
            figures = [f"{floor.chosen[side].value:+.2f}" for side in ("protected", "plain", "without")]
            assert taken[0].split()[-3:] == figures
    assert lines[-1] == "written: out/report.html, out/results.json"
    doubtful = [row for row in result.rows if row.side == "protected" and row.state != "done"]
    assert ("not counted as protection:" in lines) == bool(doubtful)
    for row in doubtful:
        assert f"  {row.attack} ({row.state}): {row.reason}" in lines
    assert err == (
        "unmergeable: only a part of the suite was run: the figures are those of the attacks that were named\n"
    )
    assert sorted(path.name for path in Path("out").iterdir()) == ["report.html", "results.json"]


def test_json(config: Path, shared: tuple[Path, AuditResult], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, shared, "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["document"], document["version"]) == ("unmergeable.audit", 1)
    assert document == json.loads(Path("out/results.json").read_text())
    assert document["command"] == "unmergeable audit audit.yaml -o out"


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_requirement_decides_the_exit_code(
    share: float, config: Path, shared: tuple[Path, AuditResult], capsys: pytest.CaptureFixture[str]
) -> None:
    lower = 1 - shared[1].level(0).interval[1]
    code, _, err = run(capsys, shared, "--require", f"0={share}", "--require", "1=0.5")
    held = lower >= share
    assert held == (share == 0.01)
    assert code == 1  # level 1 is not protected at all
    said = [line for line in err.splitlines() if "error" in line]
    expected = (
        []
        if held
        else [f"unmergeable: error: protection at level 0 is not 0.99: its lower limit is {lower:.2f}"]
    )
    lowest = 1 - shared[1].level(1).interval[1]
    assert said == [
        *expected,
        f"unmergeable: error: protection at level 1 is not 0.5: its lower limit is {lowest:.2f}",
    ]
    code, _, err = run(capsys, shared, "--require", f"0={share}")
    assert code == (0 if held else 1)
    assert json.loads(Path("out/results.json").read_text())["holds"] is held


def test_what_cannot_be_judged_does_not_hold(
    config: Path, shared: tuple[Path, AuditResult], capsys: pytest.CaptureFixture[str]
) -> None:
    fields = yaml.safe_load(config.read_text()) | {"attacks": ["task_arithmetic"]}
    config.write_text(yaml.safe_dump(fields))
    code, out, err = run(capsys, shared, "--require", "1=0", "--budget", "10")
    assert code == 1
    assert "protection at level 1 is not 0: it could not be judged" in err
    assert "Level 1 (adaptive, no data): not judged." in out


def test_data_that_are_wrong_are_bad_input(
    config: Path, shared: tuple[Path, AuditResult], capsys: pytest.CaptureFixture[str]
) -> None:
    fields: Any = yaml.safe_load(config.read_text())
    fields["tasks"]["moons"]["limit"] = 3
    config.write_text(yaml.safe_dump(fields))
    code, out, err = run(capsys, shared)
    assert (code, out) == (3, "")
    assert "task moons: too few examples to choose on some and report on others, expected 4, got 3" in err
    assert not Path("out/results.json").exists()


def test_completion_knows_the_verb() -> None:
    (verb,) = [one for one in _completion._verbs(_parser.build_parser()) if one.name == "audit"]
    flags = {flag for option in verb.options for flag in option.flags}
    assert flags >= {
        "--output",
        "--workers",
        "--budget",
        "--require",
        "--cache",
        "--init",
        "--plain",
        "--json",
        "--quiet",
    }
    for shell in _completion.SHELLS:
        assert "audit" in _completion.completion(_parser.build_parser(), shell)
