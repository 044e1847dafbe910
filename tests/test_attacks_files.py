"""Attacks from checkpoint to checkpoint: what is written, what is refused, and the embedded models."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attack_cases as cases
import toy
from unmergeable import attacks, zoo
from unmergeable.attacks import ATTACKS, attack
from unmergeable.attacks.substitute import block_numbers, part_tensors, search_space
from unmergeable.errors import InputError, UnmergeableError, UsageError
from unmergeable.lock import lock

SPEC = toy.spec()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned, other; tuned locked by exact and by gauge."""
    root = tmp_path_factory.mktemp("attacks")
    for name, values in zip(("base", "tuned", "other"), cases.models(), strict=True):
        toy.write(root / name, values, dtype="F64", shards=2 if name == "tuned" else 1)
    for method in ("exact", "gauge"):
        lock(root / "tuned", root / method, key=toy.key(), method=method, spec=SPEC)
    return root


def run(name: str, target: Path, dst: Path, **options: Any) -> attacks.AttackReport:
    return attack(name, target, dst, spec=SPEC, **options)


def test_an_exact_lock_is_undone_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    report = run("anchor-coupled", folder / "exact", tmp_path / "out", anchor=folder / "other")
    assert toy.tree(tmp_path / "out") == toy.tree(folder / "tuned")
    assert report.keeps_function
    assert report.anchor == str(folder / "other")
    assert report.before is not None
    assert report.after is not None
    assert report.before > 1 > 0.3 > report.after
    assert report.facts["sites"]["qk"]["exact"] == toy.LAYERS
    assert report.as_dict()["needs"] == ["anchor"]


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_writes_the_same_layout(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    report = run(name, folder / "gauge", out, base=folder / "base", seed=3)
    made, locked = toy.tree(out), toy.tree(folder / "gauge")
    assert made.keys() == locked.keys() - {"unmergeable.json"}
    assert {k: len(v[1]) for k, v in made.items()} == {k: len(locked[k][1]) for k in made}
    assert report.seed == 3
    assert report.changed > 0
    assert report.after is not None
    assert report.before is not None
    assert report.after < report.before
    values, tuned = toy.load(out), toy.load(folder / "tuned")
    assert (cases.moved(values, tuned) <= 1e-9) == report.keeps_function
    run(name, folder / "gauge", tmp_path / "again", base=folder / "base", seed=3)
    assert toy.tree(tmp_path / "again") == made


def test_a_single_file(folder: Path, tmp_path: Path) -> None:
    source = toy.write_file(tmp_path / "a.safetensors", toy.load(folder / "tuned"), dtype="F64")
    lock(source, tmp_path / "b.safetensors", key=toy.key(), spec=SPEC, config=toy.CONFIG)
    out = tmp_path / "c.safetensors"
    run("anchor-coupled", tmp_path / "b.safetensors", out, base=folder / "base", config=toy.CONFIG)
    assert out.read_bytes() == source.read_bytes()
    assert not list(tmp_path.glob("c.safetensors.*"))


def test_what_cannot_be_done_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    base = toy.load(folder / "base")
    name = "l.1.o.weight"
    toy.write(tmp_path / "narrow", {**base, name: base[name][:-1]}, dtype="F64")
    toy.write(tmp_path / "fewer", {k: v for k, v in base.items() if k != name}, dtype="F64")
    toy.write(tmp_path / "nan", {**base, name: np.full_like(base[name], np.nan)}, dtype="F64")
    before = sorted(tmp_path.iterdir())
    cases_: list[tuple[type[UnmergeableError], str, dict[str, Any]]] = [
        (UsageError, "needs an anchor", {}),
        (InputError, "another shape here", {"base": tmp_path / "narrow"}),
        (InputError, "the anchor lacks a tensor", {"anchor": tmp_path / "fewer"}),
        (InputError, "NaN or infinity in the anchor", {"base": tmp_path / "nan"}),
        (UsageError, "no such option", {"base": folder / "base", "strength": 2}),
    ]
    for kind, message, options in cases_:
        with pytest.raises(kind, match=message):
            run("anchor-coupled", folder / "exact", tmp_path / "out", **options)
    with pytest.raises(UsageError, match="needs the base"):
        run("substitute-mlp", folder / "exact", tmp_path / "out", anchor=folder / "other")
    with pytest.raises(UsageError, match="no such attack"):
        run("align", folder / "exact", tmp_path / "out", base=folder / "base")
    with pytest.raises(UsageError, match="no such blocks"):
        run("substitute-blocks", folder / "exact", tmp_path / "out", base=folder / "base", blocks=[5])
    with pytest.raises(InputError, match="destination exists"):
        run("anchor-coupled", folder / "exact", folder / "gauge", base=folder / "base")
    assert sorted(tmp_path.iterdir()) == before


def test_parts_of_the_base(folder: Path, tmp_path: Path) -> None:
    values, base = toy.load(folder / "gauge"), toy.load(folder / "base")
    match = cases.toy_match(base)
    run("substitute-attention", folder / "gauge", tmp_path / "a", base=folder / "base")
    made = toy.load(tmp_path / "a")
    attention = {
        f"l.{n}.{x}"
        for n in (0, 1)
        for x in ("q.weight", "q.bias", "k.weight", "v.weight", "v.bias", "o.weight")
    }
    assert part_tensors(match, "attention", list(base)) == attention
    for name in values:
        assert np.array_equal(made[name], base[name] if name in attention else values[name])
    run("substitute-blocks", folder / "gauge", tmp_path / "b", base=folder / "base", blocks=[0])
    made = toy.load(tmp_path / "b")
    numbers = block_numbers(match, list(base))
    assert "embed" not in numbers
    assert numbers["l.1.norm"] == 1
    for name in values:
        assert np.array_equal(made[name], base[name] if numbers.get(name) == 0 else values[name])
    space = search_space(match, list(base))
    assert {"blocks": (0,), "part": None} in space
    assert {"blocks": (1,), "part": "mlp"} in space


def test_attacks_know_no_architecture() -> None:
    """Everything is read through the spec: no family or class name stands in the code."""
    root = Path(inspect.getfile(attacks)).parent
    text = "\n".join(path.read_text(encoding="utf-8").lower() for path in root.glob("*.py"))
    for word in ("llama", "gpt", "bert", "qwen", "mistral", "q_proj", "model_type", "self_attn"):
        assert word not in text, word


TASKS = zoo.tasks()


@pytest.mark.parametrize("method", ["exact", "mergelock", "params"])
def test_the_embedded_models_come_back(tmp_path: Path, method: str) -> None:
    """A lock of a really trained model, from the base and from another expert; accuracy as before."""
    mine, other = TASKS[0], TASKS[1]
    source = zoo.model_path(mine)
    lock(source, tmp_path / "locked", key=toy.key(), method=method)
    tuned, base, expert = (toy.load(zoo.model_path(name)) for name in (mine, zoo.BASE, other))
    before = zoo.accuracy(source, mine)
    for label, towards in ((zoo.BASE, base), (other, expert)):
        out = tmp_path / label
        report = attack("anchor-coupled", tmp_path / "locked", out, anchor=zoo.model_path(label))
        made = toy.load(out)
        names = [n for n in tuned if not np.array_equal(toy.load(tmp_path / "locked")[n], tuned[n])]
        size = [
            np.sqrt(sum(((a[n] - b[n]) ** 2).sum() for n in names))
            for a, b in ((made, tuned), (tuned, towards))
        ]
        assert size[0] < 0.2 * size[1]
        assert abs(zoo.accuracy(out, mine) - before) <= 0.01
        assert report.seconds < 60
        if method == "exact":
            assert size[0] == 0.0
