"""Hardening where something goes wrong on the way, and what it leaves behind."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hardened
import thief_cases
from hardened import OWN, PROTECTED, harden
from unmergeable.errors import ClaimError, InputError, RunError, UsageError
from unmergeable.harden import owner as owner_module
from unmergeable.harden import places as places_module
from unmergeable.harden import release as release_module
from unmergeable.harden import run as run_module
from unmergeable.harden import train as train_module
from unmergeable.harden.draws import Draw
from unmergeable.harden.merged import Weights, freeze_statistics, modes_kept
from unmergeable.harden.objectives import Collapse, Objective, Plain, Together, Trap
from unmergeable.harden.owner import KINDS
from unmergeable.harden.wrapper import Hardening
from unmergeable.merging.tensors import load_state
from unmergeable.stock import module_state
from unmergeable.tasks import open_task
from unmergeable.tasks.task import TensorTask

pytestmark = pytest.mark.filterwarnings("ignore")


class Spoils(Plain):
    """Weights that are no numbers after some of the steps, as far as they were taken."""

    name = "spoils"

    def __init__(self, *steps: int) -> None:
        self.left, self.seen = list(steps), 0

    def __repr__(self) -> str:
        return "Spoils()"

    def add(self, step: Any, strength: float) -> float:
        self.seen += 1
        if self.left and self.seen == self.left[0]:
            self.left.pop(0)
            weight = next(iter(step.weights.parameters.values()))
            # AdamW makes no numbers of an infinite moment.
            weight.data[0] = float("inf")
        return 0.0


# --- numbers that are none -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at", [3, 5, 10, 12], ids=["any", "before a look", "before a checkpoint", "the last"]
)
def test_bad_weights_are_never_the_last_good_ones(
    at: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "SAVE", 5)
    report = harden(
        models, tmp_path / "out", steps=12, batch=32, rate=3e-4, may=0.5, strength=0.1, objective=Spoils(at)
    )
    assert report.trials[0]["figures"]["falls"] == 1
    assert any("not finite" in note for note in report.notes)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_state(tmp_path / "out").values())


def test_what_was_lost_is_trained_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "SAVE", 5)
    seen: list[int] = []
    told = lambda done, total, label: seen.append(done)  # noqa: E731
    harden(models, tmp_path / "out", steps=12, batch=32, objective=Spoils(9), strength=0.1, progress=told)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 9, 6, 7, 8, 9, 10, 11, 12]


def test_it_gives_up(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="not finite, again and again"):
        harden(models, tmp_path / "out", steps=12, batch=32, objective=Spoils(*range(3, 99)), strength=0.1)
    assert not (tmp_path / "out").exists()
    # What the message says helps: another rate is another training.
    harden(models, tmp_path / "out", steps=12, batch=32, objective=Spoils(), strength=0.1, rate=1e-4)


def test_falls_are_not_forgotten_by_a_kill(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "SAVE", 5)
    given = {"steps": 20, "batch": 32, "rate": 3e-4, "strength": 0.1}
    whole = harden(models, tmp_path / "whole", objective=Spoils(3), **given)
    hardened.killed(partial(harden, models, tmp_path / "cut", objective=Spoils(3), **given), at=13)
    again = harden(models, tmp_path / "cut", objective=Spoils(), **given)
    assert again.trials == whole.trials
    one, two = (load_state(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- what is left behind -------------------------------------------------------------------------------------


def test_files_beside_the_checkpoints_stay(models: Path, tmp_path: Path) -> None:
    beside = tmp_path / "out.hardening"
    beside.mkdir()
    (beside / "mine.txt").write_text("mine")
    harden(models, tmp_path / "out", steps=4, batch=32, rate=1e-4)
    assert [path.name for path in beside.iterdir()] == ["mine.txt"]


def test_a_fine_tune_that_is_none_any_more_is_not_written(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ClaimError, match="more than half of what the fine-tune is worth"):
        harden(models, tmp_path / "out", steps=20, rate=1.0, objective="plain")
    assert list(tmp_path.iterdir()) == []  # no checkpoints either: nothing goes on from them
    report = harden(models, tmp_path / "out", steps=20, rate=1.0, objective="plain", max_loss=100.0)
    assert report.loss > 30
    assert any("worse at its task" in note for note in report.notes)


def test_what_merges_keep_is_said(models: Path, tmp_path: Path) -> None:
    report = harden(models, tmp_path / "out", steps=5, batch=32, rate=1e-5)
    assert any("still keep" in note for note in report.notes)
    assert list(report.notes) == report.as_dict()["notes"]


def test_out_of_memory(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, call: Any, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")

    monkeypatch.setattr(TensorTask, "loss", full)
    with pytest.raises(RunError, match="not enough memory for a step") as caught:
        harden(models, tmp_path / "out", steps=5, objective="plain")
    assert "smaller batch" in str(caught.value)


@pytest.mark.parametrize(
    ("place", "name", "needs"),
    [
        (owner_module, "Weights", "the models"),  # put on the device with the base
        (TensorTask, "states", "the held-out examples"),
        (TensorTask, "logits", "the held-out examples"),  # where tasks wrap whatever a model raises
        (run_module.Measure, "exposure", "the held-out examples"),
        (run_module, "search", "a step"),
    ],
)
def test_out_of_memory_outside_of_a_step(
    place: Any, name: str, needs: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")

    monkeypatch.setattr(place, name, full)
    with pytest.raises(
        RunError, match=f"^cpu: not enough memory for {needs}, got CUDA out of memory.*GiB\nhint"
    ):
        harden(models, tmp_path / "out", steps=5, objective="trap+collapse")
    assert list(tmp_path.iterdir()) == []


# --- before anything is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"expert": "nowhere"}, "nowhere: no such file or folder"),
        ({"base": "nowhere"}, "nowhere: no such file or folder"),
        ({"data": "nowhere.npz"}, "nowhere.npz: no such file or folder"),
        ({"proxies": ["nowhere"]}, "nowhere: no such file or folder"),
        ({"seed": 2**64}, "no seed"),
        ({"seed": -1}, "no seed"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], text: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises((InputError, UsageError), match=text):
        harden(models, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("objective", ["trap+collapse", Together((Trap(), Together((Collapse(),))))])
def test_an_objective_without_what_it_learns_from(
    objective: str | Objective, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told before the plain training, not after it."""

    def none(*_: Any) -> Any:
        raise InputError("none")

    trained: list[int] = []
    monkeypatch.setattr(TensorTask, "states", none)
    with pytest.raises(
        InputError, match=r"no hidden states, .*got trap\+collapse\nhint: give another objective"
    ):
        harden(
            models, tmp_path / "out", objective=objective, steps=3,
            progress=lambda done, total, label: trained.append(done),
        )  # fmt: skip
    assert trained == []


@pytest.mark.parametrize(
    ("proxy", "text"),
    [(PROTECTED, "is the fine-tune itself"), ("base", "adds nothing: it is the base itself")],
)
def test_a_proxy_that_is_no_other(proxy: str, text: str, models: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(models / proxy, tmp_path / "copy")
    with pytest.raises(InputError, match=f"copy: a proxy that {text}"):
        harden(models, tmp_path / "out", proxies=[models / OWN[0], copy])
    assert list(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_proxy_that_is_the_base_in_a_training_of_ones_own(dtype: torch.dtype) -> None:
    base = thief_cases.trained()["base"].state_dict()
    other = thief_cases.trained()[OWN[0]].state_dict()
    saved = {name: tensor.to(dtype) for name, tensor in base.items()}
    with pytest.raises(InputError, match=r"^proxies\[1\]: a proxy that adds nothing"):
        Hardening(thief_cases.trained()[PROTECTED], base, proxies=[other, saved])


def test_the_base_in_another_dtype_is_the_base(models: Path, tmp_path: Path) -> None:
    copy.deepcopy(thief_cases.trained()["base"]).to(torch.bfloat16).save_pretrained(tmp_path / "copy")
    with pytest.raises(InputError, match="copy: a proxy that adds nothing"):
        harden(models, tmp_path / "out", proxies=[models / OWN[0], tmp_path / "copy"])
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_what_cannot_be_written_is_not_trained(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise InputError("the merge does not fit the template")

    trained: list[int] = []
    monkeypatch.setattr(release_module, "write_merged", broken)
    with pytest.raises(InputError, match="does not fit"):
        harden(models, tmp_path / "out", progress=lambda done, total, label: trained.append(done))
    assert trained == []


def test_data_that_is_held_out_may_be_named(models: Path, tmp_path: Path) -> None:
    rest = dict(np.load(models / f"{PROTECTED}-train.npz"))
    np.savez(tmp_path / "held.npz", images=rest["images"][:50], labels=rest["labels"][:50])
    np.savez(tmp_path / "train.npz", images=rest["images"][50:], labels=rest["labels"][50:])
    given = {"steps": 5, "batch": 32, "rate": 1e-4, "data": tmp_path / "held.npz"}
    report = harden(
        models, tmp_path / "out", fields={"train": {"data": str(tmp_path / "train.npz")}}, **given
    )
    assert report.examples == {"training": len(rest["labels"]) - 50, "held": 50}
    fields = {"train": {"data": str(tmp_path / "train.npz")}, "limit": 20}
    with pytest.raises(InputError, match="too few examples to measure on"):
        harden(models, tmp_path / "no", fields=fields, **given)


def test_other_examples_to_train_on_are_another_training(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "SAVE", 5)
    rest = dict(np.load(models / f"{PROTECTED}-train.npz"))

    def write(count: int) -> None:
        np.savez(tmp_path / "train.npz", images=rest["images"][:count], labels=rest["labels"][:count])

    def seen(at: int) -> list[int]:
        """Steps that are taken until it is killed."""
        steps: list[int] = []

        def run(progress: Callable[[int, int, str], None]) -> None:
            def told(done: int, total: int, label: str) -> None:
                steps.append(done)
                progress(done, total, label)

            fields = {"train": {"data": str(tmp_path / "train.npz")}}
            harden(models, tmp_path / "out", fields=fields, steps=9, batch=8, strength=0.1, progress=told)

        hardened.killed(run, at)
        return steps

    write(100)
    assert seen(at=7) == [1, 2, 3, 4, 5, 6, 7]
    assert seen(at=1) == [6]
    write(99)
    assert seen(at=7) == [1, 2, 3, 4, 5, 6, 7]
    monkeypatch.setattr(places_module, "__version__", "0.0")
    assert seen(at=1) == [1]


# --- passes --------------------------------------------------------------------------------------------------


def in_bf16(run: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return run()


def test_every_merge_has_its_own_weights_in_mixed_precision() -> None:
    """autocast keeps what it has cast: a second merge would be computed with the first one's."""
    module = thief_cases.trained()[PROTECTED]
    body = [name for name, _ in module.named_parameters() if name.startswith("vit.")]
    weights = Weights(module, thief_cases.trained()["base"].state_dict(), body)
    images, labels = thief_cases.pictures(PROTECTED, 24, 5)

    def pass_of(own: float) -> tuple[torch.Tensor, torch.Tensor]:
        name = "vit.layers.1.mlp.fc1.weight"
        for one in module.parameters():
            one.grad = None
        with weights.merged(Draw.whole(weights.shapes, own), {}):
            logits = module(pixel_values=images).logits
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        return logits.detach(), weights.parameters[name].grad.clone()  # type: ignore[union-attr]

    alone = [in_bf16(partial(pass_of, own)) for own in (0.1, 1.0)]
    both = in_bf16(lambda: [pass_of(own) for own in (0.1, 1.0)])
    plain = in_bf16(lambda: module(pixel_values=images).logits)
    for one, two in zip(alone, both, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])
    after = in_bf16(lambda: [pass_of(0.1), module(pixel_values=images).logits][1])
    assert torch.equal(after, plain)


def test_statistics_of_norms_are_left_alone() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout())
    before = {name: buffer.clone() for name, buffer in module[1].named_buffers()}
    module.eval()
    with modes_kept(module):
        module.train()
        freeze_statistics(module)
        module(torch.randn(8, 4))
        assert (module[1].training, module[2].training) == (False, True)
    assert not any(one.training for one in module.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in module[1].named_buffers())


def test_what_norms_have_seen_is_merged_as_everything_else() -> None:
    """As every merge of models does: the base's weights with the fine-tune's statistics are not the base."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(0)
    base, fine = (ResNetForImageClassification(config) for _ in range(2))
    pictures = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        for scale, module in ((1.0, base), (3.0, fine)):
            for _ in range(9):
                module(scale * pictures)
    before = {name: one.clone() for name, one in module_state(fine).items()}
    hardening = Hardening(fine.eval(), module_state(base.eval()))
    assert any(name.endswith("running_var") for name in hardening.weights.shapes)
    hardening.weights._module.float()  # which makes other buffers of them
    with torch.no_grad():
        with hardening.weights.merged(Draw.whole(hardening.weights.shapes, 0.0), {}):
            assert torch.allclose(fine(pictures).logits, base(pictures).logits, atol=1e-5)
        vector = hardening.weights.vector()
        far = Draw.whole(hardening.weights.shapes, 1.0, -9.0)
        with hardening.weights.merged(far, vector):
            assert bool(torch.isfinite(fine(pictures).logits).all())
    assert hardening.backward({"pixel_values": pictures, "labels": torch.arange(8) % 3}) > 0
    assert all(torch.equal(one, before[name]) for name, one in module_state(fine).items())


def test_files_may_be_sorted(models: Path, tmp_path: Path) -> None:
    """By class or by document: what is held out is of all of it."""
    rest = dict(np.load(models / f"{PROTECTED}-train.npz"))
    order = np.argsort(rest["labels"], kind="stable")
    for name, part in (("train", slice(0, None, 2)), ("held", slice(1, None, 2))):
        np.savez(tmp_path / f"{name}.npz", **{key: value[order[part]] for key, value in rest.items()})
    fields = {"kind": KINDS[0], "data": str(tmp_path / "held.npz")}
    for more in ({}, {"train": {"data": str(tmp_path / "train.npz")}}):
        task = open_task("t", {**fields, **more}, folder=tmp_path, model=models / PROTECTED)
        assert isinstance(task, TensorTask)
        _, held = owner_module._halves(task)
        assert len(set(held.labels[:20].tolist())) > 1


def test_notes_reach_the_command_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unmergeable import cli

    arguments = [
        "harden", str(models / PROTECTED), str(tmp_path / "out"), "--base", str(models / "base"),
        "--data", str(models / f"{PROTECTED}-train.npz"), "--steps", "4", "--rate", "1e-5", "--device", "cpu",
        "-q", "--json",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "still keep" in err
    assert "still keep" in json.loads(out)["notes"][0]
