"""The demo on fewer images: every lock verifies and comes off, and merges of what is locked fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unmergeable import _demo_audit, _demo_scores, demo, zoo
from unmergeable.cli import main
from unmergeable.demo import DemoResult
from unmergeable.errors import InputError
from unmergeable.methods import METHODS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def result(folder: Path) -> Iterator[DemoResult]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_demo_scores, "CHOOSE", 48)
        patch.setattr(_demo_scores, "REPORT", 96)
        patch.setattr(_demo_audit, "LIMIT", 120)
        yield demo(folder)


def test_every_lock_holds_and_comes_off(result: DemoResult) -> None:
    none, *locks = result.locks
    assert [lock.method for lock in locks] == list(METHODS)
    assert none.verified is None
    assert none.standalone == result.plain[result.protected]
    for lock in locks:
        assert lock.verified
        assert abs(lock.standalone - none.standalone) <= 0.02
        assert lock.output_change < 1e-2
    exact = locks[0]
    assert exact.undone == "bit for bit"
    assert exact.output_change < 1e-5
    assert all(isinstance(lock.undone, str) or lock.undone < 1e-2 for lock in locks)


def test_merges_of_what_is_locked_fail(result: DemoResult) -> None:
    none, *locks = result.locks
    assert none.joint > 0.3
    for lock in locks:
        assert lock.joint < none.joint / 2, lock.method
    exact = {merge.method: merge for merge in locks[0].merges}
    assert set(exact) == {"task_arithmetic", "ties", "full_dose"}
    assert len(exact["full_dose"].points) == 36


def test_the_base_is_zero_and_the_fine_tune_is_one(result: DemoResult) -> None:
    assert result.alone[0] == pytest.approx(1.0)
    assert result.alone[1] < 0.5
    assert set(result.base) == set(result.plain) == {result.protected, *result.own} == set(zoo.tasks())
    assert all(result.plain[task] > result.base[task] + 0.1 for task in result.plain)


def test_the_files_are_written(result: DemoResult, folder: Path) -> None:
    document = json.loads((folder / "demo.json").read_text())
    assert (document["document"], document["version"]) == ("unmergeable.demo", 1)
    assert document == json.loads(json.dumps(result.as_dict()))
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["audit", "demo.json", "demo.png"]
    assert sorted(path.name for path in (folder / "audit").iterdir()) == ["report.html", "results.json"]
    report = (folder / "audit" / "report.html").read_text(encoding="utf-8")
    assert len(result.audit) == 2
    assert all(verdict.partition(":")[0] in report for verdict in result.audit)


def test_the_text_names_every_merge(
    result: DemoResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["unmergeable.demo"], "demo", lambda *args, **keywords: result)
    assert main(["demo", "-q"]) == 0
    text = capsys.readouterr().out
    for lock in result.locks:
        for merge in lock.merges:
            assert any(line.split()[:2] == [lock.method, merge.method] for line in text.splitlines())


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        demo(tmp_path / "out")
