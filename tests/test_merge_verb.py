"""`unmergeable merge` and `um.merge`: with a key or without, options as methods declare them, real adapters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
import unmergeable as um
from merging_models import inputs, nudged, transformer, triple
from unmergeable import _parser, authorised, cli
from unmergeable.errors import ClaimError, InputError, UsageError
from unmergeable.merging import METHODS, merge
from unmergeable.merging.catalogue import check_options, describe, options_of
from unmergeable.merging.statistics import grams
from unmergeable.merging.tensors import load_state
from unmergeable.merging.write import MergeReport, merge_checkpoints
from unmergeable.options import REQUIRED, Option, assign, declared

pytestmark = pytest.mark.filterwarnings("ignore")
FROM_PYTHON = {"regmean", "fisher"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small language model, two fine-tunes of it, and an adapter that peft made and saved."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("models")
    base = transformer("llama")
    models = {"base": base, "one": nudged(base, 1), "two": nudged(base, 2)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(transformer("llama"), config)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "adapted")
    return {name: folder / name for name in (*models, "adapter", "adapted")}


def run(*arguments: object) -> int:
    return cli.main(["merge", *map(str, arguments), "-q"])


def test_the_parser_names_the_merge_methods_that_exist() -> None:
    assert tuple(METHODS) == _parser.MERGE_METHODS
    assert set(authorised.METHODS) <= set(_parser.MERGE_METHODS)


def test_an_adapter_is_merged_as_the_model_that_it_makes(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    common = ["-m", "task_arithmetic", "-w", 0.7, "-w", 0.4, "--base", saved["base"], "--json"]
    assert run(saved["one"], saved["adapter"], "-o", tmp_path / "m", *common) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["options"] == {"weight": {"one": 0.7, "adapter": 0.4}}
    assert document["facts"]["shares"]["adapter"] == pytest.approx(0.4, abs=1e-3)
    assert document["facts"]["problems"] == []
    # peft's own fold of the same adapter, merged as a full model
    assert run(saved["one"], saved["adapted"], "-o", tmp_path / "full", *common) == 0
    one, two = load_state(tmp_path / "m"), load_state(tmp_path / "full")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name])
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.isfinite(loaded(**inputs("llama")).logits).all()
    capsys.readouterr()
    for models in ((saved["one"], saved["adapter"]), (saved["adapter"], saved["one"])):
        assert run(*models, "-o", tmp_path / "none") == 3
        assert "an adapter needs its base\nhint: give --base" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_one_function_for_both_ways(tmp_path: Path) -> None:
    models = [toy.write(tmp_path / name, toy.tensors(seed)) for seed, name in enumerate(("one", "two"))]
    plain = um.merge(models, tmp_path / "plain", method="task_arithmetic", base=models[0], weights=[0.5])
    assert isinstance(plain, MergeReport)
    merge_checkpoints("task_arithmetic", models, models[0], tmp_path / "same", {"weight": 0.5})
    assert toy.tree(tmp_path / "plain") == toy.tree(tmp_path / "same")
    locked = [tmp_path / f"{path.name}-locked" for path in models]
    for source, target in zip(models, locked, strict=True):
        um.lock(source, target, key=toy.key(), spec=toy.spec())
    report = um.merge(locked, tmp_path / "house", key=toy.key(), weights=[0.5, 0.5])
    assert isinstance(report, authorised.MergeReport)
    um.unlock(tmp_path / "house", tmp_path / "open", key=toy.key())
    mean = {name: (value + toy.load(models[1])[name]) / 2 for name, value in toy.load(models[0]).items()}
    for name, value in toy.load(tmp_path / "open").items():
        np.testing.assert_allclose(value, mean[name], rtol=0.01, atol=0.01)


def test_what_belongs_to_the_other_way_is_refused(tmp_path: Path) -> None:
    for options in ({"lock_method": "gauge"}, {"salt": bytes(32)}, {"domain": "sales"}):
        with pytest.raises(UsageError, match="belongs to merging with a key"):
            um.merge(["one"], tmp_path / "m", **options)
    for options in ({"options": {"weight": 1}}, {"template": "one"}, {"seed": 1}, {"force": True}):
        with pytest.raises(UsageError, match="belongs to merging without a key"):
            um.merge(["one"], tmp_path / "m", key=toy.key(), **options)
    with pytest.raises(UsageError, match="iso_c does not merge with a key"):
        um.merge(["one"], tmp_path / "m", key=toy.key(), method="iso_c")
    with pytest.raises(UsageError, match="no such merge method"):
        um.merge(["one"], tmp_path / "m", method="mean")


def test_without_a_base_the_first_model_takes_its_part(tmp_path: Path) -> None:
    models = [toy.write(tmp_path / str(seed), toy.tensors(seed), dtype="F32") for seed in range(3)]
    report = um.merge(models, tmp_path / "m", weights=[1, 2, 1])
    assert report.options == {"weight": {"0": 1.0, "1": 2.0, "2": 1.0}}
    assert report.facts.shares == pytest.approx({"0": 0.25, "1": 0.5, "2": 0.25}, abs=1e-6)
    assert report.facts.left_out == []
    assert report.notes == ()
    values = [toy.load(path) for path in models]
    for name, value in toy.load(tmp_path / "m").items():
        want = 0.25 * values[0][name] + 0.5 * values[1][name] + 0.25 * values[2][name]
        np.testing.assert_allclose(value, want, atol=1e-5)
    near = um.merge(models[:2], tmp_path / "near", method="slerp", options={"t": 0.02})
    assert near.facts.moved == pytest.approx(0.02, abs=0.01)
    assert [note for note in near.notes if note.startswith("the merge is near the first model")]


@pytest.mark.parametrize("what", ["copied", "infinite", "the same"])
def test_what_is_no_merge_is_written_by_force_alone(what: str, tmp_path: Path) -> None:
    values = toy.tensors()
    base = toy.write(tmp_path / "base", values, dtype="F32")
    tuned = {name: value * (1e30 if what == "infinite" else 2) for name, value in values.items()}
    one = toy.write(tmp_path / "one", values if what == "the same" else tuned, dtype="F32")
    weight = 1e10 if what == "infinite" else 1.0
    expected = {"copied": "mostly from one", "infinite": "not finite", "the same": "do not differ"}[what]
    arguments: dict[str, Any] = {"method": "task_arithmetic", "base": base, "weights": [weight]}
    with pytest.raises(ClaimError, match=expected) as caught:
        um.merge([one], tmp_path / "m", **arguments)
    assert caught.value.exit_code == 1
    assert "--force" in str(caught.value.hint)
    assert not (tmp_path / "m").exists()
    report = um.merge([one], tmp_path / "m", **arguments, force=True)
    assert expected in report.notes[0]
    assert report.notes[0].startswith("not a merge: ")
    assert (tmp_path / "m").exists()


@pytest.mark.parametrize("method", [name for name in METHODS if name not in FROM_PYTHON])
def test_declared_options_are_those_that_a_method_takes(method: str) -> None:
    """Every option at its default, spelt out, merges as none of them does; as text it is read as the same."""
    base, models = triple(size=0.3)
    known = options_of(method)
    needed = {"weight": 0.5, "t": 0.3, "protected": "p", "dose": 0.9, "others": 0.4}
    count = describe(method)["methods"][0]["models"][1] or 2
    some = dict(list(models.items())[:count])
    least: Mapping[str, Any] = {n: needed[n] for n, option in known.items() if option.default is REQUIRED}
    spelt = {
        **least,
        **{n: option.default for n, option in known.items() if option.default not in (REQUIRED, None)},
    }
    check_options(method, spelt, list(some))
    one, two = merge(method, base, some, **least), merge(method, base, some, **spelt)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[name]), name
    pairs = [f"{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in spelt.items() if v != ()]
    read = assign(method, known, pairs)
    assert read == {name: value for name, value in spelt.items() if value != ()}
    with pytest.raises(UsageError, match="no such option"):
        check_options(method, {**spelt, "strength": 1}, list(some))
    for name in least:
        with pytest.raises(UsageError, match=f"needs an option, expected {name}"):
            check_options(method, {n: v for n, v in spelt.items() if n != name}, list(some))


def test_statistics_come_from_python_and_the_report_is_json(saved: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    batch = inputs("llama")
    found = {}
    for name in ("one", "two"):
        module = transformers.LlamaForCausalLM.from_pretrained(saved[name]).eval()
        found[name] = grams(module, lambda inputs, module=module: module(**inputs), [batch])
    models, out = [saved["one"], saved["two"]], tmp_path / "m"
    report = um.merge(models, out, method="regmean", base=saved["base"], options={"grams": found})
    assert report.facts.is_mix
    document = json.loads(json.dumps(report.as_dict()))
    assert set(document["options"]["grams"]["one"].values()) == {"Gram"}
    with pytest.raises(UsageError, match="regmean needs an option, expected grams") as caught:
        um.merge(models, tmp_path / "n", method="regmean", base=saved["base"])
    assert "statistics.grams" in str(caught.value.hint)


def test_progress_goes_from_the_models_to_the_file(saved: dict[str, Path], tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    models, out = [saved["one"], saved["two"]], tmp_path / "m"
    um.merge(models, out, method="ties", base=saved["base"], progress=lambda *step: told.append(step))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert {total for _, total, _ in told} == {4}
    assert (told[0][2], told[-1]) == (str(saved["base"]), (4, 4, str(out)))


def test_the_locked_are_named(tmp_path: Path) -> None:
    source = toy.write_file(tmp_path / "a.safetensors", toy.tensors())
    other = toy.write_file(tmp_path / "b.safetensors", toy.tensors(1))
    um.lock(source, tmp_path / "c.safetensors", key=toy.key(), spec=toy.spec(), config=toy.CONFIG)
    report = um.merge([tmp_path / "c.safetensors", other], tmp_path / "d.safetensors")
    assert [note for note in report.notes if note.startswith("c is locked and was merged as it is")]
    assert not [note for note in report.notes if note.startswith("b ")]


def test_methods_are_listed_without_torch() -> None:
    code = (
        "import sys; from unmergeable import cli; assert cli.main(['merge', '--methods', '--json']) == 0;"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert (document["document"], document["version"]) == ("unmergeable.merge-methods", 1)
    assert [one["name"] for one in document["methods"]] == list(METHODS)


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from unmergeable import cli;"
        "sys.exit(cli.main(['merge', 'a', 'b', '-o', 'c']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "torch cannot be imported" in done.stderr
    assert "hint: pip install 'unmergeable[merge]'" in done.stderr
    assert "Traceback" not in done.stderr


def example(
    *,
    rate: float,
    count: int = 3,
    flag: bool = False,
    name: str | None = None,
    several: Sequence[int] | None = None,
    words: tuple[str, ...] = (),
    weight: float | Mapping[str, float] = 1.0,
    tables: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """A function with every kind of option."""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("rate=0.5", 0.5),
        ("rate=-2e-3", -0.002),
        ("rate=1", 1.0),
        ("count=-7", -7),
        ("flag=True", True),
        ("flag=false", False),
        ("name=0.5", "0.5"),
        ("name=a=b", "a=b"),
        ("several=4", (4,)),
        ("several=0,2,5", (0, 2, 5)),
        ("words=up,down", ("up", "down")),
        ("weight=0.5", 0.5),
        ("weight=a:0.5,b:c:1", {"a": 0.5, "b:c": 1.0}),
    ],
)
def test_texts_are_read_as_what_they_have_to_be(text: str, value: object) -> None:
    (found,) = assign("example", declared(example), [text]).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate=nan", "expected a number, got 'nan'"),
        ("rate=half", "expected a number, got 'half'"),
        ("rate=", "expected a number, got ''"),
        ("count=1.5", "expected a whole number, got '1.5'"),
        ("flag=yes", "expected true or false, got 'yes'"),
        ("several=1,,2", "expected a whole number, or several, got ''"),
        ("weight=a:x", "expected a number, got 'x'"),
        ("weight=a:1,a:2", "a model is named twice"),
        ("tables=a", "from Python alone"),
        ("rates=1", "no such option"),
        ("rate", "an option needs a value"),
    ],
)
def test_texts_that_are_no_value_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        assign("example", declared(example), [text])


def test_declared_options_know_their_defaults() -> None:
    known = declared(example)
    assert known["rate"] == Option("rate", ("float",))
    assert known["several"] == Option("several", ("int",), None, several=True)
    assert known["weight"] == Option("weight", ("float",), 1.0, each=True)
    assert known["tables"].value == "only from Python"


def test_the_document_has_every_method_with_its_options() -> None:
    text = (Path(__file__).parents[1] / "docs" / "merging.md").read_text(encoding="utf-8")
    rows = {
        row[0]: row
        for row in re.findall(r"^\| `([\w:]+)` \| (\w+) \| (\S+) \| (.*?) \| (.*) \|$", text, re.M)
    }
    listed = [one["name"] for one in describe()["methods"] if one["same_as"] is None]
    assert list(rows) == listed
    for name in listed:
        (one,) = describe(name)["methods"]
        _, base, _, options, about = rows[name]
        assert base == {"required": "needed"}.get(one["base"], one["base"])
        assert about == METHODS[name]
        assert re.findall(r"`(\w+)`", options) == [option["name"] for option in one["options"]]
        required = [option["name"] for option in one["options"] if option["required"]]
        assert re.findall(r"\*\*`(\w+)`\*\*", options) == required


def test_an_unusable_model_leaves_nothing(tmp_path: Path) -> None:
    one = toy.write(tmp_path / "one", toy.tensors())
    other = toy.write(tmp_path / "other", {"x": np.ones((3, 3))}, config=None)
    for models in ([one, tmp_path / "nowhere"], [one, other]):
        with pytest.raises(InputError):
            um.merge(models, tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]
