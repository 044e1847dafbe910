"""Wide merges: of a model with itself, under an exact lock, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import toy
from merging_models import inputs, nudged, transformer
from unmergeable.errors import InputError, UsageError
from unmergeable.merging.simple import task_arithmetic
from unmergeable.merging.wide import WideBlock, WideModel, block_lists
from unmergeable.module import lock_module

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("llama", "gpt2", "bert", "vit")


def logits(model: nn.Module, kind: str) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**inputs(kind)).logits
    return output


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", ["auto", "block"])
def test_of_a_model_with_itself_is_the_model(kind: str, parts: str) -> None:
    model = transformer(kind)
    want = logits(model, kind)
    wide = WideModel([model, copy.deepcopy(model), model], [0.5, 0.8, -0.3], parts=parts)
    assert relative(logits(wide, kind), want) < 1e-5
    assert torch.equal(logits(model, kind), want)  # the model itself is as it was
    assert 1.2 < wide.size_ratio < 2


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_at_weight_one_is_that_model(kind: str) -> None:
    base = transformer(kind)
    other = nudged(base, 1)
    assert relative(logits(WideModel([base, other], [0.0, 1.0]), kind), logits(other, kind)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_found_where_a_block_is_a_sum(kind: str) -> None:
    model = transformer(kind)
    wide = WideModel([model, nudged(model, 1)], [0.5, 0.5])
    logits(wide, kind)
    writers = {block.writers for block in wide.modules() if isinstance(block, WideBlock)}
    # a block that normalises its sum is taken as a whole
    assert {len(names or ()) for names in writers} == ({0} if kind == "bert" else {2})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", ["auto", "block"])
def test_a_lock_does_not_hinder_it_and_hinders_the_plain_merge(kind: str, parts: str) -> None:
    base = transformer(kind)
    protected, other = nudged(base, 1), nudged(base, 2)
    locked = copy.deepcopy(protected)
    lock_module(locked, key=toy.key(), salt=bytes(32))
    weights = [0.2, 0.5, 0.3]
    want = logits(WideModel([base, protected, other], weights, parts=parts), kind)
    got = logits(WideModel([base, locked, other], weights, parts=parts), kind)
    assert relative(got, want) < 1e-4

    def plain(model: nn.Module) -> torch.Tensor:
        states = {"p": dict(model.state_dict()), "o": dict(other.state_dict())}
        merged = copy.deepcopy(base)
        merged.load_state_dict(task_arithmetic(dict(base.state_dict()), states, weight=0.5).shared)
        return logits(merged, kind)

    assert relative(plain(locked), plain(protected)) > 1e-2


def test_outside_of_blocks_models_are_averaged_and_heads_stay_with_the_host() -> None:
    small, large = transformer("vit", num_labels=3), transformer("vit", num_labels=5)
    for host, model in enumerate((small, large)):
        wide = WideModel([small, large], [1.0, 1.0], host=host)
        assert wide.private == ["classifier.weight", "classifier.bias"]
        assert logits(wide, "vit").shape[-1] == model.config.num_labels
        name = "vit.embeddings.cls_token"
        want = (small.get_parameter(name) + large.get_parameter(name)) / 2
        torch.testing.assert_close(wide.model.get_parameter(name), want)
    other = nudged(small, 1)
    wide = WideModel([small, other], [0.5, 0.5], host=1, private=["classifier."])
    assert torch.equal(
        wide.model.get_parameter("classifier.weight"), other.get_parameter("classifier.weight")
    )


def test_gradients_flow_through_every_model() -> None:
    base = transformer("llama")
    other = nudged(base, 1)
    wide = WideModel([base, other], [0.5, 0.5])
    wide(**inputs("llama")).logits.square().mean().backward()
    for model in (base, other):
        blocks = next(iter(block_lists(model).values()))
        assert all(p.grad is not None and float(p.grad.norm()) > 0 for p in blocks[0].parameters())


def test_what_has_no_wide_merge_is_refused() -> None:
    model = transformer("llama")
    with pytest.raises(UsageError, match="one weight for each model"):
        WideModel([model, model], [1.0])
    with pytest.raises(UsageError, match="no such kind of parts"):
        WideModel([model], [1.0], parts="rows")
    with pytest.raises(InputError, match="models with different blocks"):
        WideModel([model, transformer("llama", num_hidden_layers=3)], [1.0, 1.0])
    with pytest.raises(InputError, match="different classes or shapes"):
        WideModel([model, transformer("llama", intermediate_size=32)], [1.0, 1.0])
    with pytest.raises(InputError, match="no list of blocks"):
        WideModel([nn.Linear(2, 2)], [1.0])
    with pytest.raises(UsageError, match="without a cache"):
        WideModel([model, model], [0.5, 0.5])(**inputs("llama"), use_cache=True)
    with pytest.raises(UsageError, match="sum to zero"):
        WideModel([model, nudged(model, 1)], [1.0, -1.0])


# --- blocks that hand on more than their stream ---------------------------------------------------------------


def t5(seed: int) -> nn.Module:
    import transformers as tf

    torch.manual_seed(seed)
    config = tf.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    model = tf.T5ForConditionalGeneration(config).eval().double()
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "relative_attention_bias" in name:
                one.copy_(3 * torch.randn_like(one))
    return model


def answers(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, decoder_input_ids=tokens[:, :7], use_cache=False).logits
    return found


def test_biases_of_positions_are_every_models_own() -> None:
    """T5's first block makes them for all others: each model's blocks must have its own."""
    base, other = t5(0), t5(1)
    shared = {name: value for name, value in other.state_dict().items() if ".block." not in name}
    base.load_state_dict({**base.state_dict(), **shared})
    for host in (0, 1):
        wide = WideModel([base, other], [0.0, 1.0], host=host)
        assert relative(answers(wide), answers(other)) < 1e-9
        assert not wide.handed
    locked = copy.deepcopy(other)
    lock_module(locked, key=toy.key(), salt=bytes(32))
    assert relative(answers(locked), answers(other)) < 1e-9
    for host in (0, 1):
        one, two = (WideModel([base, model], [0.6, 0.4], host=host) for model in (other, locked))
        assert relative(answers(one), answers(two)) < 1e-9
