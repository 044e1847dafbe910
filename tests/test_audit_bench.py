"""The bench of an audit: halves of examples, what is private to a task, adapters, preparations, and refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import thief_cases
from audit_cases import configuration, once, zoo
from merging_models import nudged, transformer
from unmergeable.attacks.prepare import COLLUDE, COLLUDE_ALIGNED
from unmergeable.audit import bench as bench_module
from unmergeable.audit.bench import Bench, digest, estimate, halves, pick_device, pick_workers
from unmergeable.audit.config import Config, make_config
from unmergeable.audit.jobs import Job
from unmergeable.audit.known import prepare
from unmergeable.audit.work import one_thread, run_job
from unmergeable.errors import InputError, RunError
from unmergeable.merging import Merged
from unmergeable.merging.tensors import load_state

pytestmark = pytest.mark.filterwarnings("ignore")
PROTECTED, OWN = thief_cases.PROTECTED, thief_cases.OWN
HEAD = {"classifier.weight", "classifier.bias"}


def config(fields: dict[str, Any]) -> Config:
    return make_config(fields, Path(), Path("audit.yaml"))


@pytest.fixture(autouse=True, scope="module")
def single() -> Iterator[None]:
    """As in an audit: one thread."""
    with one_thread():
        yield


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


# --- models that do not fit ----------------------------------------------------------------------------------


def texts(folder: Path, **models: torch.nn.Module) -> dict[str, Any]:
    """An audit of language models on random tokens."""
    for name, module in models.items():
        module.save_pretrained(folder / name)
    np.savez(folder / "ids.npz", ids=np.random.default_rng(0).integers(3, 40, 400))
    data = {"kind": "language-modelling", "data": str(folder / "ids.npz"), "length": 16}
    return {
        "version": 1, "base": str(folder / "base"), "device": "cpu",
        "protected": {"model": str(folder / "mine"), "plain": str(folder / "mine"), "task": "mine"},
        "others": {"theirs": str(folder / "theirs")}, "tasks": {"mine": data, "theirs": data},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"intermediate_size": 20}, "model.layers.0.mlp.up_proj.weight"),
        ({"vocab_size": 44}, "model.embed_tokens.weight"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
    ],
)
def test_other_bodies_are_refused_with_the_tensor(changes: Any, tensor: str, tmp_path: Path) -> None:
    base = transformer("llama")
    fields = texts(tmp_path, base=base, mine=nudged(base, 1), theirs=transformer("llama", 2, **changes))
    with pytest.raises(InputError) as caught:
        Bench(config(fields), tmp_path / "work")
    assert re.search(rf"theirs.*{re.escape(tensor)}", str(caught.value), re.DOTALL)


def test_another_class_is_refused(tmp_path: Path) -> None:
    base = transformer("llama")
    fields = texts(tmp_path, base=base, mine=nudged(base, 1), theirs=transformer("gpt2"))
    with pytest.raises(InputError, match="theirs"):
        Bench(config(fields), tmp_path / "work")


def test_a_folder_without_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
    fields = configuration(folder)
    fields["others"][OWN[0]] = str(tmp_path)
    with pytest.raises(InputError, match=r"config\.json"):
        Bench(config(fields), tmp_path / "work")


# --- adapters ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, and adapters of it that peft made and saved; beside each the model that it makes."""
    peft = pytest.importorskip("peft")

    def make(folder: Path) -> None:
        texts(folder, base=transformer("llama"))
        for seed, name in enumerate(("mine", "theirs", "changed")):
            settings = peft.LoraConfig(
                r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
            )
            whole = transformer("llama")
            torch.manual_seed(seed)
            made = peft.get_peft_model(whole, settings)
            made.save_pretrained(folder / name)
            made.merge_and_unload().save_pretrained(folder / f"{name}-whole")

    return once(tmp_path_factory, "audit-adapters", make)


def adapters(folder: Path) -> dict[str, Any]:
    return texts(folder)


def equals(state: Any, path: Path) -> bool:
    whole = load_state(path)
    return all(torch.allclose(tensor, whole[name], atol=1e-6) for name, tensor in state.items())


def test_adapters_are_models(adapted: Path, tmp_path: Path) -> None:
    fields = adapters(adapted)
    found = Bench(config(fields), tmp_path / "work")
    assert equals(found.models["protected"], adapted / "mine-whole")
    assert equals(found.models["theirs"], adapted / "theirs-whole")
    assert equals(found.base, adapted / "base")
    assert 0.01 < found.distances["protected"] < 10
    whole = fields | {"others": {"theirs": str(adapted / "theirs-whole")}}
    assert Bench(config(whole), tmp_path / "work").hashes["protected"] == found.hashes["protected"]
    # An adapter is folded once, for all workers and for the next run.
    before = sorted(path.name for path in (tmp_path / "work" / "adapters").iterdir())
    assert len(before) == 2
    Bench(config(fields), tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "work" / "adapters").iterdir()) == before


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


def test_a_substitution_takes_the_base(bench: Bench) -> None:
    prepared = bench.prepare("protected", "substitute-mlp")
    inside = [name for name in bench.base if ".mlp." in name]
    assert inside
    assert all(prepared[name].equal(bench.base[name]) for name in inside)
    assert not near(prepared, bench.base, bench.base)


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


# --- the machine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="the device cannot be used"):
        pick_device(name)


def test_a_device_that_is_there() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How much memory there is."""
    there = {"bytes": 1 << 40}
    monkeypatch.setattr(bench_module, "free_memory", lambda device: there["bytes"])
    return there


def test_workers_are_as_many_as_memory_allows(folder: Path, memory: dict[str, int]) -> None:
    found = config(configuration(folder))
    needed = [estimate(found, workers)[0] for workers in range(5)]
    assert needed == sorted(needed)
    # All models, a mixer of them, and the modules that they run in.
    assert needed[1] > 5 * sum(tensor.numel() for tensor in load_state(folder / "base").values())
    for bytes_, workers in ((needed[3], 3), (needed[3] - 1, 2), (needed[2] - 1, 1)):
        memory["bytes"] = bytes_
        assert pick_workers(found, None) == min(workers, len(bench_module.os.sched_getaffinity(0)))
    memory["bytes"] = needed[1] - 1
    for wanted in (None, 1):
        with pytest.raises(
            RunError, match=r"not enough memory for this audit, expected .* GiB for 1 workers"
        ):
            pick_workers(found, wanted)
    memory["bytes"] = needed[3]
    assert pick_workers(found, 3) == 3
    with pytest.raises(RunError, match=r"for 4 workers, got .*(?s:.)hint: give fewer --workers"):
        pick_workers(found, 4)


def test_an_adapter_is_as_large_as_its_base(adapted: Path, memory: dict[str, int]) -> None:
    whole = adapters(adapted) | {"others": {"theirs": str(adapted / "theirs-whole")}}
    sizes = [estimate(config(fields), 1)[0] for fields in (adapters(adapted), whole)]
    assert sizes[0] >= sizes[1]


def test_a_preparation_that_does_not_apply_is_a_row_that_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.paths, "base", bench.work / "nowhere")
    monkeypatch.setattr(bench, "hashes", bench.hashes | {"base": "another"})
    found = run_job(bench, prepare(bench).reference, Job("probe", "protected", "align-procrustes"))
    assert found.state == "refused"
    assert "nowhere" in str(found.reason)
