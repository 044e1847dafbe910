"""`unmergeable attack` and `um.attack`: reports as text and as JSON, options as attacks declare them."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import toy
import unmergeable as um
from unmergeable import _parser, _render_merge, cli
from unmergeable.attacks import ATTACKS, WITH_TASKS, AttackReport, attack_named, merge_attack_maker
from unmergeable.config import canonical_config, structure
from unmergeable.errors import UsageError
from unmergeable.options import declared

# What the document calls the needs of an attack.
NEEDS = {
    "anchor": "an anchor",
    "base": "the base",
    "experts": "fine-tunes",
    "inputs": "inputs",
    "labels": "labels",
    "key structure": "the method",
}
SIMPLE = [name for name in ATTACKS if set(attack_named(name).needs) <= {"anchor", "base"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a lock of it, and its spec as a file."""
    root = tmp_path_factory.mktemp("attack")
    toy.write(root / "model", toy.tensors())
    config = structure(canonical_config(toy.CONFIG, {}))
    (root / "spec.json").write_text(json.dumps({**toy.spec_dict(), "configs": [config]}))
    um.lock(root / "model", root / "locked", key=toy.key(), spec=toy.spec())
    return root


def test_the_parser_names_the_attacks_that_exist() -> None:
    assert tuple(dict.fromkeys((*ATTACKS, *WITH_TASKS))) == _parser.ATTACKS
    assert um.attack is import_module("unmergeable.attack").attack
    for name in WITH_TASKS:
        if name not in ATTACKS:
            with pytest.raises(UsageError, match=f"{name} needs tasks"):
                attack_named(name)


def rows(table: int) -> list[list[str]]:
    """The cells of a table of attacks in the document, the first or the second."""
    text = (Path(__file__).parents[1] / "docs" / "attacks.md").read_text(encoding="utf-8")
    part = text.split("## Attacks on tasks")[table]
    return [line.split("|")[1:-1] for line in part.splitlines() if line.startswith("| [`")]


def defaults(cell: str, made: Any) -> None:
    """A cell has the options of an attack, each with its default."""
    written = dict(re.findall(r"`(\w+)` ([\w-]+)", cell))
    known = {
        name: str(option.default).lower() if option.default is not None else "none"
        for name, option in declared(made).items()
    }
    assert written == known


def test_the_document_has_every_attack() -> None:
    assert [row[0].split("`")[1] for row in rows(0)] == list(ATTACKS)
    for name, needs, function, options, *_ in rows(0):
        found = attack_named(name.split("`")[1])
        assert needs.strip() == ", ".join(NEEDS[need] for need in found.needs)
        assert function.strip() == ("kept" if found.keeps_function else "lost")
        defaults(options, found.run)


def test_the_document_has_every_attack_on_tasks() -> None:
    assert [row[0].split("`")[1] for row in rows(1)] == list(WITH_TASKS)
    for name, needs, level, options, *_ in rows(1):
        maker = merge_attack_maker(name.split("`")[1])
        found = maker()
        assert needs.strip() == ", ".join(NEEDS[need] for need in found.needs)
        assert int(level) == found.access
        defaults(options, maker)


@pytest.mark.parametrize("name", SIMPLE)
def test_every_attack_reports_as_json_and_as_text(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [name, str(folder / "locked")]
    more = ["--base", str(folder / "model"), "--spec", str(folder / "spec.json"), "--seed", "5", "-q"]
    assert cli.main(["attack", *common, str(tmp_path / "a"), *more, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["document"], document["version"]) == ("unmergeable.attack", 1)
    fields = {field.name for field in dataclasses.fields(AttackReport)}
    assert document.keys() == {"document", "version", *fields}
    assert (document["attack"], document["seed"]) == (name, 5)
    assert document["after"] != document["before"]
    assert cli.main(["attack", *common, str(tmp_path / "b"), *more]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"by        {name}\n" in out
    assert f"{document['before']:.3f} before, {document['after']:.3f} after" in out
    assert ("kept, by construction" in out) == document["keeps_function"]
    for fact, value in document["facts"].items():
        assert fact in out or value is None
    assert toy.tree(tmp_path / "a") == toy.tree(tmp_path / "b")


def test_options_reach_the_attack(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder / "locked"), "--base", str(folder / "model"), "--spec", str(folder / "spec.json")]
    out = tmp_path / "out"
    settings = ["--set", "blocks=1", "--set", "part=mlp"]
    assert cli.main(["attack", "substitute-blocks", *arguments, str(out), *settings]) == 0
    made, locked, model = (toy.load(path) for path in (out, folder / "locked", folder / "model"))
    for name, value in made.items():
        mlp = name.startswith("l.1.") and name.split(".", 2)[2].startswith(("x", "gu", "down", "router"))
        assert (value == (model if mlp else locked)[name]).all(), name


def test_progress_is_told(folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    um.attack(
        "anchor-coupled", folder / "locked", tmp_path / "out", base=folder / "model", spec=toy.spec(),
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert told
    assert all(0 < done <= total and label for done, total, label in told)


def test_facts_of_any_form_are_readable(folder: Path, tmp_path: Path) -> None:
    report = um.attack(
        "align-permutation", folder / "locked", tmp_path / "out", base=folder / "model", spec=toy.spec()
    )
    facts = {
        "best_step": 3, "loss": 0.123456, "learnt": True, "none": None, "blocks": [0, 2],
        "values": {"mine": 0.5, "theirs": 1}, "steps": {"a": {"x": 1}, "b": {"x": 2, "y": 0.25}}, "empty": {},
    }  # fmt: skip
    text = _render_merge.attacked(
        dataclasses.replace(report, facts=facts, before=None, after=None, budget={})
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "best step 3",
        "loss 0.1235",
        "learnt true",
        "blocks 0, 2",
        "values value",
        "mine 0.5",
        "theirs 1",
        "steps x y",
        "a 1",
        "b 2 0.25",
    ):
        assert line in lines
    assert not [line for line in lines if line.startswith(("distance", "budget", "none", "empty"))]


def test_a_missing_package_is_named(folder: Path, tmp_path: Path) -> None:
    arguments = ["attack", "align-permutation", str(folder / "locked"), str(tmp_path / "out")]
    arguments += ["--base", str(folder / "model"), "--spec", str(folder / "spec.json")]
    code = (
        "import sys; sys.modules['scipy'] = None; from unmergeable import cli;"
        f"sys.exit(cli.main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "attack: a package is missing" in done.stderr
    assert "hint: pip install 'unmergeable[attack]'" in done.stderr
    assert not (tmp_path / "out").exists()
