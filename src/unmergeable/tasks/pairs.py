"""Sequence to sequence: texts with the texts that a model of encoder and decoder is to answer with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .fields import Pairs, SequenceToSequence, parse_fields
from .pretrained import read_config, without_cache
from .records import records_of, table, texts
from .sequences import Encoder
from .sources import locate, training_source
from .task import IGNORED, Examples, TensorTask

_USUAL = {"text": ("text", "source", "input", "document"), "target": ("target", "label", "output", "summary")}


def read(name: str, fields: Mapping[str, Any], *, folder: Path, model: Path) -> TensorTask:
    """Open a task of answering texts with texts; see `tasks.open_task`.

    Scores are of the target's tokens, each after the right ones before it. Texts are padded to the longest of them,
    tokens beyond `length` and `target_length`, or beyond what the model takes, are cut off.

    Raises:
        InputError: a model without a decoder beside its encoder, or without a token to begin answers with.
    """
    where = f"task {name}"
    given = parse_fields(SequenceToSequence, fields, where)
    config = read_config(model)
    if not getattr(config, "is_encoder_decoder", False):
        expected = "a model with an encoder and a decoder"
        raise InputError(
            "a model that answers no text with a text", where=model, expected=expected, got=config.model_type
        )
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(config.get_text_config(), "bos_token_id", None)
    if start is None:
        what = "the model has no token to begin answers with"
        raise InputError(what, where=model, expected="decoder_start_token_id in config.json")
    encode = (
        Encoder(config, model, given.length),
        Encoder(config, model, given.target_length, answers=True),
    )
    training = training_source(given, given.train, ("text", "target"), folder, where)
    return TensorTask(
        name=name,
        kind=given.kind,
        metric=given.metric,
        evaluation=_examples(given, encode, int(start), folder, where),
        training=None
        if training is None
        else _examples(training, encode, int(start), folder, f"{where}: train"),
        batch=given.batch,
        constants=without_cache(config),
    )


def _examples(
    source: Pairs, encode: tuple[Encoder, Encoder], start: int, folder: Path, where: str
) -> Examples:
    path = locate(folder, source.data, where)
    records, _ = records_of(source, path, where, "pairs of texts")
    columns, places = table(
        records, {"text": source.text, "target": source.target}, _USUAL, source.limit, path
    )
    inputs = encode[0](texts(columns["text"], places, path, "text"), None, path)
    found = encode[1](texts(columns["target"], places, path, "target"), None, path)
    tokens, mask = found["input_ids"], found["attention_mask"].bool()
    labels = torch.where(mask, tokens, IGNORED)
    # What the decoder has read at a position is everything before it; behind the end of an answer nothing counts.
    before = torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], 1)
    return Examples({**inputs, "decoder_input_ids": before}, labels)
