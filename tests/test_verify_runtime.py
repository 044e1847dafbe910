"""Both models run by the stock classes: outputs agree to the rounding of their dtype, or the claim fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import toy
from unmergeable import runtime
from unmergeable.checkpoint import open_checkpoint, to_bits, to_float64
from unmergeable.errors import RunError
from unmergeable.lock import lock
from unmergeable.spec import Spec
from unmergeable.verify import verify

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

P = "model.layers.{l}."


def slot(tensor: str, index: dict[str, str], power: int = 1) -> dict[str, Any]:
    return {"tensor": P + tensor, "index": index, "power": power}


def spec() -> Spec:
    sizes = {"g": "num_key_value_heads", "r": "num_attention_heads // num_key_value_heads", "c": "2",
             "a": "head_dim // 2", "j": "head_dim", "f": "intermediate_size"}  # fmt: skip
    q, k, v, o = (f"self_attn.{name}_proj.weight" for name in "qkvo")
    sites = [
        (P + "self_attn.qk", "qk", "c", ["l", "g", "a"], "complex",
         [slot(q, {"0": "g r c a"}, -1), slot(k, {"0": "g c a"})]),
        (P + "self_attn.vo", "vo", "j", ["l", "g"], "general_linear",
         [slot(v, {"0": "g j"}), slot(o, {"1": "g r j"}, -1)]),
        (P + "mlp", "mlp", "f", ["l"], "monomial",
         [slot("mlp.gate_proj.weight", {"0": "f"}, 0), slot("mlp.up_proj.weight", {"0": "f"}),
          slot("mlp.down_proj.weight", {"1": "f"}, -1)]),
        (P + "self_attn.heads", "heads", "g", ["l"], "permutation",
         [slot(q, {"0": "g r j"}), slot(k, {"0": "g j"}), slot(v, {"0": "g j"}), slot(o, {"1": "g r j"})]),
    ]  # fmt: skip
    return Spec.from_dict(
        {
            "format": 1,
            "architecture": "LlamaForCausalLM",
            "model_type": "llama",
            "layout": "disk",
            "configs": [{}],
            "defaults": {},
            "sites": [
                dict(zip(("name", "kind", "acts", "per", "group", "slots"), site, strict=True), sizes=sizes)
                for site in sites
            ],
            "refused": [],
            "untouched": ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
                          P + "input_layernorm.weight", P + "post_attention_layernorm.weight"],
            "ignored": [],
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runtime")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        head_dim=16,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (1.0 if parameter.dim() == 1 else 0.0)
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        model.to(dtype).save_pretrained(root / name)
        for method in ("exact", "gauge"):
            lock(root / name, root / f"{name}-{method}", key=toy.key(), spec=spec(), method=method)
    return root


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("method", ["exact", "gauge"])
def test_outputs_agree(models: Path, dtype: str, method: str) -> None:
    found = verify(models / dtype, models / f"{dtype}-{method}", spec=spec(), run="always", key=toy.key())
    assert found.holds, found.first_failure
    runs = [check for check in found.checks if check.name.startswith("runtime")]
    names = {"bf16": ["runtime bfloat16"], "f32": ["runtime float64"]}[dtype]
    if (dtype, method) == ("bf16", "exact"):
        names.append("runtime float64")
    assert [check.name for check in runs] == names
    for check in runs:
        assert check.held
        assert "8 runs" in check.detail  # eager and sdpa; plain, with a cache, padded on either side
        assert check.bound is not None
        assert check.bound < (0.3 if check.name.endswith("bfloat16") else 1e-4)


def test_outputs_that_differ_fail(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "f32-exact", tmp_path / "dst"))
    name = "model.layers.1.self_attn.v_proj.weight"
    with open_checkpoint(folder) as found:
        info = found.tensors[name]
        values = to_float64(found.read(name), info.dtype)
    values[3, 4] += 0.5
    with open(folder / info.file, "r+b") as file:
        file.seek(info.start)
        file.write(to_bits(values, info.dtype).tobytes())
    certificate = verify(models / "f32", folder, spec=spec())
    failed = [check for check in certificate.checks if check.held is False]
    sites = [f"site {P}self_attn.{name}" for name in ("vo", "heads")]
    assert [check.name for check in failed] == ["manifest", *sites, "runtime float64"]
    assert certificate.first_failure == failed[1]
    assert "outputs differ" in failed[3].detail


def test_an_unknown_class_is_run_by_the_base_class_of_its_type(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "f32-exact", tmp_path / "dst"))
    source = Path(shutil.copytree(models / "f32", tmp_path / "src"))
    config = (folder / "config.json").read_text().replace("LlamaForCausalLM", "NoSuchClass")
    (source / "config.json").write_text(config)
    (folder / "config.json").write_text(config)
    runs = [check for check in verify(source, folder, spec=spec()).checks if check.name.startswith("runtime")]
    assert [check.held for check in runs] == [True]


def test_a_destination_that_does_not_run_fails(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr("unmergeable.runtime._run", fail)
    found = verify(models / "f32", models / "f32-exact", spec=spec())
    assert found.first_failure is not None
    assert found.first_failure.detail == "the destination does not run: IndexError: out of range"


def test_a_source_that_does_not_run_is_said(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("no such thing\nand more")

    monkeypatch.setattr("unmergeable.runtime._forward", fail)
    found = verify(models / "f32", models / "f32-exact", spec=spec())
    assert found.checks[-1].held is None
    assert "ValueError: no such thing" in found.checks[-1].detail
    with pytest.raises(RunError, match="does not run"):
        verify(models / "f32", models / "f32-exact", spec=spec(), run="always")


def test_without_room_or_torch_nothing_is_run(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmergeable.runtime._memory", lambda: 1 << 10)
    found = verify(models / "f32", models / "f32-exact", spec=spec())
    assert "half of the memory" in found.checks[-1].detail
    monkeypatch.undo()
    monkeypatch.setattr("unmergeable.runtime.find_spec", lambda name: None)
    found = verify(models / "f32", models / "f32-exact", spec=spec())
    assert "not installed" in found.checks[-1].detail
    assert found.holds


def test_where_rounding_changes_everything_nothing_is_said(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound that unrelated outputs would meet is no evidence."""
    real = runtime._distance
    monkeypatch.setattr(runtime, "_distance", lambda new, old: 0.3 + real(new, old))
    found = verify(models / "bf16", models / "bf16-exact", spec=spec(), run="always")
    checks = [entry for entry in found.checks if entry.name.startswith("runtime")]
    assert {entry.held for entry in checks} == {None}
    assert all("they tell nothing" in entry.detail for entry in checks)


def test_answers_that_are_hardly_ever_the_same_are_others(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreements = iter(([0.3] * 8 + [0.9] * 8) * 2)  # of the locked model, and of noise
    monkeypatch.setattr(runtime, "_agreement", lambda new, old: next(agreements))
    found = verify(models / "bf16", models / "bf16-exact", spec=spec(), run="always")
    assert not all(entry.held for entry in found.checks if entry.name.startswith("runtime"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mixtures_of_experts_are_run(dtype: str, tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "src")
    lock(tmp_path / "src", tmp_path / "locked", key=toy.key())
    found = verify(tmp_path / "src", tmp_path / "locked", run="always")
    checks = {entry.name: entry.held for entry in found.checks if entry.name.startswith("runtime")}
    assert checks["runtime float64"] is True, checks
    assert found.holds
