"""The verb `harden`: a fine-tune of the tiny zoo from folder to folder, resumed, locked, searched, refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hardened
import thief_cases
import toy
import unmergeable as um
from audit_cases import once
from hardened import OWN, PROTECTED
from unmergeable import _parser_harden, cli
from unmergeable.errors import ClaimError, InputError, RunError, UsageError
from unmergeable.harden import defaults as defaults_module
from unmergeable.harden import measure as measure_module
from unmergeable.harden import owner as owner_module
from unmergeable.harden import search as search_module
from unmergeable.harden import train as train_module
from unmergeable.harden.journal import Journal, Trial
from unmergeable.harden.measure import Exposure
from unmergeable.harden.objectives import OBJECTIVES
from unmergeable.harden.owner import KINDS
from unmergeable.harden.search import lost
from unmergeable.merging.tensors import load_state
from unmergeable.stock import load_module

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 400


def harden(models: Path, dst: Path, **changes: Any) -> Any:
    """As many steps as it takes."""
    return hardened.harden(models, dst, **({"steps": STEPS, "batch": 64, "strength": 0.3} | changes))


@pytest.fixture(scope="module")
def done(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A hardened model, and its report."""

    def make(folder: Path) -> None:
        report = harden(models, folder / "out")
        (folder / "report.json").write_text(json.dumps(report.as_dict()))

    folder = once(tmp_path_factory, "hardened", make)
    return folder / "out", json.loads((folder / "report.json").read_text())


def test_a_hardened_model_is_a_stock_model(models: Path, done: tuple[Path, dict[str, Any]]) -> None:
    path, _ = done
    before, after = load_state(models / PROTECTED), load_state(path)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    assert list(before) == list(after)
    assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in (models / PROTECTED).iterdir())
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert sorted(same) == ["classifier.bias", "classifier.weight"]  # a head is private
    load_module(path)
    assert not path.with_name("out.hardening").exists()


def test_merges_know_less_and_the_model_as_much(done: tuple[Path, dict[str, Any]]) -> None:
    report = done[1]
    assert (report["document"], report["version"]) == ("unmergeable.harden", 1)
    assert report["exposure"]["after"]["mean"] < 0.2 * report["exposure"]["before"]["mean"]
    assert report["loss"] < 3
    assert report["loss"] == pytest.approx(
        100 * (report["standalone"]["before"] - report["standalone"]["after"]), abs=1e-9
    )
    assert report["examples"] == {"training": 168, "held": 72}


def test_a_thief_with_other_models_gets_less(
    models: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Neither his model nor the examples were seen; an alignment brings nothing back."""
    fields = thief_cases.configuration((OWN[1],))
    for one in (fields, fields["protected"], fields["others"], *fields["tasks"].values()):
        for name in ("base", "model", "plain", OWN[1], "data"):
            if isinstance(one.get(name), str):
                one[name] = str(models / one[name])
    fields["tasks"] = {
        task: {k: v for k, v in one.items() if k != "train"} for task, one in fields["tasks"].items()
    }
    fields["protected"]["model"] = str(done[0])
    fields["attacks"] = ["full_dose", "task_arithmetic", "substitute-blocks", "anchor-coupled"]
    result = um.audit(fields, tmp_path / "out", workers=1)
    for level in result.levels:
        assert level.gains["plain"] > 2
        assert level.recovered < 0.2


@pytest.mark.parametrize("name", ["trap", "trap+kindred"])
def test_what_was_killed_goes_on(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "SAVE", 10)
    harden(models, tmp_path / "whole", steps=40, objective=name)

    hardened.killed(partial(harden, models, tmp_path / "cut", steps=40, objective=name), at=25)
    assert not (tmp_path / "cut").exists()
    seen: list[int] = []
    harden(
        models, tmp_path / "cut", steps=40, objective=name,
        progress=lambda done, total, label: seen.append(done),
    )  # fmt: skip
    assert seen == list(range(21, 41))
    one, two = load_state(tmp_path / "whole"), load_state(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_adapter_stays_one(models: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = tmp_path / "base"  # under the protected task's head, as an adapter's base is
    shutil.copytree(models / PROTECTED, base)
    plain = thief_cases.model(thief_cases.CLASSES[PROTECTED])
    plain.load_state_dict(thief_cases.trained()[PROTECTED].state_dict())
    plain.vit.load_state_dict(thief_cases.trained()["base"].vit.state_dict())
    shutil.rmtree(base)
    plain.save_pretrained(base)
    torch.manual_seed(0)
    adapted = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1", "fc2"]))
    images, labels = thief_cases.pictures(PROTECTED, 240, 1)
    optimizer = torch.optim.Adam([one for one in adapted.parameters() if one.requires_grad], lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(adapted(pixel_values=images).logits, labels).backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path / "adapter")
    report = harden(
        models, tmp_path / "out", expert=tmp_path / "adapter", base=base, steps=80, rate=5e-3, proxies=[]
    )
    exposure = report.exposure
    assert exposure["after"]["mean"] < 0.8 * exposure["before"]["mean"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "adapter").iterdir()
    )
    PeftModel.from_pretrained(load_module(base), str(tmp_path / "out"))
    with pytest.raises(UsageError, match="cannot be locked"):
        harden(models, tmp_path / "no", expert=tmp_path / "adapter", base=base, lock=toy.key())


def test_then_locked(models: Path, tmp_path: Path) -> None:
    report = harden(models, tmp_path / "locked", steps=10, lock=toy.key())
    harden(models, tmp_path / "open", steps=10)
    assert report.locked == toy.key().id
    um.unlock(tmp_path / "locked", tmp_path / "again", key=toy.key())
    one, two = load_state(tmp_path / "open"), load_state(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)
    images, _ = thief_cases.pictures(PROTECTED, 20, 9)
    answers = [load_module(tmp_path / name)(pixel_values=images).logits for name in ("locked", "open")]
    assert torch.allclose(*answers, atol=1e-4)


# --- strength ------------------------------------------------------------------------------------------------


def searched(losses: dict[float, float], exposures: dict[float, float], first: float = 0.1) -> list[float]:
    """The strengths that are tried, where so much is lost and exposed at each."""
    trials: list[Any] = []
    tried = []
    for strength in search_module._strengths(first, trials, search_module.TRIES):
        tried.append(round(strength, 4))
        nearest = min(losses, key=lambda one: abs(one - strength))
        exposure = Exposure(exposures[nearest], 1.0)
        allowed = losses[nearest] <= 1
        trials.append(Trial(strength, 9, 9, 0.0, losses[nearest], exposure, allowed, {"falls": 0.0}))
    return tried


def test_strengths_that_are_tried() -> None:
    stronger = {0.1: 0.0, 0.2: 0.5, 0.4: 2.0, 0.28: 0.9}
    assert searched(stronger, dict.fromkeys(stronger, 0.5)) == [0.1, 0.2, 0.4, 0.2828]
    weaker = {0.1: 5.0, 0.025: 3.0, 0.00625: 0.5}
    assert searched(weaker, dict.fromkeys(weaker, 0.5))[:3] == [0.1, 0.025, 0.0063]
    assert searched({0.1: 0.0}, {0.1: 0.01}) == [0.1]  # nothing is exposed: enough


def test_of_what_exposes_as_little_the_better_is_taken(tmp_path: Path) -> None:
    figures = {"falls": 0.0}
    journal = Journal(tmp_path)
    for number, (exposed, loss, allowed) in enumerate(
        [(0.30, -9.0, True), (0.071, 0.9, True), (0.07, 0.5, True), (0.068, 0.6, True), (0.0, 5.0, False)]
    ):
        weights = {"w": torch.tensor([number])}
        journal.add(Trial(0.1 * number, 9, 9, 0.0, loss, Exposure(exposed, 1.0), allowed, figures), weights)
    again = Journal(tmp_path)
    assert journal.taken == again.taken == journal.trials[2]
    for one in (journal, again):
        assert one.best is not None
        assert one.best["w"].item() == 2


def test_losses() -> None:
    assert lost(0.80, 0.79) == pytest.approx(1.0)  # points of accuracy
    assert lost(-2.0, -2.02) == pytest.approx(1.0)  # per cent of the cross-entropy
    assert lost(-2.0, -1.9) < 0


@pytest.mark.usefixtures("short")
def test_no_more_is_lost_than_was_allowed(models: Path, tmp_path: Path) -> None:
    report = harden(models, tmp_path / "out", steps=15, max_loss=30.0)
    assert report.loss <= 30
    allowed = [one for one in report.trials if one["allowed"]]
    taken = min(allowed, key=lambda one: (round(one["exposure"]["mean"], 2), one["loss"]))
    assert (report.strength, report.steps) == (taken["strength"], taken["steps"])
    assert report.exposure["after"] == taken["exposure"]
    with pytest.raises(ClaimError, match="no strength that was tried keeps the score"):
        harden(models, tmp_path / "no", steps=15, rate=0.5, max_loss=0.0)
    assert not (tmp_path / "no").exists()


@pytest.mark.usefixtures("short")
def test_what_few_held_out_examples_cannot_tell_is_said(models: Path, tmp_path: Path) -> None:
    """Of 72 one is 1.4 points: it is no loss of less, nor more than 1.4."""
    given = {"steps": 4, "rate": 1e-6}
    for name, max_loss, said in (("finer", 0.5, True), ("coarser", 1.5, False)):
        report = harden(models, tmp_path / name, max_loss=max_loss, **given)
        assert any("72 examples are held out, one of them is 1.4 points" in n for n in report.notes) == said


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two strengths, and few merges to look at."""
    monkeypatch.setattr(search_module, "TRIES", 2)
    monkeypatch.setattr(measure_module, "MERGES", 2)


def looked(report: Any) -> list[tuple[int, int]]:
    return [(one["steps"], one["of"]) for one in report.trials]


@pytest.mark.usefixtures("short")
def test_a_search_looks_on_its_way(models: Path, tmp_path: Path) -> None:
    """At each quarter of a training, which goes on as if nobody had looked."""
    report = harden(models, tmp_path / "out", steps=15, max_loss=100.0)
    quarters = [(4, 15), (8, 15), (12, 15), (15, 15)]
    assert looked(report) == search_module.TRIES * quarters
    whole = harden(models, tmp_path / "whole", steps=15)
    end, alone = report.trials[3], whole.trials[0]
    assert {name: end[name] for name in alone if name != "allowed"} == {
        name: alone[name] for name in alone if name != "allowed"
    }


@pytest.mark.usefixtures("short")
def test_a_search_ends_where_there_is_nothing_to_win(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "ENOUGH", 9.0)
    report = harden(models, tmp_path / "out", steps=15, max_loss=100.0)
    assert looked(report) == [(4, 15)]
    assert report.steps == 4


@pytest.mark.usefixtures("short")
def test_a_search_tries_more_steps_if_nobody_said_how_many(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(defaults_module.DEFAULTS["image-classification"], steps=12)
    monkeypatch.setitem(defaults_module.DEFAULTS, "image-classification", short)
    monkeypatch.setattr(search_module, "ENOUGH", 0.0)
    report = harden(models, tmp_path / "out", steps=None, max_loss=100.0)
    strongest = max(one["strength"] for one in report.trials)
    assert [one for one in looked(report) if one[1] != 12] == [(6, 24), (12, 24), (18, 24), (24, 24)]
    assert {one["strength"] for one in report.trials if one["of"] == 24} == {strongest}


@pytest.mark.usefixtures("short")
def test_a_search_that_was_killed_goes_on(models: Path, tmp_path: Path) -> None:
    given = {"steps": 15, "max_loss": 100.0}
    whole = harden(models, tmp_path / "whole", **given)
    hardened.killed(partial(harden, models, tmp_path / "cut", **given), at=21)  # in its second training
    again = harden(models, tmp_path / "cut", **given)
    assert again.trials == whole.trials
    one, two = (load_state(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- what goes wrong -----------------------------------------------------------------------------------------


def test_losses_that_are_no_numbers(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unmergeable.tasks.task import TensorTask

    real, calls = TensorTask.loss, []

    def broken(self: Any, call: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        loss = real(self, call, batch)
        return loss * float("nan") if len(calls) in bad else loss

    monkeypatch.setattr(TensorTask, "loss", broken)
    bad = {5, 9}
    report = harden(models, tmp_path / "out", steps=12, objective="plain")
    assert report.trials[0]["figures"]["falls"] == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_state(tmp_path / "out").values())
    calls.clear()
    bad = set(range(3, 100))
    with pytest.raises(RunError, match="not finite, again and again"):
        harden(models, tmp_path / "no", steps=12, objective="plain")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"objective": "up"}, UsageError, "no such objective"),
        ({"task": "lm-eval"}, UsageError, "no kind of task"),
        ({"strength": 0.0}, UsageError, "above 0"),
        ({"steps": 2}, UsageError, "too few steps"),
        ({"rate": -1.0}, UsageError, "above 0"),
        ({"max_loss": -1.0}, UsageError, "no loss"),
        ({"device": "nowhere"}, InputError, "device"),
        ({"data": "nowhere.npz"}, InputError, "nowhere.npz"),
        ({"fields": {"limit": 20}}, InputError, "too few examples"),
        ({"fields": {"colour": 1}}, InputError, "no such field"),
    ],
)
def test_options_and_data_that_are_refused(
    changes: dict[str, Any], error: type[Exception], text: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        harden(models, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_refused(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="exists"):
        harden(models, models / OWN[0])
    with pytest.raises(InputError, match="a file of weights"):
        harden(models, tmp_path / "out", expert=models / PROTECTED / "model.safetensors", task=KINDS[0])
    with pytest.raises(InputError, match="does not beat its base"):
        harden(
            models,
            tmp_path / "out",
            expert=models / OWN[1],
            base=models / OWN[1],
            data=models / f"{OWN[1]}-train.npz",
        )
    other = tmp_path / "other"
    wide = thief_cases.model(4)
    wide.config.hidden_size = 16
    type(wide)(wide.config).save_pretrained(other)
    with pytest.raises(InputError):
        harden(models, tmp_path / "out", base=other)
    labels = np.load(models / f"{PROTECTED}-train.npz")
    np.savez(tmp_path / "more.npz", images=labels["images"], labels=labels["labels"] + 3)
    with pytest.raises(InputError):
        harden(models, tmp_path / "out", data=tmp_path / "more.npz")
    monkeypatch.setattr(owner_module, "free_memory", lambda device: 1000)
    with pytest.raises(RunError, match="not enough memory"):
        harden(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(OBJECTIVES) == _parser_harden.OBJECTIVES
    assert sorted(_parser_harden.TASKS) == sorted(KINDS)
    arguments = [
        "harden", str(models / PROTECTED), str(tmp_path / "out"), "--base", str(models / "base"),
        "--data", str(models / f"{PROTECTED}-train.npz"), "--proxy", str(models / OWN[0]), "--steps", "5",
        "--set", "limit=200", "--device", "cpu", "-q",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "exposure, mean" in text
    assert "points" in text
    arguments[2] = str(tmp_path / "second")
    assert cli.main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["document"], document["version"]) == ("unmergeable.harden", 1)
    assert document["examples"] == {"training": 140, "held": 60}
