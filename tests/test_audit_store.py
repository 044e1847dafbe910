"""Rows on disk: what is put there comes back bit for bit, what was not put there does not, and keys."""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit_cases import equal, row
from unmergeable.attacks.prepare import COLLUDE, COLLUDE_ALIGNED
from unmergeable.audit import run as run_module
from unmergeable.audit.config import RELEASE
from unmergeable.audit.jobs import Job, Start
from unmergeable.audit.known import Known
from unmergeable.audit.rows import LEVELS, SIDES, Cost, Look, Point, Row, State
from unmergeable.audit.run import _depends
from unmergeable.audit.store import Store, row_key
from unmergeable.errors import InputError, RunError

KEY = "0" * 64
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OPTIONS = st.dictionaries(TEXT, JSON, max_size=3)
TASKS = st.lists(TEXT, min_size=1, max_size=3, unique=True)


@st.composite
def points(draw: Any) -> Point:
    """A merge with scores of any tasks and any length."""
    halves = []
    tasks = draw(TASKS)
    for _ in range(2):
        count = draw(st.integers(0, 4))
        halves.append(
            {task: np.array(draw(st.lists(NUMBERS, min_size=count, max_size=count))) for task in tasks}
        )
    return Point(draw(OPTIONS), *halves)


ROWS = st.builds(
    Row,
    chain=st.lists(TEXT, min_size=1, max_size=3).map(tuple),
    side=st.sampled_from(SIDES),
    level=st.sampled_from(list(LEVELS)),
    about=TEXT,
    needs=st.lists(TEXT, max_size=2).map(tuple),
    points=st.lists(points(), max_size=3).map(tuple),
    looks=st.lists(st.builds(Look, OPTIONS, NUMBERS, NUMBERS), max_size=3).map(tuple),
    cost=st.builds(Cost, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), NUMBERS, NUMBERS, NUMBERS),
    state=st.sampled_from(get_args(State)),
    reason=st.none() | TEXT,
    seed=st.integers(0, 2**40),
    facts=OPTIONS,
)


# --- files ---------------------------------------------------------------------------------------------------


@given(found=ROWS)
@settings(max_examples=80, deadline=None)
def test_a_row_comes_back_as_it_was(found: Row) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        assert store.get(KEY) is None
        store.put(KEY, found)
        back = store.get(KEY)
        assert back is not None
        assert equal(found, back)
        assert os.listdir(folder) == [f"{KEY}.npz"]
        store.put(KEY, replace(found, about="another"))
        assert store.get(KEY).about == "another"  # type: ignore[union-attr]


def written(folder: Path) -> Path:
    """The file of a row with a point."""
    Store(folder).put(KEY, row("full_dose", "plain", (0.5, 0.4)))
    return folder / f"{KEY}.npz"


def document(folder: Path, **changes: Any) -> bytes:
    """The file of a row whose JSON was changed; None takes a field out."""
    path = written(folder)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    found = json.loads(arrays["row"].tobytes()) | changes
    text = json.dumps({name: value for name, value in found.items() if value is not None})
    arrays["row"] = np.frombuffer(text.encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zipped(method: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy(text: bytes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(text, np.uint8))
    return buffer.getvalue()


def with_scores(folder: Path, values: np.ndarray) -> bytes:
    """The file of a row with other scores in it."""
    with np.load(written(folder)) as file:
        arrays = {name: file[name] for name in file.files} | {"0|test|a": values}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


class Evil:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], object), allow_pickle=True)
    return buffer.getvalue()


HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1152921504606846976,), }".ljust(117)
    + b"\n"
)
BAD: dict[str, Callable[[Path], bytes]] = {
    "nothing": lambda folder: b"",
    "text": lambda folder: b"this is no row",
    "truncated": lambda folder: written(folder).read_bytes()[:-40],
    "half": lambda folder: written(folder).read_bytes()[: written(folder).stat().st_size // 2],
    "flipped": lambda folder: bytes(
        byte ^ (0xFF if place == 300 else 0) for place, byte in enumerate(written(folder).read_bytes())
    ),
    "pickle": lambda folder: pickle.dumps(Evil()),
    "array": lambda folder: npy(b"{}"),
    "pickled array": lambda folder: pickled(),
    "pickled member": lambda folder: zipped(row=pickled()),
    "no row": lambda folder: zipped(other=npy(b"{}")),
    "empty member": lambda folder: zipped(row=b""),
    "huge header": lambda folder: zipped(row=HUGE),
    "not json": lambda folder: zipped(row=npy(b"{")),
    "not unicode": lambda folder: zipped(row=npy(b'"\xff"')),
    "a list": lambda folder: zipped(row=npy(b"[]")),
    "a text": lambda folder: zipped(row=npy(b'"row"')),
    "a number": lambda folder: zipped(row=npy(b"3")),
    "nested": lambda folder: zipped(row=npy(b"[" * 100_000)),
    "empty": lambda folder: zipped(row=npy(b"{}")),
    "a field more": lambda folder: document(folder, further=1),
    "no chain": lambda folder: document(folder, chain=None),
    "no points": lambda folder: document(folder, points=None),
    "points of nothing": lambda folder: document(folder, points=[{}]),
    "a point more": lambda folder: document(folder, points=[{"options": {}, "tasks": ["p"]}] * 2),
    "another task": lambda folder: document(folder, points=[{"options": {}, "tasks": ["c"]}]),
    "another side": lambda folder: document(folder, side="nobody"),
    "another level": lambda folder: document(folder, level=7),
    "another state": lambda folder: document(folder, state="perfect"),
    "costs nothing known": lambda folder: document(folder, cost={"money": 3}),
    "looks": lambda folder: document(folder, looks=[[{}, 1]]),
    "nan": lambda folder: with_scores(folder, np.full(40, np.nan)),
    "integers": lambda folder: with_scores(folder, np.zeros(40, int)),
    "a matrix": lambda folder: with_scores(folder, np.zeros((40, 2))),
}


@pytest.mark.parametrize("name", BAD)
def test_what_was_not_put_there_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = BAD[name](tmp_path / "other")
    store = Store(tmp_path / "store")
    (tmp_path / "store" / f"{KEY}.npz").write_bytes(data)
    assert store.get(KEY) is None
    assert not Path("unpickled").exists()
    store.put(KEY, row("full_dose", "plain", (0.5, 0.4)))
    assert store.get(KEY) is not None


def test_the_tools_above_make_files_that_are_there(tmp_path: Path) -> None:
    """Otherwise the test above would pass for any reason."""
    store = Store(tmp_path / "store")
    for data in (
        written(tmp_path).read_bytes(),
        document(tmp_path, about="new"),
        with_scores(tmp_path, np.ones(40)),
    ):
        (tmp_path / "store" / f"{KEY}.npz").write_bytes(data)
        assert store.get(KEY) is not None


def test_a_folder_or_a_pipe_in_the_place_of_a_row_is_not_there(tmp_path: Path) -> None:
    (tmp_path / f"{KEY}.npz").mkdir()
    assert Store(tmp_path).get(KEY) is None


def test_a_row_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put(KEY, row("full_dose", "plain", (0.5, 0.4)))
    seen = []

    def refuse(source: Path, target: Path) -> None:
        seen.append(Path(source).stat().st_size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunError, match="No space left"):
        store.put(KEY, row("ties", "plain", (0.1, 0.1)))
    assert seen[0] > 0
    assert os.listdir(tmp_path) == [f"{KEY}.npz"]
    assert store.get(KEY).chain == ("full_dose",)  # type: ignore[union-attr]


def test_a_store_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="the folder cannot be made"):
        Store(tmp_path / "file")


# --- keys ----------------------------------------------------------------------------------------------------


class Fields:
    """As much of a configuration as keys read."""

    def __init__(self, **changes: Any) -> None:
        self.others = {"one": "models/one", "two": "models/two"}
        self.protected = type("", (), {"task": "p"})()
        self.private = "auto"
        self.seed = 0
        vars(self).update(changes)


def known(**changes: Any) -> Known:
    """What is known of three tasks and five models."""
    fields = Fields(**changes.pop("fields", {}))
    roles = ("base", "protected", "plain", "one", "two", f"{RELEASE}2")
    given: dict[str, Any] = {
        "hashes": {role: f"hash of {role}" for role in roles},
        "settings": {task: f"settings of {task}" for task in ("p", "one", "two")},
        "tasks": {task: {"sha256": f"digest of {task}"} for task in ("p", "one", "two")},
        "machine": {"device": "cpu", "torch": "1", "transformers": "2", "mergekit": "3", "cores": 2},
        "answers": {"base": "answers of base", "plain": "of plain", "protected": "of protected"},
    }
    for name, (key, value) in changes.items():
        given[name] = {**given[name], key: value}
    config = type("", (), {"fields": fields})()
    return Known(config=config, reference=None, models={}, standalone={}, notes=(), **given)  # type: ignore[arg-type]


def key(job: Job, **changes: Any) -> str:
    return row_key(_depends(known(**changes), job))


START = Start.of("full_dose", None, {"dose": 1.0})
COLLUDED = Start.of("full_dose", COLLUDE, {"dose": 1.0})
PLAIN, LOCKED = Job("ties", "plain"), Job("ties", "protected")


@pytest.mark.parametrize(
    "changes",
    [
        {"hashes": ("base", "x")},
        {"hashes": ("protected", "x")},
        {"hashes": ("plain", "x")},
        {"hashes": ("one", "x")},
        {"settings": ("two", "x")},
        {"tasks": ("p", {"sha256": "x"})},
        {"answers": ("base", "x")},
        {"answers": ("plain", "x")},
        {"answers": ("protected", "x")},
        {"machine": ("torch", "x")},
        {"machine": ("transformers", "x")},
        {"machine": ("mergekit", None)},
        {"machine": ("device", "a GPU")},
        {"fields": {"seed": 1}},
        {"fields": {"private": ("head.",)}},
        {"fields": {"others": {"two": "models/two", "one": "models/one"}}},  # the first one is an anchor
    ],
    ids=str,
)
def test_a_key_changes_with_what_a_row_depends_on(changes: dict[str, Any]) -> None:
    assert key(LOCKED, **changes) != key(LOCKED)


@pytest.mark.parametrize(
    "job",
    [
        Job("full_dose", "protected"),
        Job("ties", "protected", "noise"),
        Job("ties", "protected", starts=(START,)),
        Job("ties", "protected", starts=(Start.of("full_dose", None, {"dose": 0.5}),)),
        Job("ties", "plain"),
        Job("ties", "without"),
    ],
    ids=str,
)
def test_every_job_has_a_key_of_its_own(job: Job) -> None:
    others = [LOCKED, Job("ties", "protected", starts=(START, START))]
    assert len({key(one) for one in (job, *others)}) == 3


def test_a_key_does_not_change_with_anything_else() -> None:
    others = {"one": "elsewhere/one", "two": "elsewhere/two"}
    assert key(LOCKED, fields={"others": others}) == key(LOCKED)
    assert key(LOCKED, machine=("cores", 96)) == key(LOCKED)
    # Only who holds a model depends on it; all values are relative to the plain one.
    assert key(PLAIN, hashes=("protected", "x")) == key(PLAIN)
    assert key(PLAIN, answers=("protected", "x")) == key(PLAIN)
    assert key(Job("ties", "without"), hashes=("protected", "x")) == key(Job("ties", "without"))
    assert key(Job("ties", "without"), hashes=("plain", "x")) != key(Job("ties", "without"))


def test_the_same_models_on_two_sides_are_the_same_work() -> None:
    alike = {"hashes": ("protected", "hash of plain"), "answers": ("protected", "of plain")}
    assert key(LOCKED, **alike) == key(PLAIN, **alike)
    assert key(LOCKED) != key(PLAIN)


def test_another_version_of_the_tool_finds_rows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(LOCKED)
    monkeypatch.setattr(run_module, "__version__", "99.0")
    assert key(LOCKED) != before


def test_further_releases_matter_to_those_who_bring_them_together() -> None:
    other = {"hashes": (f"{RELEASE}2", "x")}
    assert key(LOCKED, **other) == key(LOCKED)
    for job in (
        Job("ties", "protected", COLLUDE),
        Job("ties", "protected", COLLUDE_ALIGNED),
        Job("repair-4", "protected", starts=(START, COLLUDED)),
    ):
        assert key(job, **other) != key(job)
