"""Spectral merges and masks beside their definitions, and grids merged in place."""

from __future__ import annotations

import pytest
import torch

from merging_models import triple
from unmergeable.errors import RunError, UsageError
from unmergeable.merging import merge
from unmergeable.merging.blocks import layout
from unmergeable.merging.grids import (
    FULL_DOSE_GRID,
    LAMBDAS,
    Mixer,
    arithmetic_grid,
    dose_grid,
    substitute,
)
from unmergeable.merging.simple import task_arithmetic
from unmergeable.merging.spectral import GRIDS, largest, project_off, tall_masks, truncate

KEY = "body.0.up.weight"


def deltas(base: dict, models: dict[str, dict], key: str = KEY) -> list[torch.Tensor]:
    return [model[key] - base[key] for model in models.values()]


@pytest.mark.parametrize("name", GRIDS)
def test_every_spectral_method_is_a_mix(name: str) -> None:
    base, models = triple(names=("p", "o", "x"))
    options = dict(GRIDS[name][-1])
    if "others" in options:
        options["protected"] = "p"
    found = merge(name, base, models, **options).facts
    assert found.problems == []
    assert found.mixed == found.tensors
    assert found.left_out == []


def test_iso_c_has_one_singular_value() -> None:
    base, models = triple(names=("p", "o", "x"))
    merged = merge("iso_c", base, models, scale=0.7).tensors
    total = sum(deltas(base, models))
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    torch.testing.assert_close(merged[KEY] - base[KEY], 0.7 * s.mean() * u @ vh, atol=1e-5, rtol=1e-4)
    bias = "body.0.up.bias"
    want = 0.7 * sum(deltas(base, models, bias)) / 3
    torch.testing.assert_close(merged[bias] - base[bias], want, atol=1e-6, rtol=1e-4)


def test_tsv_m_of_orthogonal_tasks_is_their_truncated_sum() -> None:
    base = {"w": torch.zeros(6, 6)}
    one, two = torch.zeros(6, 6), torch.zeros(6, 6)
    one[0, 1], one[1, 0], one[2, 2], one[0, 4] = 3.0, 2.0, 1.0, 0.0
    two[3, 3], two[4, 5], two[5, 4] = 5.0, 1.0, 0.5
    merged = merge("tsv_m", base, {"a": {"w": one}, "b": {"w": two}}, scale=1.0).tensors["w"]
    # each keeps 6 / 2 singular triples, and these do not meet
    torch.testing.assert_close(merged, one + two, atol=1e-5, rtol=1e-5)


def test_tsv_m_of_one_task_is_that_task() -> None:
    base, models = triple(names=("p",))
    merged = merge("tsv_m", base, models, scale=1.0).tensors[KEY]
    torch.testing.assert_close(merged, models["p"][KEY], atol=1e-5, rtol=1e-4)


def test_masks_by_hand() -> None:
    stacked = torch.tensor([[4.0, 1.0, 0.0, -2.0], [1.0, 3.0, 0.0, 2.0]])
    assert tall_masks(stacked, 0.5).tolist() == [[True, False, False, True], [False, True, False, True]]
    base, models = {"w": torch.zeros(4)}, {"p": {"w": stacked[0]}, "o": {"w": stacked[1]}}
    agreed = merge("consensus", base, models, scale=1.0, strictness=0.5).tensors["w"]
    assert agreed.tolist() == [0.0, 0.0, 0.0, 0.0]  # the only entry that matters to both cancels
    masked = merge("tall_mask", base, models, protected="p", dose=1.0, others=0.5, strictness=0.5).tensors[
        "w"
    ]
    assert masked.tolist() == [4.0, 1.5, 0.0, -2.0]
    with pytest.raises(UsageError, match="fewer models"):
        merge("consensus", base, {"p": models["p"]})


def test_truncation_top_k_and_projection() -> None:
    random = torch.Generator().manual_seed(0)
    delta, away = torch.randn(2, 8, 6, generator=random)
    assert torch.linalg.matrix_rank(truncate(delta, 0.34)) == 2
    torch.testing.assert_close(truncate(delta, 1.0), delta, atol=1e-5, rtol=1e-4)
    top = largest(delta, 0.25)
    assert int((top != 0).sum()) == 12
    assert top.abs()[top != 0].min() >= delta.abs()[top == 0].max()
    rest = project_off(delta, away, 0.34)
    u, _, vh = torch.linalg.svd(away, full_matrices=False)
    assert float((u[:, :2].T @ rest).abs().max()) < 1e-5
    assert float((rest @ vh[:2].T).abs().max()) < 1e-5
    vector = project_off(delta[0], away[0], 0.5)
    assert abs(float(vector @ away[0])) < 1e-5
    with pytest.raises(UsageError, match="out of range"):
        merge("top_k", {"w": delta}, {"p": {"w": away}}, protected="p", density=0.0)
    with pytest.raises(UsageError, match="no such expert"):
        merge("projected", {"w": delta}, {"p": {"w": away}}, protected="q")


def test_a_grid_in_one_buffer_is_the_merges_one_by_one() -> None:
    base, models = triple()
    mixer = Mixer(base, models)
    memory = {name: tensor.data_ptr() for name, tensor in mixer.buffer.items()}
    grid = [*arithmetic_grid(models), *dose_grid("p", ["o"])]
    assert len(grid) == len(LAMBDAS) + len(FULL_DOSE_GRID)
    for point, merged in mixer.run(grid):
        want = task_arithmetic(base, models, weight=point)
        for name, tensor in want.shared.items():
            torch.testing.assert_close(merged.shared[name], tensor)
        assert torch.equal(merged.for_task("p")["head.weight"], models["p"]["head.weight"])
    assert {name: tensor.data_ptr() for name, tensor in mixer.buffer.items()} == memory
    assert torch.equal(base["embed.weight"], triple()[0]["embed.weight"])  # inputs are left alone
    with pytest.raises(UsageError, match="a coefficient of no model"):
        mixer.mix({"x": 1.0})


def test_what_does_not_fit_into_memory_is_refused_with_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = triple()
    numbers = sum(tensor.numel() for tensor in base.values())
    assert Mixer.estimate(base, models) == 4 * 4 * numbers
    monkeypatch.setattr("unmergeable.merging.grids.free_memory", lambda device: 1000)
    with pytest.raises(
        RunError, match=f"not enough memory to merge, expected {16 * numbers} bytes, got 1000"
    ):
        Mixer(base, models)


def test_substitution_takes_blocks_whole() -> None:
    base, models = triple()
    kind = "body.{}.down.weight"
    merged = substitute(base, models, protected="p", blocks=["body.1"], kinds=[kind], weight=0.5).shared
    taken = {"body.1.up.weight", "body.1.up.bias", *(f"body.{n}.down.weight" for n in range(3))}
    half = task_arithmetic(base, {"o": models["o"]}, weight=0.5).shared
    for name in base:
        want = models["p"][name] if name in taken else half[name]
        torch.testing.assert_close(merged[name], want, msg=name)
    mixer = Mixer(base, models)
    grid = layout(mixer.parts.shared)
    again = mixer.substitute("p", grid.block("body.1") | grid.kind(kind), {"o": 0.5}).shared
    assert all(torch.equal(again[name], merged[name]) for name in base)
    with pytest.raises(UsageError, match="no such block"):
        substitute(base, models, protected="p", blocks=["body.7"])
    assert merge("substitute", base, models, protected="p", blocks=["body.1"]).facts.copied < 0.5
