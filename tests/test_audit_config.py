"""The configuration of an audit: what is accepted, and everything that is wrong with one, told at once."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmergeable.audit.config import MOST_BYTES, RESERVED, make_config, read_config
from unmergeable.audit.rows import LEVELS
from unmergeable.errors import InputError

MODELS = ("base", "locked", "plain", "digits", "latin")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Models that nobody opens, and data that nobody reads."""
    for name in MODELS:
        (tmp_path / name).mkdir()
    for name in ("one.npz", "two.csv", "hook.py"):
        (tmp_path / name).write_text("")
    return tmp_path


def fields(**changes: Any) -> dict[str, Any]:
    found = {
        "version": 1,
        "base": "base",
        "protected": {"model": "locked", "plain": "plain", "task": "fashion"},
        "others": {"digits": "digits"},
        "tasks": {
            "fashion": {"kind": "image-classification", "data": "one.npz", "train": {"data": "one.npz"}},
            "digits": {"kind": "python", "function": "hook.py:score", "examples": 9},
        },
    } | changes
    return {name: value for name, value in found.items() if value is not None}


def write(folder: Path, data: Any) -> Path:
    path = folder / "audit.yaml"
    text = data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, data: Any) -> list[str]:
    """What is said of a configuration, a line each, with paths as they are below the folder."""
    with pytest.raises(InputError) as caught:
        read_config(write(folder, data))
    text = str(caught.value).replace(f"{folder}/", "")
    return [line.removeprefix("  - ") for line in text.splitlines() if line.startswith("  - ")] or [text]


# --- what is accepted ----------------------------------------------------------------------------------------


def test_a_configuration_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """\
        # comments are fine
        version: 1
        base: base
        protected: {model: locked, plain: ./plain, task: fashion, releases: [locked]}
        others:
          digits: digits
          latin: ~/latin
        tasks:
          fashion: {kind: image-classification, data: one.npz, limit: 10, mean: 0.5}
          digits: {kind: python, function: hook.py:score, examples: 9}
          latin: {kind: text-classification, data: two.csv}
        private: [head., score.]
        levels: [1, 0, 1]
        attacks: [ties]
        seed: 7
        device: cpu
        """
    monkeypatch.setenv("HOME", str(folder))
    config = read_config(write(folder, textwrap.dedent(text)))
    assert config.tasks == ("fashion", "digits", "latin")
    assert config.levels == (0, 1)
    assert config.top == 1
    assert dict(config.models()) == {
        "base": "base", "protected": "locked", "plain": "./plain", "digits": "digits", "latin": "~/latin",
        "release 2": "locked",
    }  # fmt: skip
    assert config.path("~/latin") == folder / "latin"
    assert config.path("base") == folder / "base"
    assert config.path("/elsewhere") == Path("/elsewhere")
    assert config.fields.private == ("head.", "score.")
    assert (config.fields.seed, config.fields.device, config.fields.attacks) == (7, "cpu", ("ties",))


def test_defaults(folder: Path) -> None:
    config = read_config(write(folder, fields()))
    assert (config.fields.private, config.levels, config.fields.attacks) == ("auto", (0, 1), None)
    assert (config.fields.seed, config.fields.device) == (0, "auto")


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = folder / "below"
    below.mkdir()
    monkeypatch.chdir("/")
    moved = fields(
        base="../base",
        protected={"model": "../locked", "plain": "../plain", "task": "fashion"},
        others={"digits": "../digits"},
        tasks={
            "fashion": {"kind": "image-classification", "data": "../one.npz"},
            "digits": {"kind": "python", "function": "../hook.py:score", "examples": 9},
        },
    )
    assert read_config(write(below, moved)).path("../base").samefile(folder / "base")
    monkeypatch.chdir(folder)
    assert read_config(os.path.relpath(below / "audit.yaml")).path("../base").samefile(folder / "base")
    with pytest.raises(InputError, match="no such model"):
        make_config(moved, Path(), Path("config"))
    monkeypatch.chdir(below)
    make_config(moved, Path(), Path("config"))


def test_a_configuration_read_again_is_the_same(folder: Path) -> None:
    config = read_config(write(folder, fields(seed=3, levels=[2], private=["head."])))
    dumped = config.fields.model_dump(mode="json", exclude_none=True)
    assert make_config(dumped, config.folder, config.where).fields == config.fields


# --- what is not ---------------------------------------------------------------------------------------------


def test_everything_is_told_at_once(folder: Path) -> None:
    wrong = fields(
        bass="base", base=None, levles=[0], seed="x", version=2, device=3,
        protected={"model": "unlocked", "plane": "plain", "task": "fashion"}, others={"digits": "lost"},
        tasks={"fashion": {"kind": "image-classification", "data": "one.npz", "limits": 3},
               "digits": {"kind": "pyton", "function": "f:g"}},
        private="never",
    )  # fmt: skip
    assert problems(folder, wrong) == [
        "audit.yaml: version: not a value of this field, expected 1, got 2",
        "audit.yaml: base: a field is missing",
        "audit.yaml: protected.plain: a field is missing",
        "audit.yaml: protected.plane: no such field, expected plain",
        "audit.yaml: tasks.fashion.limits: no such field, expected limit",
        "audit.yaml: tasks.digits.kind: not a value of this field, expected image-classification | "
        "language-modelling | text-classification | sequence-to-sequence | lm-eval | python, got 'pyton'",
        "audit.yaml: private: not a value of this field, expected 'auto' or a list, got 'never'",
        "audit.yaml: seed: not a value of this field, expected a whole number, got 'x'",
        "audit.yaml: device: not a value of this field, expected text, got 3",
        "audit.yaml: bass: no such field, expected base | tasks",
        "audit.yaml: levles: no such field, expected levels",
        "protected.model: no such model, got unlocked",
        "others.digits: no such model, got lost",
    ]


def test_all_that_does_not_fit_together_is_told_at_once(folder: Path) -> None:
    wrong = fields(
        base="bass",
        protected={"model": "locked", "plain": "plane", "task": "fashion", "releases": ["locked", "again"]},
        others={"fashion": "plain", "latin": "lating"},
        tasks={
            "fashion": {"kind": "image-classification", "data": "won.npz", "train": {"data": "few.npz"}},
            "digits": {"kind": "python", "function": "hooks.py:score", "examples": 9},
        },
        levels=[0, 5, -1],
    )
    levels = ", ".join(f"{number} ({text})" for number, text in LEVELS.items())
    assert problems(folder, wrong) == [
        "base: no such model, got bass",
        "protected.plain: no such model, got plane",
        "protected.releases[1]: no such model, got again",
        "others.latin: no such model, got lating",
        f"levels: no such level of access, expected {levels}, got -1",
        f"levels: no such level of access, expected {levels}, got 5",
        "others.latin: no such task, expected fashion, digits, got latin",
        "others.fashion: the protected task is also one of the thief's own",
        "tasks.digits: a task without a model (hint: give its fine-tune in others)",
        "tasks.fashion.data: no such file or folder, got won.npz",
        "tasks.fashion.train.data: no such file or folder, got few.npz",
        "tasks.digits.function: no such file or folder, got hooks.py",
    ]


def test_attacks_devices_and_missing_examples_are_told_with_the_rest(folder: Path) -> None:
    """A level of thieves who learn is refused before hours of work, and not judged after them."""
    wrong = fields(base="bass", attacks=["ties", "tie"], device="warp", levels=[0, 2, 3])
    del wrong["tasks"]["fashion"]["train"]
    found = problems(folder, wrong)
    assert found[0] == "base: no such model, got bass"
    assert re.fullmatch("attacks: the suite has no such attacks, expected .*ties.*, got tie", found[1])
    assert re.match("warp: the device cannot be used, got .*warp", found[2])
    assert found[3].startswith(
        "tasks.fashion.train: no examples for a thief to learn from, expected data that"
    )
    assert "for thieves of level 2, 3" in found[3]
    assert len(found) == 4


def test_paths_that_cannot_be_asked_for_and_options_that_are_no_numbers(folder: Path) -> None:
    long = "a" * 5000
    tasks = {
        "fashion": {**fields()["tasks"]["fashion"], "data": long},
        "digits": {"kind": "python", "function": "m:f", "examples": 9, "options": {"x": float("nan")}},
    }
    found = problems(folder, fields(base=long, tasks=tasks))
    assert any(one.startswith("base: no such model") for one in found)
    assert any("tasks.digits.options" in one for one in found)
    tasks["digits"] = fields()["tasks"]["digits"]
    assert any(one.startswith("tasks.fashion.data: no such") for one in problems(folder, fields(tasks=tasks)))


@pytest.mark.parametrize("name", [*RESERVED, "release 2"])
def test_tasks_are_not_called_as_other_models(name: str, folder: Path) -> None:
    """They would take their place: the last one of a name is the one that is loaded."""
    said = f"tasks.{name}: a task cannot be called so, expected a name that is none of base, protected, plain, partner"
    tasks = {"fashion": fields()["tasks"]["fashion"], name: fields()["tasks"]["digits"]}
    assert problems(folder, fields(others={name: "digits"}, tasks=tasks)) == [f"{said}, got {name}"]
    tasks = {name: fields()["tasks"]["fashion"], "digits": fields()["tasks"]["digits"]}
    protected = {"model": "locked", "plain": "plain", "task": name}
    assert problems(folder, fields(protected=protected, tasks=tasks)) == [f"{said}, got {name}"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"others": {}}, "others: not a value of this field, expected at least 1 of them, got {}"),
        ({"levels": []}, "levels: not a value of this field, expected at least 1 of them, got []"),
        ({"levels": 1}, "levels: not a value of this field, expected a list, got 1"),
        ({"seed": -1}, "seed: not a value of this field, expected at least 0, got -1"),
        ({"others": ["digits"]}, "others: not a value of this field, expected names with values, got ['digits']"),
        ({"others": {1: "digits"}}, "others"),
        ({"attacks": "ties"}, "attacks: not a value of this field, expected a list, got 'ties'"),
        ({"tasks": None}, "tasks: a field is missing"),
        ({"version": None}, "version: a field is missing"),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_be(changes: dict[str, Any], said: str, folder: Path) -> None:
    (found,) = problems(folder, fields(**changes))
    assert said in found


ODD = ("bool x", "map [a]", "timestamp foo", 'int ""', 'float ""')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "the configuration is not YAML"),
        ("a: *b", "the configuration is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "the configuration is not YAML"),
        ("a: 2026-13-01", "the configuration is not YAML"),
        ("[" * 5000, "the configuration is not YAML"),
        *((f"a: !!{tag}", "the configuration is not YAML") for tag in ODD),
        ("- 1", "the configuration is no mapping, got list"),
        ("text", "the configuration is no mapping, got str"),
        ("", "the configuration is no mapping, got NoneType"),
        ("a: 1\n" + "#" * MOST_BYTES, f"too large for a configuration, expected at most {MOST_BYTES} bytes"),
    ],
    ids=["unclosed", "alias", "tag", "date", "nested", *ODD, "list", "text", "nothing", "large"],
)
def test_what_is_no_configuration(text: str, said: str, folder: Path) -> None:
    assert f"audit.yaml: {said}" in problems(folder, text)[0]


def test_bytes_that_are_no_text(folder: Path) -> None:
    (folder / "audit.yaml").write_bytes(b"base: \xff\xfe")
    with pytest.raises(InputError, match="the configuration is not YAML"):
        read_config(folder / "audit.yaml")


@pytest.mark.parametrize("place", ["others:\n  digits: digits\n  digits: latin", "seed: 1\nseed: 2"])
def test_a_name_twice_is_refused(place: str, folder: Path) -> None:
    """YAML in Python takes the last one, and a thief's model would be gone without a word."""
    written = fields(others=None) if place.startswith("others") else fields()
    (found,) = problems(folder, yaml.safe_dump(written) + place + "\n")
    name = "digits" if place.startswith("others") else "seed"
    assert f"the name '{name}' stands here twice" in found


def test_merged_keys_are_no_name_twice(folder: Path) -> None:
    text = yaml.safe_dump(fields(tasks=None)) + textwrap.dedent("""\
        tasks:
          fashion: &image {kind: image-classification, data: one.npz, limit: 10}
          digits: {<<: *image, limit: 20}
        """)
    tasks = read_config(write(folder, text)).fields.tasks
    assert [task.limit for task in tasks.values()] == [10, 20]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_a_file_that_is_none(kind: str, folder: Path) -> None:
    path = folder / "audit.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(InputError, match=r"audit\.yaml: "):
        read_config(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attacks": []}, "attacks: no attacks are named"),
        ({"attacks": ["collude"]}, "attacks: an attack by two releases of the protected model"),
        (
            {"attacks": ["full_dose", "anchor-coupled"], "levels": [0]},
            "attacks: an attack of a level that is not audited",
        ),
        ({"attacks": ["repair-16"], "levels": [0, 1]}, "attacks: an attack of a level that is not audited"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_what_could_not_be_run_is_told_before(changes: dict[str, Any], said: str, folder: Path) -> None:
    assert any(line.startswith((said, f"audit.yaml: {said}")) for line in problems(folder, fields(**changes)))
