"""The bench of an audit: halves of examples, what is private to a task, preparations, and hashes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import thief_cases
from audit_cases import config, configuration, zoo
from merging_models import nudged, transformer
from unmergeable.attacks.prepare import COLLUDE, COLLUDE_ALIGNED
from unmergeable.audit.bench import Bench, _settings, digest, halves
from unmergeable.audit.jobs import Job
from unmergeable.audit.known import prepare
from unmergeable.audit.work import run_job
from unmergeable.errors import InputError
from unmergeable.merging import Merged
from unmergeable.merging.tensors import load_state

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("single")]
PROTECTED, OWN = thief_cases.PROTECTED, thief_cases.OWN
HEAD = {"classifier.weight", "classifier.bias"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny zoo, with locks of its protected model."""
    return zoo(tmp_path_factory)


@pytest.fixture(scope="module")
def bench(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    fields = configuration(folder)
    fields["protected"]["releases"] = [str(folder / "again")]
    return Bench(config(fields), tmp_path_factory.mktemp("work"))


# --- examples ------------------------------------------------------------------------------------------------


@given(st.integers(4, 500), st.integers(1, 200), st.integers(0, 2**32))
def test_halves(count: int, screen: int, seed: int) -> None:
    found = halves(count, screen, seed)
    validation, test, few = (found[name] for name in ("validation", "test", "screen"))
    assert sorted([*validation, *test]) == list(range(count))
    assert len(test) - len(validation) in (0, 1)
    assert set(few) <= set(validation)
    assert len(few) == min(screen, len(validation))
    assert found == halves(count, screen, seed)
    for half in found.values():
        assert half == sorted(half)


def test_halves_are_drawn_by_the_seed() -> None:
    assert halves(100, 9, 0) != halves(100, 9, 1)
    # Sorted examples, as of a folder with a folder a class, are in both halves.
    assert abs(np.mean(halves(1000, 9, 0)["test"]) - 500) < 50


@pytest.mark.parametrize("count", range(4))
def test_too_few_examples_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"^task moons: too few examples .* expected 4, got {count}"):
        halves(count, 9, 0, "task moons")


def test_what_is_wrong_with_tasks_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    fields = configuration(folder)
    fields["tasks"][PROTECTED]["limit"] = 3
    fields["tasks"][OWN[0]]["labels"] = "nothing"
    fields["tasks"][OWN[1]]["limit"] = 2
    with pytest.raises(InputError) as raised:
        Bench(config(fields), tmp_path / "work")
    said = str(raised.value)
    assert "audit.yaml: 3 problems" in said
    for task, got in ((PROTECTED, 3), (OWN[1], 2)):
        assert (
            f"task {task}: too few examples to choose on some and report on others, expected 4, got {got}"
            in said
        )
    assert "nothing" in said


# --- what is private -----------------------------------------------------------------------------------------


def test_heads_are_private(bench: Bench) -> None:
    assert not bench.base.keys() & HEAD
    assert len(bench.base) == 54
    for role in ("protected", "plain", *OWN):
        assert bench.heads[role].keys() == HEAD
    assert bench.tasks.keys() == thief_cases.CLASSES.keys()
    assert bench.others == tuple(OWN)


def test_a_model_by_itself_is_itself(bench: Bench, folder: Path) -> None:
    """Scores by the bench are those of the checkpoint, run by hand."""
    for task, role in ((PROTECTED, "plain"), (PROTECTED, "protected"), *((one, one) for one in OWN)):
        path = folder / {"plain": PROTECTED, "protected": "locked"}.get(role, task)
        module: Any = type(thief_cases.model(2)).from_pretrained(path)
        images, classes = thief_cases.pictures(task, thief_cases.TEST, 2)
        with torch.inference_mode():
            right = (module(pixel_values=images).logits.argmax(-1) == classes).double().numpy()
        index = bench.index[task]["test"]
        found = bench.measure(bench.alone(role), "test", [task])
        assert (found[task] == right[index]).all()
        assert len(found[task]) == len(index)


def test_the_base_has_the_heads_of_all_tasks(bench: Bench) -> None:
    merged = bench.alone("base")
    for task in bench.tasks:
        assert len(merged.for_task(task)["classifier.bias"]) == thief_cases.CLASSES[task]
    assert bench.measure(merged, "validation").keys() == bench.tasks.keys()


def test_a_thief_without_the_model_has_its_published_head(bench: Bench) -> None:
    thief = bench.thief("without")
    assert list(thief.experts) == OWN
    merged = thief.whole(thief.mixer.mix(dict.fromkeys(OWN, 0.5)))
    assert merged.for_task(PROTECTED)["classifier.bias"].equal(bench.heads["plain"]["classifier.bias"])
    assert list(bench.thief("plain").experts) == [PROTECTED, *OWN]
    assert bench.thief("plain").experts[PROTECTED] is bench.models["plain"]
    assert bench.thief("protected").experts[PROTECTED] is bench.models["protected"]


@dataclass
class Same:
    """Models of random weights, all of them with a head of two classes, and pictures for them."""

    folder: Path
    fields: dict[str, Any]

    def bench(self, **changes: Any) -> Bench:
        return Bench(config(self.fields | changes), self.folder / "work")


@pytest.fixture
def same(tmp_path: Path) -> Same:
    base = transformer("vit")
    tasks = ("mine", "one", "two")
    base.save_pretrained(tmp_path / "base")
    random = np.random.default_rng(0)
    for seed, task in enumerate(tasks):
        nudged(base, seed + 1).save_pretrained(tmp_path / task)
    images, labels = random.integers(0, 255, (12, 8, 8), np.uint8), random.integers(0, 2, 12)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    (tmp_path / "hook.py").write_text("def score(model, indices):\n    return [float(i) for i in indices]\n")
    data = {"kind": "image-classification", "data": str(tmp_path / "data.npz"), "mean": 0.5, "std": 0.5}
    fields = {
        "version": 1, "base": str(tmp_path / "base"), "device": "cpu",
        "protected": {"model": str(tmp_path / "mine"), "plain": str(tmp_path / "mine"), "task": "mine"},
        "others": {task: str(tmp_path / task) for task in tasks[1:]},
        "tasks": dict.fromkeys(tasks, data),
    }  # fmt: skip
    return Same(tmp_path, fields)


def mean_of_all(found: Bench) -> Merged:
    thief = found.thief("protected")
    return thief.whole(thief.mixer.mix(dict.fromkeys(thief.experts, 0.3)))


def test_a_head_of_the_shape_of_the_base_s_is_not_merged(same: Same) -> None:
    """The trap of two tasks with as many classes: their heads would be averaged, and every merge would fail."""
    found = same.bench()
    assert not found.base.keys() & HEAD
    merged = mean_of_all(found)
    for task in found.tasks:
        saved = load_state(same.folder / task)
        for name in HEAD:
            assert merged.for_task(task)[name].equal(saved[name])


def test_one_task_of_another_kind_does_not_merge_the_heads_of_the_others(same: Same) -> None:
    function = {"kind": "python", "function": str(same.folder / "hook.py") + ":score", "examples": 12}
    found = same.bench(tasks={**same.fields["tasks"], "two": function})
    assert not found.base.keys() & HEAD
    assert mean_of_all(found).for_task("two")["classifier.bias"].equal(found.models["two"]["classifier.bias"])


def test_private_tensors_can_be_named(same: Same) -> None:
    assert same.bench(private=[]).base.keys() >= HEAD  # nothing is: the reader has said so
    found = same.bench(private=["classifier.", "vit.embeddings.cls_token"])
    assert not found.base.keys() & {*HEAD, "vit.embeddings.cls_token"}
    merged = mean_of_all(found)
    for task in found.tasks:
        token = merged.for_task(task)["vit.embeddings.cls_token"]
        assert token.equal(load_state(same.folder / task)["vit.embeddings.cls_token"])
    with pytest.raises(InputError, match=r"audit\.yaml: private: no tensor begins with this, got head\."):
        same.bench(private=["classifier.", "head."])
    with pytest.raises(InputError, match="nothing of the base is left to merge"):
        same.bench(private=["classifier.", "vit."])


def test_a_base_with_a_head_of_its_own_shape_leaves_it_out(bench: Bench) -> None:
    assert bench.parameters["base"] - bench.parameters[PROTECTED if PROTECTED in OWN else "plain"] == 33 * 8


# --- preparations --------------------------------------------------------------------------------------------


def near(one: Any, other: Any, names: Any) -> bool:
    return all(torch.allclose(one[name], other[name], atol=1e-6) for name in names)


def test_the_locked_model_is_another_one_and_is_aligned_back(bench: Bench) -> None:
    locked, plain = bench.models["protected"], bench.models["plain"]
    assert not near(locked, plain, bench.base)
    aligned = bench.prepare("protected", "anchor-coupled")
    assert aligned.keys() == plain.keys()
    assert near(aligned, plain, plain)
    assert bench.prepare("protected", "anchor-coupled") is aligned  # the last one is kept
    other = bench.prepare("protected", "anchor-coupled-other")
    assert near(other, plain, plain)
    thief = bench.thief("protected", "anchor-coupled")
    assert near(thief.experts[PROTECTED], plain, plain)


def test_releases_are_averaged(bench: Bench) -> None:
    mean = bench.prepare("protected", COLLUDE)
    one, two = bench.models["protected"], bench.models["release 2"]
    assert all(torch.allclose(mean[name], (one[name] + two[name]) / 2) for name in one)
    assert mean.keys() == one.keys()


def test_releases_are_aligned_before_they_are_averaged(bench: Bench) -> None:
    """Of one model, locked twice: aligned, they are that model, and so is their mean."""
    raw, mean = (bench.prepare("protected", name) for name in (COLLUDE, COLLUDE_ALIGNED))
    plain = bench.models["plain"]
    assert mean.keys() == plain.keys()
    assert near(mean, plain, plain)
    assert not near(raw, plain, bench.base)


@pytest.mark.parametrize("name", ["quantise-8", "quantise-4", "noise"])
def test_preparations_in_memory_change_a_model_a_little(name: str, bench: Bench) -> None:
    prepared, plain = bench.prepare("plain", name), bench.models["plain"]
    assert prepared.keys() == plain.keys()
    for key, tensor in prepared.items():
        assert tensor.dtype == plain[key].dtype
        assert (tensor - plain[key]).norm() < 0.15 * plain[key].norm()
    assert any(not tensor.equal(plain[key]) for key, tensor in prepared.items())


def test_a_change_in_memory_may_follow_an_alignment(bench: Bench) -> None:
    """What was locked and aligned is the fine-tune again, and rounded it is the rounded fine-tune."""
    first = bench.prepare("protected", "anchor-coupled > quantise-4")
    assert near(first, bench.prepare("plain", "quantise-4"), bench.base)
    assert not near(first, bench.models["plain"], bench.base)
    row = run_job(bench, prepare(bench).reference, Job("probe", "protected", "anchor-coupled > quantise-4"))
    assert (row.state, row.level) == ("done", 1)
    assert row.chain == ("anchor-coupled", "quantise-4", "probe")


def test_a_substitution_may_follow_an_alignment(bench: Bench) -> None:
    """And a change in memory both: what was aligned is in a file of its own, which is attacked."""
    found = bench.prepare("protected", "anchor-coupled > substitute-mlp")
    plain = bench.prepare("plain", "substitute-mlp")
    assert near(found, plain, bench.base)
    assert not near(bench.prepare("protected", "substitute-mlp"), plain, bench.base)
    more = bench.prepare("protected", "anchor-coupled > substitute-mlp > quantise-4")
    assert near(more, bench.prepare("plain", "substitute-mlp > quantise-4"), bench.base)


def test_a_substitution_takes_the_base(bench: Bench) -> None:
    prepared = bench.prepare("protected", "substitute-mlp")
    inside = [name for name in bench.base if ".mlp." in name]
    assert inside
    assert all(prepared[name].equal(bench.base[name]) for name in inside)
    assert not near(prepared, bench.base, bench.base)


def test_a_preparation_that_does_not_apply_is_a_row_that_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.paths, "base", bench.work / "nowhere")
    monkeypatch.setattr(bench, "hashes", bench.hashes | {"base": "another"})
    found = run_job(bench, prepare(bench).reference, Job("probe", "protected", "align-procrustes"))
    assert found.state == "refused"
    assert "nowhere" in str(found.reason)


def test_hashes_are_of_values(bench: Bench, folder: Path) -> None:
    assert len(set(bench.hashes.values())) == len(bench.hashes) == 6
    state = dict(bench.models["plain"])
    assert digest(state) == bench.hashes["plain"]
    assert digest(dict(reversed(state.items()))) == bench.hashes["plain"]
    name = next(iter(state))
    changed = state[name].clone()
    changed.view(-1)[0] += 1e-6
    assert digest(state | {name: changed}) != bench.hashes["plain"]
    assert digest(state | {name: state[name].reshape(-1)}) != bench.hashes["plain"]


def test_settings_are_of_what_changes_answers(same: Same) -> None:
    import json

    path = same.folder / "one" / "config.json"
    before = same.bench().settings
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"transformers_version": "4.0.0"}))
    assert same.bench().settings == before
    path.write_text(json.dumps(fields | {"layer_norm_eps": 0.1}))
    after = same.bench().settings
    assert {task for task in before if before[task] != after[task]} == {"one"}


def test_tasks_of_other_configurations_have_modules_of_their_own(same: Same) -> None:
    """Of one class and shape: scored with another one's settings a model would not be itself."""
    import json

    before = same.bench()
    one, two = (before.modules[task] for task in ("one", "two"))
    assert one is two
    path = same.folder / "two" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 0.5}))
    found = same.bench()
    assert found.modules["one"] is not found.modules["two"]
    assert [module.config.layer_norm_eps for module in (found.modules["one"], found.modules["two"])] == [
        one.config.layer_norm_eps,
        0.5,
    ]


def test_a_plain_model_of_another_configuration_is_noted(same: Same) -> None:
    """It is run in the protected one's module."""
    import json
    import shutil

    from unmergeable.audit.known import _notes

    shutil.copytree(same.folder / "mine", same.folder / "plain")
    given = same.fields["protected"] | {"plain": str(same.folder / "plain")}
    assert same.bench(protected=given).unlike == []
    path = same.folder / "plain" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 0.5}))
    found = same.bench(protected=given)
    assert found.unlike == ["plain"]
    assert any(note.startswith("plain has another configuration") for note in _notes(found))


def test_how_a_model_generates_counts_where_it_does() -> None:
    module: Any = transformer("llama")
    before = [_settings(module, generates=generates) for generates in (False, True)]
    module.generation_config.num_beams = 4
    after = [_settings(module, generates=generates) for generates in (False, True)]
    assert [one == two for one, two in zip(before, after, strict=True)] == [True, False]
