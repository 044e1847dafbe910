"""Attention in passes that are in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import hardened
import thief_cases
from hardened import PROTECTED
from unmergeable.harden.attention import attending
from unmergeable.harden.wrapper import Hardening

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fresh_accelerate")]
CPU = torch.device("cpu")


class Seen(TorchDispatchMode):
    """In which numbers attention, and matrix products, were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.products = set[torch.dtype](), set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in func.__name__:
            self.attention.add(args[0].dtype)
        elif func.__name__.startswith("addmm"):
            self.products.add(args[1].dtype)
        return func(*args, **(kwargs or {}))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "mask", [None, torch.ones(5, 7, dtype=torch.bool).tril(), torch.zeros(5, 7, dtype=torch.bfloat16)]
)
def test_it_is_that_of_float32_rounded_once(mask: torch.Tensor | None, named: bool) -> None:
    query, key, value = drawn(2, 3, 5, 8), drawn(2, 3, 7, 8), drawn(2, 3, 7, 8).detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16), attending(CPU):
        if named:
            got = scaled_dot_product_attention(query, key=key, value=value, attn_mask=mask, scale=0.4)
        else:
            got = scaled_dot_product_attention(query, key, value, mask, scale=0.4)
    wide = mask.float() if mask is not None and mask.is_floating_point() else mask
    exact = scaled_dot_product_attention(query, key, value.float(), wide, scale=0.4)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.bfloat16())
    found, expected = (torch.autograd.grad(one.float().sum(), (query, key)) for one in (got, exact))
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(found, expected, strict=True))


def test_what_is_not_in_bf16_is_left_alone() -> None:
    query, half = drawn(1, 1, 4, 8), drawn(1, 1, 4, 8).detach().bfloat16()
    with attending(CPU), Seen() as seen:
        assert scaled_dot_product_attention(query, query, query).dtype == torch.float32
        assert scaled_dot_product_attention(half, half, half).dtype == torch.bfloat16  # a model's own type
    assert seen.attention == {torch.float32, torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16), Seen() as seen:
        scaled_dot_product_attention(query, query, query)
    assert seen.attention == {torch.bfloat16}  # without it, and the mode is gone


def test_training_has_it_in_float32_and_the_rest_in_bf16(models: Path, tmp_path: Path) -> None:
    in_training = Seen()

    def watched(done: int, total: int, label: str) -> None:
        if done == 1:
            in_training.__enter__()
        elif done == total:
            in_training.__exit__(None, None, None)

    hardened.harden(
        models,
        tmp_path / "out",
        steps=6,
        batch=32,
        rate=3e-4,
        precision="bf16",
        strength=0.3,
        progress=watched,
    )
    assert in_training.attention == {torch.float32}
    assert in_training.products == {torch.bfloat16}


def test_so_has_what_is_added_to_a_training_of_ones_own() -> None:
    module = thief_cases.trained()[PROTECTED].train()
    hardening = Hardening(module, thief_cases.trained()["base"].state_dict())
    images, labels = thief_cases.pictures(PROTECTED, 8, 5)
    with torch.autocast("cpu", torch.bfloat16), Seen() as seen:
        hardening.backward({"pixel_values": images, "labels": labels})
    assert seen.attention == {torch.float32}
    assert torch.bfloat16 in seen.products
