"""`unmergeable attack NAME TARGET DST --audit CONFIG`: a checkpoint that scores what the report says of it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import thief_cases
import toy
import unmergeable as um
from thief_cases import CLASSES, OWN, PROTECTED
from unmergeable import _render_merge, attacks, cli
from unmergeable.attacks import blocks, coefficients, distil, merge_attack_maker, repair
from unmergeable.attacks.thief import Thief
from unmergeable.audit import single
from unmergeable.audit.bench import Bench
from unmergeable.audit.config import make_config
from unmergeable.audit.explore import Explorer
from unmergeable.audit.finalists import finalists
from unmergeable.audit.rows import Look
from unmergeable.audit.suite import merge_attacks
from unmergeable.audit.work import one_thread
from unmergeable.errors import InputError, UsageError
from unmergeable.merging.tensors import load_state
from unmergeable.options import declared
from unmergeable.stock import load_module

ONE = OWN[0]
# What each is given, and what is cut down for a test.
RUNS: dict[str, list[str]] = {
    "wide": [],
    "coefficients": ["granularity=block", "objective=labels"],
    "repair": ["each=4"],
    "distil": ["answers=hard"],
    "substitute-blocks": [],
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(coefficients, "STARTS", ((0.4, 0.4),))
    monkeypatch.setattr(coefficients, "STEPS", 20)
    monkeypatch.setattr(repair, "RATES", (3e-4,))
    monkeypatch.setattr(distil, "STEPS", 40)
    monkeypatch.setattr(blocks, "MOVES", 5)
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a lock of the protected one, and the configuration of an audit of it."""
    root = thief_cases.write(tmp_path_factory.mktemp("tasks"))
    thief_cases.locked(root, "exact")
    fields = thief_cases.configuration([ONE], levels=[0])
    (root / "audit.yaml").write_text(yaml.safe_dump(fields))
    for task in fields["tasks"].values():
        del task["train"]
    (root / "bare.yaml").write_text(yaml.safe_dump(fields))
    return root


@pytest.fixture(scope="module")
def scene(folder: Path) -> thief_cases.Scene:
    return thief_cases.scene(folder, [ONE])


def arguments(name: str, folder: Path, dst: Path, *more: str) -> list[str]:
    target = str(folder / f"{PROTECTED}-exact")
    return ["attack", name, target, str(dst), "--audit", str(folder / "audit.yaml"), *more]


def measured(scene: thief_cases.Scene, written: Path, half: str) -> tuple[float, float]:
    """The values of a checkpoint: on the protected task as it stands, on the other with its published head."""
    module: Any = load_module(written)
    found = []
    for task in (PROTECTED, ONE):
        if task == ONE:
            module.classifier = torch.nn.Linear(32, CLASSES[ONE])
            module.classifier.load_state_dict(thief_cases.trained()[ONE].classifier.state_dict())
        scores = scene.bench.tasks[task].score(module, scene.bench.index[task][half])
        found.append(scene.reference.value(half, task, scores))
    return found[0], found[1]


@pytest.mark.parametrize("name", RUNS)
def test_what_is_written_scores_what_the_report_says(
    name: str, folder: Path, scene: thief_cases.Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [text for one in RUNS[name] for text in ("--set", one)]
    assert cli.main(arguments(name, folder, tmp_path / "out", "--json", "-q", *settings)) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["document"], document["version"]) == ("unmergeable.attack", 1)
    made = merge_attack_maker(name)
    given = {text.partition("=")[0]: text.partition("=")[2] for text in RUNS[name]}
    attack = made(**{n: declared(made)[n].read(text) for n, text in given.items()})
    assert (document["access"], tuple(document["needs"])) == (attack.access, attack.needs)
    assert not document["keeps_function"]
    values = document["facts"]["values"]
    for half in ("validation", "test"):
        said = values[half]["protected"], values[half]["own"]
        # What was merged is written in the target's dtype, float32; a wide checkpoint is another arrangement of it.
        near = 0.05 if name == "wide" else 1e-9
        assert measured(scene, tmp_path / "out", half) == pytest.approx(said, abs=near)
    assert min(values["validation"].values()) > 0.4
    assert document["budget"] == attack.budget
    assert document["spent"]["forward_passes"] > 0
    assert (document["spent"]["examples"] > 0) == (attack.access >= 2)
    before, after = load_state(folder / f"{PROTECTED}-exact"), load_state(tmp_path / "out")
    assert (before.keys() == after.keys()) == (name != "wide")  # that has the names of its class in memory
    assert torch.equal(before["classifier.weight"], after["classifier.weight"])
    same = [key for key in after if key in before and torch.equal(before[key], after[key])]
    assert document["changed"] == len(after) - len(same)
    assert not (tmp_path / "out" / "unmergeable.json").exists()
    if name == "wide":
        assert document["facts"]["size"] == pytest.approx(
            sum(t.numel() for t in after.values()) / sum(t.numel() for t in before.values()), abs=0.02
        )
        assert document["facts"]["size"] > 2
    else:
        assert document["facts"]["size"] == 1
        config = [
            json.loads((path / "config.json").read_text()) for path in (folder / PROTECTED, tmp_path / "out")
        ]
        assert config[0] == config[1]


def test_every_attack_of_the_suite_declares_a_budget() -> None:
    for name, attack in merge_attacks().items():
        assert attack.budget.keys() <= {"merges", "moves", "examples", "steps"}, name
        assert all(number > 0 for number in attack.budget.values()), name
        assert len(attack.budget.keys() & {"merges", "moves"}) == 1, name
        assert ("examples" in attack.budget) == (attack.access >= 2), name


def test_the_same_seed_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    given = {"audit": folder / "audit.yaml", "granularity": "tensor", "objective": "entropy"}
    for place, seed in (("a", 3), ("b", 3), ("c", 4)):
        report = um.attack("coefficients", folder / PROTECTED, tmp_path / place, seed=seed, **given)
        assert report.seed == seed
    one, two, other = (toy.tree(tmp_path / place) for place in "abc")
    assert one == two != other


def test_the_best_is_chosen_on_validation_examples_alone(scene: thief_cases.Scene) -> None:
    """What looked best on a few examples, or is best on test examples, does not decide."""
    attack = merge_attack_maker("substitute-blocks")()
    thief, explorer = scene.thief("plain"), Explorer(scene.bench, scene.reference)
    grid = [
        {"taken": {}, "others": 0.8},
        {"taken": dict.fromkeys(("rest", "vit.layers.0"), "all"), "others": 0.5},
    ]
    grid.append({"taken": {"rest": "all"}, "others": 0.5})
    pairs = {}
    for number, options in enumerate(grid):
        merged = attack.make(thief, options)
        pairs[number] = {half: scene.values(merged, half) for half in ("validation", "test")}
        explorer.looks.append(
            Look(options, 1.0 - number / 10, 1.0 - number / 10)
        )  # as if the first looked best
    best = max(pairs, key=lambda number: min(pairs[number]["validation"]))
    assert best != 0
    assert set(finalists(explorer.looks, scene.reference.floors)) == {0, 1, 2}
    options, _, found = single._best(attack, thief, explorer)
    assert options == grid[best]
    assert found == pairs[best]


def test_options_are_known_before_anything_is_read(folder: Path, tmp_path: Path) -> None:
    given = {"audit": tmp_path / "nowhere.yaml"}
    for name, options, words in (
        ("wide", {"dose": 1}, "wide has no such option"),
        ("coefficients", {"granularity": "layer"}, "no such coefficients"),
        ("coefficients", {"granulrity": "row"}, "coefficients has no such option"),
        ("repair", {"each": 0}, "a repair needs examples"),
        ("distil", {"answers": "soft-3"}, "no such answers"),
        ("substitute-blocks", {"blocks": (0,)}, "substitute-blocks has no such option"),
        ("anchor-coupled", {}, "anchor-coupled takes no tasks"),
        ("anchor", {}, "no such attack on tasks"),
    ):
        with pytest.raises(UsageError, match=words):
            um.attack(name, folder / PROTECTED, tmp_path / "out", **given, **options)
    with pytest.raises(UsageError, match="wide needs tasks to choose merges by"):
        um.attack("wide", folder / PROTECTED, tmp_path / "out")
    both: dict[str, Any] = {"base": folder / "base", "spec": "spec.json"}
    with pytest.raises(UsageError, match="--base, --spec and --audit"):
        um.attack("wide", folder / PROTECTED, tmp_path / "out", **given, **both)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_attacked_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    audit = folder / "audit.yaml"
    for target, dst, config, words in (
        (folder / PROTECTED, "there", audit, "the destination exists"),
        (folder / PROTECTED / "model.safetensors", "out", audit, "a file of weights cannot be run by itself"),
        (tmp_path / "adapter", "out", audit, "an adapter has no weights of its own"),
        (folder / "nowhere", "out", audit, "no such model"),
        (folder / PROTECTED, "out", tmp_path / "nowhere.yaml", "No such file"),
    ):
        with pytest.raises(InputError, match=words):
            um.attack("wide", target, tmp_path / dst, audit=config)
    for name in ("coefficients", "repair", "distil"):
        with pytest.raises(InputError, match="no examples for a thief to learn from") as caught:
            um.attack(name, folder / PROTECTED, tmp_path / "out", audit=folder / "bare.yaml")
        assert "train:" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_an_attack_that_does_not_apply_is_refused_with_its_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class whose blocks are no sums has no wide checkpoint: nothing is written then."""

    def refuse(*_: object, **__: object) -> None:
        raise InputError("the model has no list of blocks of one class", where="Model")

    monkeypatch.setattr("unmergeable.attacks.wide.WideModel", refuse)
    with pytest.raises(InputError, match="no list of blocks"):
        um.attack("wide", folder / PROTECTED, tmp_path / "out", audit=folder / "audit.yaml")
    assert not list(tmp_path.iterdir())


def test_what_is_called_a_merge_and_is_none_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coefficients that stay at nothing leave the base."""
    monkeypatch.setattr(coefficients, "STARTS", ((0.0, 0.0),))
    monkeypatch.setattr(coefficients, "RATE", 0.0)
    with pytest.raises(InputError, match=r"not a merge.*copied from one input, mostly from base"):
        um.attack("coefficients", folder / PROTECTED, tmp_path / "out", audit=folder / "audit.yaml")
    assert not list(tmp_path.iterdir())


def test_a_thief_is_who_the_configuration_says_and_is_told_what_he_gets(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The target stands in the place of the protected model, and the plain one is not the thief's."""
    seen: list[Thief] = []
    told: list[tuple[int, int, str]] = []
    attack: Any = merge_attack_maker("wide")
    explore = attack.explore
    monkeypatch.setattr(
        attack, "explore", lambda self, thief, look: (seen.append(thief), explore(self, thief, look))
    )
    report = um.attack(
        "wide", folder / f"{PROTECTED}-exact", tmp_path / "out", audit=folder / "audit.yaml",
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    (thief,) = seen
    module = load_module(folder / f"{PROTECTED}-exact").state_dict()
    assert list(thief.experts) == [PROTECTED, ONE]
    assert all(torch.equal(thief.experts[PROTECTED][name], module[name]) for name in module)
    assert [done for done, _, _ in told] == [1, 2, 3, 4, 5, 6]
    assert {label for _, _, label in told} == {"merges looked at"}
    lines = [" ".join(line.split()) for line in _render_merge.attacked(report).splitlines()]
    for line in (
        "by wide", "needs the base itself; other fine-tunes of the base", "access level 1", "tried 6"
    ):  # fmt: skip
        assert line in lines
    for start in ("dose ", "others ", "base ", "validation ", "test ", "size "):
        assert [line for line in lines if line.startswith(start)], start


def test_no_option_has_the_name_of_an_argument() -> None:
    """Options are keywords beside the verb's own."""
    own = set(inspect.signature(um.attack).parameters)
    for name in attacks.WITH_TASKS:
        assert not own & set(declared(merge_attack_maker(name))), name
    for name in attacks.ATTACKS:
        assert not own & set(declared(attacks.attack_named(name).run)), name


def test_a_wide_merge_with_a_base_of_another_class(folder: Path, tmp_path: Path) -> None:
    """The base without a head: its body stands beside the others', under the target's head."""
    held: Any = load_module(folder / "base")
    body = transformers.ViTModel(held.config)
    body.load_state_dict(held.vit.state_dict(), strict=False)
    body.save_pretrained(tmp_path / "body")
    fields = yaml.safe_load((folder / "audit.yaml").read_text()) | {"base": str(tmp_path / "body")}
    bench = Bench(make_config(fields, folder, folder / "audit.yaml"), tmp_path / "work")
    options = {"dose": 0.5, "others": 0.6, "base": True}
    attack: Any = merge_attack_maker("wide")
    subject = attack().make(bench.thief("protected"), options)
    single._write(attack(), bench, options, subject, tmp_path / "out", folder / f"{PROTECTED}-exact")
    images, _ = thief_cases.pictures(PROTECTED, 16, 7)
    with torch.no_grad():
        found, wanted = (
            load_module(tmp_path / "out")(pixel_values=images),
            subject[PROTECTED](pixel_values=images),
        )
    assert torch.allclose(found.logits, wanted.logits, atol=1e-4)
