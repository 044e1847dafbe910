"""Attacks with data on language models: windows of tokens, tied embeddings, no heads, no cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from merging_models import nudged, transformer
from thief_cases import distance
from unmergeable.attacks import coefficients, distil, repair
from unmergeable.attacks.blocks import Blocks
from unmergeable.attacks.coefficients import Coefficients
from unmergeable.attacks.distil import Distil
from unmergeable.attacks.informed import Fisher, RegMean
from unmergeable.attacks.repair import Repair, Untrap
from unmergeable.attacks.thief import Subject, detached
from unmergeable.attacks.training import TEXTS, TEXTS_EACH
from unmergeable.attacks.wide import Wide
from unmergeable.audit.bench import Bench
from unmergeable.audit.config import make_config
from unmergeable.audit.work import one_thread

LENGTH, WINDOWS = 12, 40


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(coefficients, "STARTS", ((0.4, 0.4),))
    monkeypatch.setattr(coefficients, "STEPS", 10)
    monkeypatch.setattr(repair, "STEPS", 20)
    monkeypatch.setattr(distil, "STEPS", 10)
    monkeypatch.setattr(distil, "RATE", 1e-3)
    monkeypatch.setattr(Fisher, "count", 4)
    with one_thread():
        yield


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A random model and two fine-tunes of it; texts of two kinds, each with a favourite token."""
    folder = tmp_path_factory.mktemp(request.param)
    base: Any = transformer(
        request.param, **({"tie_word_embeddings": True} if request.param == "llama" else {})
    )
    for number, name in enumerate(("base", "code", "prose")):
        made: Any = nudged(base, number, 0.05) if number else base
        made.save_pretrained(folder / name)
    random = np.random.default_rng(0)
    for number, task in enumerate(("code", "prose"), 5):
        for split in ("test", "train"):
            ids = random.integers(3, 40, (WINDOWS, LENGTH))
            ids[random.random(ids.shape) < 0.5] = number
            np.savez(folder / f"{task}-{split}.npz", input_ids=ids)
    fields = {
        "version": 1, "base": "base", "device": "cpu", "others": {"prose": "prose"},
        "protected": {"model": "code", "plain": "code", "task": "code"},
        "tasks": {
            task: {
                "kind": "language-modelling", "data": f"{task}-test.npz", "length": LENGTH,
                "train": {"data": f"{task}-train.npz"},
            }
            for task in ("code", "prose")
        },
    }  # fmt: skip
    with one_thread():
        return Bench(make_config(fields, folder, folder / "audit.yaml"), folder / "work")


class Scored:
    """Minus the loss of every merge that is looked at, by task."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.found: list[tuple[float, float]] = []

    def __call__(
        self, options: Mapping[str, Any], subject: Subject, *, kept: Subject | None = None
    ) -> tuple[float, float]:
        self.found.append(self.peek(subject))
        return self.found[-1]

    def peek(self, subject: Subject) -> tuple[float, float]:
        scores = self.bench.measure(subject, "screen")
        return float(scores["code"].mean()), float(scores["prose"].mean())


def looked(bench: Bench, attack: Any, **more: Any) -> tuple[Scored, Any]:
    thief, scored = bench.thief("plain", **more), Scored(bench)
    attack.explore(thief, scored)
    assert scored.found
    assert np.isfinite(scored.found).all()
    return scored, thief


def test_there_are_no_heads_and_ties_stay(bench: Bench) -> None:
    assert bench.heads["plain"] == bench.heads["prose"] == {}
    assert not [name for name in bench.base if name.startswith("lm_head")]  # tied: once, under its first name


def test_texts_are_few_where_others_have_few_of_a_class(bench: Bench) -> None:
    start = detached(bench.thief("plain").mixer.mix({"code": 0.5, "prose": 0.5}))
    scored, thief = looked(bench, Repair(4), starts=[({}, start)])
    assert thief.bill.labelled == {"code": 4 * TEXTS_EACH, "prose": 4 * TEXTS_EACH}
    assert thief.bill.tokens == dict.fromkeys(("code", "prose"), 4 * TEXTS_EACH * (LENGTH - 1))
    assert thief.bill.forwards == 2 * 2 * 20 * TEXTS * 3  # rates, tasks, steps, texts a step, price
    before = Scored(bench).peek(start)
    assert max(min(pair) for pair in scored.found) > min(before) + 0.02


@pytest.mark.parametrize("attack", [Coefficients("row", "labels"), Coefficients("block", "entropy")])
def test_coefficients_are_learnt_of_texts(attack: Coefficients, bench: Bench) -> None:
    _, thief = looked(bench, attack)
    used = thief.bill.labelled if attack.labels else thief.bill.inputs
    assert used == dict.fromkeys(("code", "prose"), WINDOWS)  # all that there are
    assert thief.bill.forwards == 2 * 10 * TEXTS * 3


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("target", ["soft-2", "hard", "features"])
def test_a_student_comes_nearer_to_its_teacher(target: str, foreign: bool, bench: Bench) -> None:
    attack = Distil(target, foreign)
    _, thief = looked(bench, attack)
    assert thief.bill.inputs == {"prose" if foreign else "code": WINDOWS}
    student = attack._student(thief)
    batch = thief.unlabelled("code", 16)

    def apart(state: Any) -> float:
        with torch.no_grad():
            task = thief.teachable("code")
            return float(
                attack._loss(
                    task, thief.call("code", thief.experts["code"]), thief.call("code", state), batch
                )
            )

    assert apart(student) < apart(thief.base)
    assert distance(thief.base, student) > 1e-3


def test_the_others_run_on_texts(bench: Bench) -> None:
    for attack in (RegMean(), Fisher(), Wide(), Untrap()):
        scored, thief = looked(bench, attack)
        assert len(set(scored.found)) > 1 or isinstance(attack, Fisher)
        assert thief.bill.labelled == ({"code": WINDOWS} if isinstance(attack, Untrap) else {})
    thief = bench.thief("plain")
    made = Blocks().make(thief, {"taken": {"rest": "all"}, "others": 0.5})
    for name, tensor in made.shared.items():
        if "wte" in name or "embed_tokens" in name:
            assert torch.allclose(tensor, thief.experts["code"][name], atol=1e-6)
    for module in Wide().make(thief, {"dose": 0.5, "others": 0.5, "base": False}).values():  # type: ignore[union-attr]
        state = module.model.state_dict()
        if "lm_head.weight" in state:  # still tied
            tied = next(
                t for name, t in state.items() if "wte.weight" in name or "embed_tokens.weight" in name
            )
            assert torch.equal(state["lm_head.weight"], tied)
