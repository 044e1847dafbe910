"""What a batch holds beside examples of one shape: pictures that are not one a text, and padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from merging_models import transformer
from test_harden_objectives import step
from unmergeable.harden.objectives import mean_states
from unmergeable.harden.wrapper import Hardening
from unmergeable.tasks.task import IGNORED, Examples

pytestmark = pytest.mark.filterwarnings("ignore")
PICTURE, PLACES = 31, 4  # a token that stands for a part of a picture, and how many of them one takes


# --- pictures of texts ---------------------------------------------------------------------------------------


def watched(module: torch.nn.Module) -> list[int]:
    """Of how many texts each pass of a model will have been."""
    seen: list[int] = []
    module.register_forward_pre_hook(
        lambda _, arguments, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    return seen


def reader() -> Any:
    """A tiny LLaVA."""
    import transformers as tf

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**small, image_size=8, patch_size=4),
        text_config=tf.LlamaConfig(**small, vocab_size=32, num_key_value_heads=2),
        image_token_index=PICTURE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration(config)


def texts(pictures: Sequence[int]) -> dict[str, torch.Tensor]:
    """A text for each number of pictures."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 30, (len(pictures), 14), generator=generator)
    for row, count in enumerate(pictures):
        tokens[row, : PLACES * count] = PICTURE
    pixels = torch.randn(sum(pictures), 3, 8, 8, generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone(), "pixel_values": pixels}


@pytest.mark.parametrize(
    ("pictures", "sizes"),
    [
        ((1, 1, 1, 1), {1, 2}),  # merges see a half each, the choice among them a quarter
        ((2, 1, 1, 1), {4}),
        ((2, 2, 2, 2), {4}),
        ((2, 1, 1, 0), {4}),  # as many as texts, and not one each
    ],
)
def test_pictures_stay_with_their_texts(pictures: Sequence[int], sizes: set[int]) -> None:
    module = reader()
    seen, hardening = watched(module), Hardening(module, module.state_dict())
    inputs = texts(pictures)
    assert sum(hardening.backward(inputs) > 0 for _ in range(6)) == 6
    assert set(seen) == sizes


def test_what_is_the_same_for_all_examples_leaves_a_batch_to_be_cut() -> None:
    module = transformer("llama")
    seen, hardening = watched(module), Hardening(module, module.state_dict())
    tokens = torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(0))
    inputs = {
        "input_ids": tokens,
        "labels": tokens,
        "use_cache": False,
        "num_items_in_batch": torch.tensor(20),
    }
    hardening.backward(inputs)
    assert 2 in seen
    assert 4 not in seen
    seen.clear()
    hardening.backward({**inputs, "position_ids": torch.arange(6)[None]})  # nobody knows whose a row is
    assert set(seen) == {4}


# --- padding -------------------------------------------------------------------------------------------------


class _States:
    """A task whose hidden states are given."""

    def __init__(self, states: torch.Tensor) -> None:
        self.given = states

    def states(self, call: Any, batch: Examples) -> tuple[torch.Tensor, ...]:
        return (self.given,)


def mean(states: torch.Tensor, inputs: Mapping[str, Any], labels: Any) -> torch.Tensor:
    batch = Examples({name: torch.tensor(one) for name, one in inputs.items()}, torch.tensor(labels))
    return mean_states(replace(step()[1], task=_States(states), batch=batch), 1)[0]


NONE = IGNORED
MASK = [[1, 1, 0, 0], [1, 1, 1, 1]]
TWO = [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize(
    ("inputs", "labels", "counted"),
    [
        ({"attention_mask": MASK}, [0, 1], TWO),
        ({"attention_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}, [0, 1], [[False, False, True, True], [True] * 4]),
        # Of a language model labels are for the next token, and those of prompts are IGNORED as well.
        ({"attention_mask": MASK}, [[NONE, NONE, NONE], [NONE, 2, 3]], TWO),
        ({"input_ids": MASK}, [[1, NONE, NONE], [NONE, 2, 3]], TWO),
        # Of an encoder and a decoder the attention mask is the encoder's.
        ({"attention_mask": [[1, 1, 1, 0]] * 2, "decoder_input_ids": MASK}, [[4, 1, NONE, NONE], [5, 4, 3, 1]], TWO),
        ({"attention_mask": [[1, 1, 1, 0]] * 2, "labels": MASK}, [[4, 1, NONE, NONE], [5, 4, 3, 1]], TWO),
    ],
    ids=["right", "left", "prompts", "without a mask", "answers", "answers as inputs"],
)  # fmt: skip
def test_padding_is_left_out(inputs: Mapping[str, Any], labels: Any, counted: Any) -> None:
    torch.manual_seed(0)
    states, places = torch.randn(2, 4, 3), torch.tensor(counted)
    expected = torch.stack([row[kept].mean(0) for row, kept in zip(states, places, strict=True)])
    assert torch.allclose(mean(states, inputs, labels), expected)
    states[~places] = float("nan")  # as some models have it at padding
    assert torch.allclose(mean(states, inputs, labels), expected)


@pytest.mark.parametrize(
    ("inputs", "labels"),
    [
        ({}, [0, 1]),
        ({"attention_mask": [[1] * 4] * 2}, [0, 1]),
        ({"input_ids": MASK}, [[NONE, 5, 6], [1, 2, 3]]),  # a prompt
        ({"input_ids": MASK}, [[NONE, 5, NONE, NONE], [1, NONE, NONE, NONE]]),  # tokens that were not masked
        ({"attention_mask": [[1] * 4] * 2}, [[NONE, 5, NONE, NONE], [1, NONE, NONE, NONE]]),
        ({"attention_mask": [[1] * 9] * 2}, [0, 1]),  # of other positions, as of sound
    ],
)
def test_without_padding_it_is_the_mean_bit_for_bit(inputs: Mapping[str, Any], labels: Any) -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 4, 3)
    assert torch.equal(mean(states, inputs, labels), states.mean(1))


def test_the_same_texts_in_a_wider_batch_have_the_same_states() -> None:
    module, found = transformer("bert"), []
    tokens = torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(0))
    task = step()[1].task
    for behind in (0, 20):
        padded = torch.nn.functional.pad(tokens, (0, behind))
        inputs = {"input_ids": padded, "attention_mask": (padded != 0).long()}
        batch = Examples(inputs, torch.zeros(4, dtype=torch.long))
        found.append(mean_states(replace(step()[1], task=task, call=module, batch=batch), 2))
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, atol=1e-5)
