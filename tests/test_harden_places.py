"""Where a hardening writes: its checkpoints, its control, and what a kill leaves of both."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import hardened
from hardened import OWN, PROTECTED
from unmergeable import cli
from unmergeable.errors import InputError, UsageError
from unmergeable.harden import defaults as defaults_module
from unmergeable.harden import measure as measure_module
from unmergeable.harden import run as run_module
from unmergeable.harden import search as search_module
from unmergeable.harden.objectives import Plain
from unmergeable.harden.places import Places
from unmergeable.harden.train import Settings
from unmergeable.merging.tensors import load_state

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fresh_accelerate")]


harden = partial(hardened.harden, steps=4, batch=32, rate=1e-4, strength=0.1)


def same(one: Path, two: Path) -> bool:
    first, second = load_state(one), load_state(two)
    return all(torch.equal(first[name], second[name]) for name in first)


# --- the control ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["sub/../out", "linked/out", "out.hardening", "out/inside", "."])
def test_a_control_needs_a_place_of_its_own(control: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="cannot be the same folder"):
        harden(models, tmp_path / "out", control=tmp_path / control, labels=1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linked", "sub"]


def test_a_kill_between_the_control_and_the_result(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control that this training has written is not in its way; another one is."""
    out, control, real = tmp_path / "out", tmp_path / "control", run_module.write

    def killed(owner: Any, source: Path, target: Path, *rest: Any) -> None:
        if target == out:
            raise KeyboardInterrupt
        real(owner, source, target, *rest)

    again = partial(harden, models, out, control=control)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            again()
    assert control.is_dir()
    assert not out.exists()
    with pytest.raises(InputError, match="the destination exists"):
        again(steps=5)
    before = (control / "model.safetensors").stat().st_mtime_ns
    again()
    assert (control / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["control", "out"]
    harden(models, tmp_path / "whole", control=tmp_path / "whole-control")
    assert same(out, tmp_path / "whole")
    assert same(control, tmp_path / "whole-control")


def test_a_control_of_a_search_has_its_steps(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the training that was taken, which may have been ended on its way."""
    monkeypatch.setattr(measure_module, "MERGES", 2)
    monkeypatch.setattr(search_module, "ENOUGH", 9.0)
    given: dict[str, Any] = {"steps": 15, "max_loss": 100.0, "rate": 2e-3}
    report = harden(models, tmp_path / "out", control=tmp_path / "control", **given)
    assert report.steps == 4
    plain = harden(models, tmp_path / "plain", objective="plain", **given)
    assert plain.steps == 4
    assert report.standalone["plain"] == plain.standalone["after"]
    assert same(tmp_path / "control", tmp_path / "plain")
    assert not same(tmp_path / "control", tmp_path / "out")


# --- checkpoints ---------------------------------------------------------------------------------------------


def test_none_goes_on_in_another_precision(models: Path, tmp_path: Path) -> None:
    def seen(at: int, precision: str) -> list[int]:
        steps: list[int] = []
        hardened.killed(
            lambda progress: harden(
                models,
                tmp_path / "out",
                steps=100,
                precision=precision,
                progress=lambda done, total, label: (steps.append(done), progress(done, total, label)),
            ),
            at,
        )
        return steps

    assert seen(52, "fp32")[-1] == 52
    assert seen(1, "fp32") == [51]
    assert seen(1, "bf16") == [1]


def test_what_a_hardening_writes_does_not_make_it_another_one(tmp_path: Path) -> None:
    """Results may go into the folder of the base, of the data or of a proxy."""
    base, data = tmp_path / "base", tmp_path / "data.npz"
    base.mkdir()
    for path in (base / "model.safetensors", data):
        path.write_bytes(b"1")
    places = Places(tmp_path / "expert", base / "out", base / "control")
    training = partial(places.training, [base], {"data": str(data)}, Plain(), Settings(), ())
    first = training()
    for written in (
        first / "state.pt",
        base / "control" / "x",
        base / ".out.unmergeable-0123456789abcdef" / "y",
    ):
        written.parent.mkdir(parents=True)
        written.write_bytes(b"2")
    assert training() == first
    (base / "model.safetensors").write_bytes(b"12")
    assert training() != first


def test_nothing_is_left_of_other_trainings(models: Path, tmp_path: Path) -> None:
    """Their result was to go where there is one now."""
    hardened.killed(partial(harden, models, tmp_path / "out", steps=100), at=52)
    assert len(list((tmp_path / "out.hardening").iterdir())) == 1
    harden(models, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- what is given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"data": "another.npz"}, UsageError, "not a further field of the task"),
        ({"kind": "language-modelling"}, UsageError, "not a further field of the task"),
        ({"limit": {1: "a", "b": "c"}}, InputError, "limit"),
    ],
)
def test_fields_that_are_refused(
    fields: dict[str, Any], error: type[Exception], text: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        harden(models, tmp_path / "out", fields=fields)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
@pytest.mark.parametrize("name", ["strength", "rate"])
def test_numbers_that_are_none(name: str, value: float, models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="above 0"):
        harden(models, tmp_path / "out", **{name: value})
    assert set(defaults_module.DEFAULTS) == set(defaults_module.KINDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["--set", "limit=2020-99-99"], 2, "not a value"),
        (["--set", "limit=2020-01-01"], 3, "limit"),
        (["--passphrase-file", "nowhere"], 2, "belongs to locking"),
    ],
)
def test_command_lines_that_are_refused(
    more: list[str], code: int, text: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(models / PROTECTED), str(tmp_path / "out"), "--base", str(models / "base")]
    data = ["--data", str(models / f"{PROTECTED}-train.npz"), "--proxy", str(models / OWN[0])]
    assert cli.main(["harden", *given, *data, "--device", "cpu", "-q", *more]) == code
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_anothers_partial_state_is_left_alone(models: Path, tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState, PartialState

    try:
        state = PartialState(cpu=True)
        harden(models, tmp_path / "out")
        assert state.device.type == "cpu"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("kind", "adapter", "asked", "rate"),
    [
        ("language-modelling", True, None, 1e-3),
        ("language-modelling", False, None, 5e-4),
        ("language-modelling", True, 2e-4, 2e-4),
        ("image-classification", True, None, 3e-4),
    ],
)
def test_adapters_of_language_models_have_a_rate_of_their_own(
    kind: str, adapter: bool, asked: float | None, rate: float
) -> None:
    found = defaults_module.settings_of(kind, adapter, None, None, asked, None, 0)
    assert found == replace(defaults_module.DEFAULTS[kind], rate=rate)
