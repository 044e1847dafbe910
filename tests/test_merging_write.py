"""Merges as checkpoints that stock loaders open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import toy
from merging_models import inputs, nudged, transformer
from unmergeable.errors import InputError, UsageError
from unmergeable.merging.simple import task_arithmetic
from unmergeable.merging.tensors import load_state
from unmergeable.merging.write import merge_checkpoints, write_merged

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two fine-tunes with heads of their own, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("models")
    base = transformer("vit", num_labels=4)
    paths = {}
    for name, model in (("base", base), ("p", nudged(base, 1)), ("o", nudged(base, 2))):
        if name != "base":
            own = transformer("vit", seed=3, num_labels=2 if name == "p" else 3)
            body = {k: v for k, v in model.state_dict().items() if "classifier" not in k}
            own.load_state_dict({**own.state_dict(), **body})
            model = own
        model.save_pretrained(folder / name)
        paths[name] = folder / name
    return paths


def test_a_merged_folder_is_opened_and_computes_the_merge(saved: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    models = [saved["p"], saved["o"]]
    report = merge_checkpoints(
        "task_arithmetic", models, saved["base"], tmp_path / "m", {"weight": 0.5}, template=saved["p"]
    )
    assert report.facts.problems == []
    assert report.notes == ("2 tensors are private to o and were left out",)
    assert all(0 < far < 1 for far in report.distances.values())
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "m")
    states = {name: load_state(saved[name]) for name in ("p", "o")}
    want = task_arithmetic(load_state(saved["base"]), states, weight=0.5).for_task("p")
    config = transformers.ViTConfig.from_pretrained(saved["p"])
    plain = transformers.ViTForImageClassification.from_pretrained(None, config=config, state_dict=want)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("vit")).logits, plain(**inputs("vit")).logits)
    assert (tmp_path / "m/config.json").read_bytes() == (saved["p"] / "config.json").read_bytes()
    json.dumps(report.as_dict())


@pytest.mark.parametrize("method", ["linear", "dare_ties", "iso_c", "mergekit:ties"])
def test_any_method_any_template(method: str, saved: dict[str, Path], tmp_path: Path) -> None:
    options = {"linear": {"weight": 0.5}, "iso_c": {}}.get(method, {"weight": 0.5, "density": 0.5})
    base = None if method == "linear" else saved["base"]
    report = merge_checkpoints(method, [saved["p"], saved["o"]], base, tmp_path / "m", options, seed=3)
    like = saved["p"] if base is None else base
    assert {path.name for path in (tmp_path / "m").iterdir()} == {path.name for path in like.iterdir()}
    assert report.template == str(like)
    assert load_state(tmp_path / "m").keys() == load_state(like).keys()


def test_a_merge_is_rounded_once(tmp_path: Path) -> None:
    """To the template's dtypes, not to those of a base that holds less."""
    base = transformer("llama")
    fine = nudged(base, 1)
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    fine.float().save_pretrained(tmp_path / "fine")
    merge_checkpoints(
        "task_arithmetic", [tmp_path / "fine"], tmp_path / "base", tmp_path / "m", {"weight": 0.5},
        template=tmp_path / "fine", must_mix=False,
    )  # fmt: skip
    states = {name: load_state(tmp_path / name) for name in ("base", "fine", "m")}
    for name, found in states["m"].items():
        start = states["base"][name].float()
        assert found.dtype == torch.float32
        assert torch.equal(found, start + 0.5 * (states["fine"][name] - start)), name


def test_shards_order_dtype_and_side_files_are_the_templates(tmp_path: Path) -> None:
    values = toy.tensors()
    like = toy.write(tmp_path / "like", values, shards=3)
    (like / "unmergeable.json").write_text("{}")
    state = {name: tensor.float() + 1 for name, tensor in load_state(like).items()}
    write_merged(tmp_path / "out", state, like)
    one, two = toy.tree(like), toy.tree(tmp_path / "out")
    assert one.keys() - two.keys() == {"unmergeable.json"}
    for name in two:
        assert one[name][0] == two[name][0]
        if not name.endswith(".safetensors"):
            assert one[name] == two[name]
    written = load_state(tmp_path / "out")
    assert all(torch.equal(written[name], tensor.to(torch.bfloat16)) for name, tensor in state.items())


def test_a_single_file(tmp_path: Path) -> None:
    like = toy.write_file(tmp_path / "like.safetensors", toy.tensors())
    other = toy.write_file(tmp_path / "other.safetensors", toy.tensors(1))
    merge_checkpoints("linear", [like, other], None, tmp_path / "out.safetensors", {"weight": 0.5})
    assert load_state(tmp_path / "out.safetensors").keys() == load_state(like).keys()


def test_an_adapter_is_merged_as_the_model_it_makes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformer("llama")
    base.save_pretrained(tmp_path / "base")
    full = nudged(base, 1)
    full.save_pretrained(tmp_path / "full")
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    models = [tmp_path / "full", tmp_path / "adapter"]
    report = merge_checkpoints("task_arithmetic", models, tmp_path / "base", tmp_path / "m", {"weight": 0.5})
    assert report.facts.is_mix
    want = adapted.merge_and_unload().state_dict()
    key = "model.layers.1.self_attn.v_proj.weight"
    torch.testing.assert_close(load_state(tmp_path / "m")[key], (want[key] + full.state_dict()[key]) / 2)


def test_an_adapter_is_not_rounded_before_it_is_merged(tmp_path: Path) -> None:
    """On a base of few bits its update would be mostly rounding."""
    peft = pytest.importorskip("peft")
    base = transformer("llama").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        base.float(), peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        for name, one in adapted.named_parameters():
            if "lora_B" in name:
                one.mul_(0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    merge_checkpoints(
        "task_arithmetic", [tmp_path / "adapter"], tmp_path / "base", tmp_path / "m", {"weight": 8.0}
    )
    start, found = (load_state(tmp_path / name) for name in ("base", "m"))
    want = adapted.merge_and_unload().state_dict()
    key = "model.layers.1.self_attn.v_proj.weight"
    exact = start[key].float() + 8 * (want[key].float() - start[key].float())
    torch.testing.assert_close(found[key].float(), exact.bfloat16().float(), rtol=1e-2, atol=0)


def test_nothing_is_written_where_something_is_wrong(saved: dict[str, Path], tmp_path: Path) -> None:
    models = [saved["p"], saved["o"]]
    with pytest.raises(UsageError, match="ties needs the base"):
        merge_checkpoints("ties", models, None, tmp_path / "m")
    with pytest.raises(UsageError, match="no such merge method"):
        merge_checkpoints("mean", models, saved["base"], tmp_path / "m")
    with pytest.raises(UsageError, match="iso_c: options that the method does not have"):
        merge_checkpoints("iso_c", models, saved["base"], tmp_path / "m", {"weight": 1})
    with pytest.raises(UsageError, match="the template is none of the models"):
        merge_checkpoints("iso_c", models[:1], saved["base"], tmp_path / "m", template=saved["o"])
    with pytest.raises(InputError, match="the destination exists"):
        merge_checkpoints("iso_c", models, saved["base"], saved["o"])
    state = load_state(saved["p"])
    state["extra"] = state.pop("classifier.bias")
    with pytest.raises(InputError, match="2 problems"):
        write_merged(tmp_path / "m", state, saved["p"])
    big = {**load_state(saved["p"]), "classifier.bias": torch.full((2,), 1e30)}
    half = tmp_path / "half"
    transformer("vit", num_labels=2).half().save_pretrained(half)
    with pytest.raises(InputError, match="numbers beyond the dtype"):
        write_merged(tmp_path / "m", big, half)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


@pytest.mark.parametrize("seed", [-1, 2**63, True])
def test_seeds_that_no_generator_takes(seed: int, saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no seed"):
        merge_checkpoints("dare_linear", [saved["p"], saved["o"]], saved["base"], tmp_path / "m", seed=seed)


def test_an_adapter_is_no_template(saved: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    given = [saved["p"], tmp_path / "adapter"]
    with pytest.raises(UsageError, match="an adapter has no files"):
        merge_checkpoints("linear", given, saved["base"], tmp_path / "m", template=tmp_path / "adapter")
