"""Task arithmetic, TIES and the full dose: by hand on small tensors, and beside mergekit's."""

from __future__ import annotations

import pytest
import torch

from unmergeable.errors import InputError, UsageError
from unmergeable.merging import METHODS, merge_method
from unmergeable.merging.simple import FULL_DOSE_GRID, full_dose, task_arithmetic, ties


def models(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[dict, dict[str, dict]]:
    """A base of two tensors and a counter, and two experts with heads of their own."""
    random = torch.Generator().manual_seed(seed)
    base = {
        "body": torch.randn(8, 6, generator=random).to(dtype),
        "head": torch.randn(5, 8, generator=random).to(dtype),
        "steps": torch.tensor(3),
    }
    experts = {}
    for name, classes in (("a", 2), ("b", 5)):
        experts[name] = {
            "body": base["body"] + 0.1 * torch.randn(8, 6, generator=random).to(dtype),
            "head": torch.randn(classes, 8, generator=random).to(dtype),
            "steps": torch.tensor(9),
            f"extra.{name}": torch.ones(2),
        }
    return base, experts


def test_task_arithmetic_adds_weighted_task_vectors() -> None:
    base, experts = models()
    merged = task_arithmetic(base, experts, weight={"a": 0.5, "b": -2.0})
    a, b = experts["a"]["body"] - base["body"], experts["b"]["body"] - base["body"]
    torch.testing.assert_close(merged.shared["body"], base["body"] + 0.5 * a - 2.0 * b)
    torch.testing.assert_close(
        task_arithmetic(base, {"a": experts["a"]}, weight=1.0).shared["body"], experts["a"]["body"]
    )


def test_tensors_that_the_base_cannot_hold_stay_with_their_task() -> None:
    base, experts = models()
    merged = task_arithmetic(base, experts, weight=0.5)
    assert set(merged.shared) == set(base)
    assert set(merged.private["a"]) == {"head", "extra.a"}
    assert set(merged.private["b"]) == {"extra.b"}
    assert merged.for_task("a")["head"] is experts["a"]["head"]
    torch.testing.assert_close(
        merged.for_task("b")["head"], base["head"] + 0.5 * (experts["b"]["head"] - base["head"])
    )
    assert merged.shared["steps"] is base["steps"]  # not a number to average


def test_full_dose_is_task_arithmetic_with_one_model_nearly_whole() -> None:
    base, experts = models()
    one = full_dose(base, experts, protected="b", dose=1.15, others=0.1).shared["body"]
    two = task_arithmetic(base, experts, weight={"a": 0.1, "b": 1.15}).shared["body"]
    assert torch.equal(one, two)
    assert len(FULL_DOSE_GRID) == 36


def test_ties_by_hand() -> None:
    base = {"w": torch.zeros(4)}
    experts = {
        "a": {"w": torch.tensor([4.0, -3.0, 2.0, 0.1])},
        "b": {"w": torch.tensor([2.0, 5.0, -0.1, 0.2])},
    }
    # halves kept: a (4, -3, ., .), b (2, 5, ., .); signs elected: +, +; means of those that agree
    merged = ties(base, experts, density=0.5).shared["w"]
    assert merged.tolist() == [3.0, 5.0, 0.0, 0.0]
    assert ties(base, experts, weight=2.0, density=0.5).shared["w"].tolist() == [6.0, 10.0, 0.0, 0.0]


def test_the_base_dtype_is_kept() -> None:
    base, experts = models(dtype=torch.bfloat16)
    for merged in (task_arithmetic(base, experts, weight=0.3), ties(base, experts)):
        assert merged.shared["body"].dtype == torch.bfloat16


def test_same_as_mergekit() -> None:
    mergekit = pytest.importorskip("mergekit.merge_methods")
    random = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(32, 24, generator=random)}
    experts = {name: {"w": base["w"] + torch.randn(32, 24, generator=random)} for name in "abc"}
    with torch.no_grad():
        for method, options, theirs in (
            ("task_arithmetic", {"weight": 0.4}, {"weight": 0.4}),
            ("ties", {"density": 0.25, "weight": 1.0}, {"density": 0.25, "weight": 1.0}),
        ):
            ours = merge_method(method)(base, experts, **options).shared
            other = mergekit.merge_state_dicts(
                {"base": base, **experts}, method, parameters=theirs, base="base"
            )
            torch.testing.assert_close(ours["w"], other["w"], atol=1e-6, rtol=1e-5)


def test_what_makes_no_sense_is_refused() -> None:
    base, experts = models()
    with pytest.raises(UsageError, match="no such merge method"):
        merge_method("average_everything")
    with pytest.raises(UsageError, match="nothing to merge"):
        task_arithmetic(base, {}, weight=1.0)
    with pytest.raises(UsageError, match="weights and experts differ"):
        task_arithmetic(base, experts, weight={"a": 1.0})
    with pytest.raises(UsageError, match="density"):
        ties(base, experts, density=0.0)
    with pytest.raises(UsageError, match="no such expert"):
        full_dose(base, experts, protected="c", dose=1.0, others=0.1)
    with pytest.raises(InputError, match="lacks tensors of the base"):
        task_arithmetic(base, {"a": {"head": base["head"]}}, weight=1.0)


@pytest.mark.parametrize("name", METHODS)
def test_every_listed_method_exists(name: str) -> None:
    assert callable(merge_method(name))
