"""Tasks that a function of the user's scores: how it is found, called, and checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unmergeable.errors import InputError, RunError
from unmergeable.tasks import open_task
from unmergeable.tasks.function import FunctionTask

MODULE = torch.nn.Linear(2, 1)

HOOK = """
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Judge:
    factor: float = 1.0

    def look(self, model, index):
        return self.factor * index * float(model.weight[0, 0])


def good(model, indices, factor=1.0):
    assert not torch.is_grad_enabled()
    judge = Judge(factor)
    return [judge.look(model, index) for index in indices]


def as_array(model, indices):
    return np.array([index > 1 for index in indices])


def as_tensor(model, indices):
    return torch.tensor([float(index) for index in indices], dtype=torch.float16, requires_grad=True)


def as_generator(model, indices):
    return (index for index in indices)


def spoils_its_indices(model, indices):
    found = [float(index) for index in indices]
    indices.clear()
    return found


def too_few(model, indices):
    return [0.0]


def one(model, indices):
    return 0.5


def rows(model, indices):
    return [[0.0] for _ in indices]


def words(model, indices):
    return ["good" for _ in indices]


def nothing(model, indices):
    return None


def infinite(model, indices):
    return [float(index) if index else float("inf") for index in indices]


def fails(model, indices):
    raise KeyError("no such picture")


NUMBER = 3
"""


def opened(folder: Path, function: str, **fields: Any) -> FunctionTask:
    given = {"kind": "python", "function": function, "examples": 5, **fields}
    task = open_task("t", given, folder=folder, model=folder)
    assert isinstance(task, FunctionTask)
    return task


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    (tmp_path / "hook.py").write_text(HOOK)
    return tmp_path


def test_a_function_of_a_file(hook: Path) -> None:
    task = opened(hook, "hook.py:good", options={"factor": 2.0}, metric="similarity")
    weight = float(MODULE.weight.detach()[0, 0])
    assert (len(task), task.kind, task.metric, task.screen) == (5, "python", "similarity", 5)
    found = task.score(MODULE, [4, 0, 4])
    np.testing.assert_allclose(found, [8 * weight, 0, 8 * weight])
    assert found.dtype == np.float64
    assert task.score(MODULE, []).shape == (0,)
    assert opened(hook, "hook.py:good", examples=1000).screen == 64
    assert sorted(path.name for path in hook.iterdir()) == ["hook.py"]  # no bytecode beside it


def test_a_file_in_another_folder(hook: Path) -> None:
    (hook / "sub").mkdir()
    assert opened(hook / "sub", "../hook.py:as_array").score(MODULE, [0, 3]).tolist() == [0, 1]


@pytest.mark.parametrize("function", ["as_tensor", "as_generator", "spoils_its_indices"])
def test_forms_of_answers(function: str, hook: Path) -> None:
    assert opened(hook, f"hook.py:{function}").score(MODULE, range(1, 4)).tolist() == [1, 2, 3]


def test_a_function_of_a_module(hook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(hook))
    (hook / "scores_of_mine.py").write_text("def half(model, indices):\n    return [0.5 for _ in indices]\n")
    task = opened(hook, "scores_of_mine:half")
    assert task.score(MODULE, [0, 1]).tolist() == [0.5, 0.5]
    before = task.digest
    del sys.modules["scores_of_mine"]
    (hook / "scores_of_mine.py").write_text("def half(model, indices):\n    return [0.25 for _ in indices]\n")
    after = opened(hook, "scores_of_mine:half")
    assert after.digest != before
    assert opened(hook, "math:dist").digest  # of no file of Python


def test_the_digest_is_of_what_scores_depend_on(hook: Path) -> None:
    digests = [
        opened(hook, "hook.py:good").digest,
        opened(hook, "hook.py:as_array").digest,
        opened(hook, "hook.py:good", examples=6).digest,
        opened(hook, "hook.py:good", options={"factor": 2.0}).digest,
    ]
    assert len(set(digests)) == 4
    assert opened(hook, "hook.py:good").digest == digests[0]
    (hook / "hook.py").write_text(HOOK.replace("self.factor * index", "1 + index"))
    changed = opened(hook, "hook.py:good")
    assert changed.digest not in digests
    assert changed.score(MODULE, [0])[0] != 0  # the file as it is now, though it was run before


@pytest.mark.parametrize(
    ("function", "got"),
    [
        ("too_few", "float64 of shape (1,)"),
        ("one", "float"),
        ("rows", "float64 of shape (3, 1)"),
        ("words", "<U4 of shape (3,)"),
        ("nothing", "NoneType"),
    ],
)
def test_answers_that_are_no_scores(function: str, got: str, hook: Path) -> None:
    with pytest.raises(RunError, match="the function gives") as caught:
        opened(hook, f"hook.py:{function}").score(MODULE, [0, 1, 2])
    assert caught.value.where == f"hook.py:{function}"
    assert caught.value.expected == "3 numbers, one for each index"
    assert caught.value.got == got


def test_scores_that_are_not_finite(hook: Path) -> None:
    task = opened(hook, "hook.py:infinite")
    assert task.score(MODULE, [2, 1]).tolist() == [2, 1]
    with pytest.raises(InputError, match="t: scores are not finite"):
        task.score(MODULE, [2, 0])


def test_a_function_that_fails_is_named(hook: Path) -> None:
    with pytest.raises(RunError) as caught:
        opened(hook, "hook.py:fails").score(MODULE, [0])
    assert str(caught.value) == "hook.py:fails: the function failed, got KeyError: 'no such picture'"
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("index", [-1, 5])
def test_examples_that_there_are_not(index: int, hook: Path) -> None:
    with pytest.raises(InputError, match=f"t: no such example, expected 0 to 4, got {index}"):
        opened(hook, "hook.py:good").score(MODULE, [0, index])


def test_functions_that_cannot_be_found(hook: Path) -> None:
    (hook / "broken.py").write_text("import nothing_of_this_name\n")
    (hook / "leaves.py").write_text("raise SystemExit(3)\n")
    (hook / "wrong.py").write_text("def good(:\n")
    for function, expected in (
        (
            "hook.py:bad",
            "t: hook.py:bad: no such function, expected a function bad, there are dataclass, Judge, good",
        ),
        ("hook.py:NUMBER", "no such function, expected a function NUMBER, there are"),
        ("gone.py:good", "gone.py: the file cannot be read"),
        (
            "broken.py:good",
            "broken.py: the file of the function fails, got ModuleNotFoundError: No module named",
        ),
        ("leaves.py:good", "leaves.py: the file of the function fails, got SystemExit: 3"),
        ("wrong.py:good", "wrong.py: the file of the function fails, got SyntaxError"),
        ("nothing_here:good", "t: nothing_here: the module of the function cannot be imported"),
        ("math:nothing", "no such function"),
    ):
        with pytest.raises(InputError) as caught:
            opened(hook, function)
        assert expected in str(caught.value)
        assert not [name for name, module in sys.modules.items() if "broken.py" in str(module)]
