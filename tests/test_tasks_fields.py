"""Fields of tasks: what they take, and that every error is told at once with its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from unmergeable.errors import InputError, UsageError
from unmergeable.tasks import KINDS, open_task
from unmergeable.tasks.fields import (
    Fields,
    Function,
    ImageClassification,
    LanguageModelling,
    TaskFields,
    parse_fields,
)


class Several(Fields):
    """As a configuration holds them."""

    version: Literal[1]
    tasks: dict[str, TaskFields]
    levels: tuple[int, ...] = Field(default=(0,), min_length=1)
    single: TaskFields | None = None


def refused(model: type[Fields], data: dict[Any, Any]) -> str:
    with pytest.raises(InputError) as caught:
        parse_fields(model, data, "a.yaml")
    return str(caught.value)


def test_what_is_right_is_read() -> None:
    data = {"kind": "image-classification", "data": "x", "mean": 1, "std": [0.5, 1], "train": {"data": "y"}}
    found = parse_fields(ImageClassification, data, "a.yaml")
    assert (found.mean, found.std, found.size, found.batch) == (1.0, [0.5, 1.0], None, 50)
    assert found.train is not None
    assert found.train.data == "y"
    several = parse_fields(Several, {"version": 1, "tasks": {"a": data}, "levels": [0, 1]}, "a.yaml")
    assert several.tasks["a"] == found
    assert several.levels == (0, 1)


def test_fields_that_were_read_can_be_read_again() -> None:
    data = {"kind": "python", "function": "a.b:c", "examples": 3, "options": {"a": True, "b": 1, "c": "x"}}
    found = parse_fields(Function, data, "a.yaml")
    assert parse_fields(Function, found.model_dump(), "a.yaml") == found
    assert found.options == {"a": True, "b": 1, "c": "x"}
    assert isinstance(found.options["a"], bool)


def test_every_error_is_told_at_once() -> None:
    text = refused(
        Several,
        {
            "version": 2,
            "tasks": {
                "one": {"kind": "image-classification", "sise": 3, "mean": "x", "std": [0.1, "y"], "size": 0},
                "two": {"kind": "nothing"},
                "three": {},
                "four": 4,
                "five": {"kind": "python", "function": "foo", "examples": True},
                "six": {"kind": "text-classification", "data": "x", "train": {"dat": "y"}},
            },
            "levels": [],
            "sead": 3,
            "single": {"kind": "lm-eval"},
        },
    )
    kinds = " | ".join(KINDS)
    assert text.startswith("a.yaml: 16 problems")
    for line in (
        "a.yaml: version: not a value of this field, expected 1, got 2",
        "a.yaml: tasks.one.data: a field is missing",
        "a.yaml: tasks.one.sise: no such field, expected size",
        "a.yaml: tasks.one.mean: not a value of this field, expected a number or a list, got 'x'",
        "a.yaml: tasks.one.std[1]: not a value of this field, expected a number, got 'y'",
        "a.yaml: tasks.one.size: not a value of this field, expected more than 0, got 0",
        f"a.yaml: tasks.two.kind: not a value of this field, expected {kinds}, got 'nothing'",
        f"a.yaml: tasks.three.kind: a field is missing, expected {kinds}",
        "a.yaml: tasks.four: not a value of this field, expected fields with values, got 4",
        "a.yaml: tasks.five.function: not a value of this field, expected text like 'module:name' or "
        "'file.py:name', got 'foo'",
        "a.yaml: tasks.five.examples: not a value of this field, expected a whole number, got True",
        "a.yaml: tasks.six.train.data: a field is missing",
        "a.yaml: tasks.six.train.dat: no such field, expected data",
        "a.yaml: levels: not a value of this field, expected at least 1 of them, got []",
        "a.yaml: sead: no such field",
        "a.yaml: single.task: a field is missing",
    ):
        assert f"\n  - {line}" in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [("5", "a whole number"), (True, "a whole number"), (2.5, "a whole number"), (-1, "more than 0")],
)
def test_numbers_are_not_guessed(value: Any, expected: str) -> None:
    data = {"kind": "image-classification", "data": "x", "size": value}
    assert f"a.yaml: size: not a value of this field, expected {expected}" in refused(
        ImageClassification, data
    )


def test_numbers_are_finite() -> None:
    data = {"kind": "image-classification", "data": "x", "mean": float("nan"), "std": [float("inf")]}
    text = refused(ImageClassification, data)
    assert "mean: not a value of this field, expected a finite number or a list, got nan" in text
    assert "std[0]: not a value of this field, expected a finite number, got inf" in text


def test_choices_are_listed() -> None:
    data = {"kind": "language-modelling", "data": "x", "metric": "perplexity"}
    text = refused(LanguageModelling, data)
    assert text == (
        "a.yaml: metric: not a value of this field, expected cross-entropy | accuracy, got 'perplexity'"
    )


def test_a_field_that_is_near_nothing_lists_all() -> None:
    text = refused(Function, {"kind": "python", "function": "a:b", "examples": 2, "zzz": 1})
    assert text == "a.yaml: zzz: no such field, expected kind | function | examples | metric | options"


def test_a_field_that_has_the_name_of_a_kind() -> None:
    text = refused(Several, {"version": 1, "tasks": {"python": {"kind": "python", "python": 3}}})
    assert "a.yaml: tasks.python.python: no such field" in text
    assert "a.yaml: tasks.python.function: a field is missing" in text


def test_names_that_are_no_text() -> None:
    text = refused(Several, {"version": 1, "tasks": {1: {"kind": "lm-eval", "task": "x"}}})
    assert "tasks" in text
    assert "expected text, got 1" in text


def test_a_kind_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such kind of task") as caught:
        open_task("x", {"kind": "guess"}, folder=tmp_path, model=tmp_path)
    assert "image-classification | language-modelling" in str(caught.value)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_checks_its_fields_first(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task x: nonsense: no such field"):
        open_task("x", {"kind": kind, "nonsense": 1}, folder=tmp_path, model=tmp_path)
