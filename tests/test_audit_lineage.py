"""Whether the given base is where fine-tunes began: their changes against it are alike if it is not."""

from __future__ import annotations

import pytest
import torch

from unmergeable import zoo
from unmergeable.audit.lineage import ALIKE, ALIKE_PAIR, cosines, doubtful_base
from unmergeable.merging.tensors import load_state

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    """The embedded zoo."""
    folder = tmp_path_factory.mktemp("lineage")
    zoo.copy_to(folder)
    return {name: load_state(folder / name) for name in (zoo.BASE, *zoo.tasks())}


def body(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if "classifier" not in name}


def test_fine_tunes_of_their_base_are_not_alike(states: dict[str, State]) -> None:
    base, tuned = body(states[zoo.BASE]), {task: states[task] for task in zoo.tasks()}
    found = cosines(base, tuned)
    assert len(found) == 6
    assert 0.05 < min(found.values()) < 0.2
    assert max(found.values()) == found["latin", "cyrillic"] < ALIKE_PAIR  # two alphabets
    assert doubtful_base(base, tuned) is None
    for one, other in found:
        assert doubtful_base(base, {name: states[name] for name in (one, other)}) is None


@pytest.mark.parametrize("wrong", zoo.tasks())
def test_a_sibling_in_the_place_of_the_base_is_noted(wrong: str, states: dict[str, State]) -> None:
    tuned = {task: states[task] for task in zoo.tasks() if task != wrong}
    base = body(states[wrong])
    least = min(cosines(base, tuned).values())
    assert least > ALIKE
    note = doubtful_base(base, tuned)
    assert note is not None
    assert f"cosines of {least:.2f} and more" in note
    assert all(task in note for task in tuned)


def test_cosines_are_of_what_models_share() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(3), "ids": torch.zeros(2, dtype=torch.int64)}
    models = {
        "x": {"a": torch.tensor([1.0, 0.0]), "b": torch.ones(3), "ids": base["ids"]},
        "y": {"a": torch.tensor([1.0, 1.0]), "b": torch.ones(4), "ids": base["ids"], "c": torch.ones(1)},
        "z": {"a": torch.zeros(2), "b": torch.ones(3)},
    }
    found = cosines(base, models)
    assert found == pytest.approx({("x", "y"): 0.5**0.5, ("x", "z"): 0, ("y", "z"): 0})
    assert doubtful_base(base, {"x": models["x"]}) is None
    assert doubtful_base(base, {"x": models["x"], "y": models["y"]}) is not None
