"""What is known before the first attack: scores that values are relative to, and what makes figures doubtful."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import thief_cases
from audit_cases import config, configuration, zoo
from unmergeable.audit.bench import Bench
from unmergeable.audit.known import _notes, prepare
from unmergeable.errors import InputError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("single")]
PROTECTED, OWN = thief_cases.PROTECTED, thief_cases.OWN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny zoo, with locks of its protected model."""
    return zoo(tmp_path_factory)


@pytest.fixture(scope="module")
def bench(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    fields = configuration(folder)
    fields["protected"]["releases"] = [str(folder / "again")]
    return Bench(config(fields), tmp_path_factory.mktemp("work"))


def test_what_is_known(bench: Bench, folder: Path) -> None:
    known = prepare(bench)
    assert known.hashes == bench.hashes
    for task, found in known.tasks.items():
        assert found["role"] == ("protected" if task == PROTECTED else "own")
        assert found["separation"] > 5
        assert found["plain"] - found["base"] == pytest.approx(found["separation"] * found["standard_error"])
        assert found["validation"] == found["test"] == thief_cases.TEST / 2
    assert known.standalone["difference"] == 0  # an exact lock
    assert known.standalone["interval"] == [0, 0]
    assert known.standalone["same_answers"] == 1
    assert known.models["protected"]["lock"] == "exact"
    assert known.models["plain"]["lock"] is None
    assert known.models["protected"]["distance"] > known.models["plain"]["distance"] > 0
    assert known.models["base"]["distance"] is None
    roles = {name: model["role"] for name, model in known.models.items()}
    assert roles == {
        "base": "base", "protected": "protected", "plain": "plain", OWN[0]: "own", OWN[1]: "own",
        "release 2": "release",
    }  # fmt: skip
    assert known.notes == []
    by_itself = bench.measure(bench.alone("plain"), "validation")
    assert known.reference.alone == known.reference.pair("validation", by_itself)[1]


def known_of(folder: Path, work: Path, **changes: Any) -> Any:
    fields = configuration(folder)
    for name, value in changes.items():
        place = fields["protected"] if name in ("model", "plain") else fields
        place[name] = value
    return prepare(Bench(config(fields), work))


def test_a_base_that_is_none_is_noted(folder: Path, tmp_path: Path) -> None:
    for parameter in (stranger := thief_cases.model(sum(thief_cases.CLASSES.values()))).parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stranger.save_pretrained(tmp_path / "stranger")
    notes = known_of(folder, tmp_path / "work", base=str(tmp_path / "stranger")).notes
    assert [note.partition(" is ")[0] for note in notes] == ["plain", *OWN]
    assert all("is this its base?" in note for note in notes)


def test_a_protected_model_that_lost_its_task_is_noted(folder: Path, tmp_path: Path) -> None:
    """Nobody can take from it what it does not have: that is no protection."""
    stranger = thief_cases.model(thief_cases.CLASSES[PROTECTED])
    stranger.save_pretrained(tmp_path / "stranger")
    known = known_of(folder, tmp_path / "work", model=str(tmp_path / "stranger"))
    (note,) = known.notes
    assert "the protected model by itself is worse at its task" in note
    assert "counts as protection" in note


def test_a_base_of_the_same_line_is_noted(folder: Path, tmp_path: Path) -> None:
    """Another fine-tune in the place of the base: what all others did to the base is undone in all of them."""
    fields = configuration(folder)
    fields["base"] = fields["others"].pop(OWN[0])
    del fields["tasks"][OWN[0]]
    found = Bench(config(fields), tmp_path / "work")
    (note,) = _notes(found)
    assert re.match(
        rf"the changes of plain, {OWN[1]} against the base are alike, with cosines of 0\.[4-9]", note
    )


def test_few_examples_are_noted(folder: Path, tmp_path: Path) -> None:
    fields = configuration(folder)
    fields["tasks"][OWN[1]]["limit"] = 58
    (note,) = prepare(Bench(config(fields), tmp_path / "work")).notes
    assert note.startswith(f"less than 30 examples are left to report on in {OWN[1]}")


def test_a_task_that_was_not_learnt_is_refused(folder: Path, tmp_path: Path) -> None:
    untrained = thief_cases.model(thief_cases.CLASSES[PROTECTED])
    untrained.save_pretrained(tmp_path / "untrained")
    with pytest.raises(
        InputError, match=rf"^{PROTECTED}: the fine-tune does not beat its base clearly enough"
    ):
        known_of(folder, tmp_path / "work", plain=str(tmp_path / "untrained"))


@pytest.mark.parametrize(
    ("role", "named", "sizes"), [("model", "plain", (3, 4)), ("releases", "release 2", (4, 3))]
)
def test_a_model_of_another_task_is_refused(
    role: str, named: str, sizes: tuple[int, int], folder: Path, tmp_path: Path
) -> None:
    fields = configuration(folder)
    other = str(folder / OWN[0])
    fields["protected"][role] = [other] if role == "releases" else other
    said = f"{named}: classifier.weight: another model than the protected one: a tensor has another shape, expected "
    with pytest.raises(InputError, match=re.escape(f"{said}[{sizes[0]}, 32], got [{sizes[1]}, 32]")):
        Bench(config(fields), tmp_path / "work")


@pytest.mark.parametrize("role", ["model", "plain", OWN[1]])
def test_weights_that_are_no_numbers_are_refused_with_the_task(
    role: str, folder: Path, tmp_path: Path
) -> None:
    fields = configuration(folder)
    broken = shutil.copytree(folder / (OWN[1] if role == OWN[1] else PROTECTED), tmp_path / "broken")
    module: Any = type(thief_cases.model(2)).from_pretrained(broken)
    with torch.no_grad():
        module.vit.layernorm.weight[3] = float("nan")
    module.save_pretrained(broken)
    if role == OWN[1]:
        fields["others"][role] = str(broken)
    else:
        fields["protected"][role] = str(broken)
    task = role if role == OWN[1] else PROTECTED
    with pytest.raises(InputError, match=f"{task}: scores are not finite"):
        prepare(Bench(config(fields), tmp_path / "work"))


@pytest.mark.parametrize("text", ["{", "[]", '{"method": 3}', "{}"])
def test_a_manifest_of_nobody_s(text: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / PROTECTED, tmp_path / "model")
    (tmp_path / "model" / "unmergeable.json").write_text(text)
    if text in ("{", "[]"):
        with pytest.raises(InputError, match=r"unmergeable\.json: not"):
            known_of(folder, tmp_path / "work", model=str(tmp_path / "model"))
    else:
        known = known_of(folder, tmp_path / "work", model=str(tmp_path / "model"))
        assert known.models["protected"]["lock"] is None


def test_a_fine_tune_that_is_always_better_is_no_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any spread there is no number of standard errors, and JSON has no infinity."""
    task = bench.tasks[PROTECTED]
    real = type(task).score
    plain = {name: tensor for name, tensor in bench.models["plain"].items() if name not in bench.base}
    good = {name: tensor.clone() for name, tensor in bench.alone("base").shared.items()}

    def constant(self: Any, module: Any, index: Any) -> Any:
        if self is not task:
            return real(self, module, index)
        is_base = module.state_dict()["vit.layernorm.bias"].equal(good["vit.layernorm.bias"])
        return np.full(len(index), 0.0 if is_base else 1.0)

    assert plain
    monkeypatch.setattr(type(task), "score", constant)
    assert prepare(bench).tasks[PROTECTED]["separation"] is None
