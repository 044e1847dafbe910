"""The models of an audit and its machine: models that do not fit, adapters, devices, workers and their memory."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import thief_cases
from audit_cases import config, configuration, once, zoo
from merging_models import nudged, transformer
from unmergeable.audit import audit
from unmergeable.audit import bench as bench_module
from unmergeable.audit.bench import Bench, estimate, pick_device, pick_workers
from unmergeable.errors import InputError, RunError
from unmergeable.merging.tensors import load_state

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("single")]
OWN = thief_cases.OWN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny zoo, with locks of its protected model."""
    return zoo(tmp_path_factory)


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


def test_parameters_are_counted_and_not_files(folder: Path, memory: dict[str, int], tmp_path: Path) -> None:
    found = config(configuration(folder))
    twice = config(configuration(Path(shutil.copytree(folder, tmp_path / "twice"))))
    for path in (tmp_path / "twice").glob("*/model.safetensors"):
        (path.parent / "training_args.bin").write_bytes(bytes(100_000))
    assert estimate(found, 1) == estimate(twice, 1)


def test_a_device_that_is_full_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(bench_module, "load_module", full)
    with pytest.raises(RunError, match=r"not enough memory for this audit, got CUDA out of memory.*2.00 GiB"):
        audit(configuration(folder), tmp_path / "out", workers=1)


def test_an_adapter_is_as_large_as_its_base(adapted: Path, memory: dict[str, int]) -> None:
    whole = adapters(adapted) | {"others": {"theirs": str(adapted / "theirs-whole")}}
    sizes = [estimate(config(fields), 1)[0] for fields in (adapters(adapted), whole)]
    assert sizes[0] >= sizes[1]
