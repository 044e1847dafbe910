"""Text classification: rows of a .csv, lines of .jsonl, or a saved data set, as tokens of the model's tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import load_json
from ..errors import InputError
from ..stock import model_class, quiet
from .classes import Classes, read_classes
from .fields import Sequences, TextClassification, parse_fields
from .pretrained import positions, read_config, read_tokenizer, vocabulary
from .records import records_of, table, texts
from .sources import first_line, locate, training_source
from .task import Examples, TensorTask

_USUAL = {"text": ("text", "sentence"), "label": ("label",)}


def read(name: str, fields: Mapping[str, Any], *, folder: Path, model: Path) -> TensorTask:
    """Open a task of text classification; see `tasks.open_task`.

    All texts are padded to the longest of them; tokens beyond `length`, or beyond what the model takes, are cut off.
    """
    where = f"task {name}"
    given = parse_fields(TextClassification, fields, where)
    config = read_config(model)
    classes = read_classes(config, given.classes, model, where)
    encode = Encoder(config, model, given.length)
    training = training_source(given, given.train, ("text", "pair", "label"), folder, where)
    return TensorTask(
        name=name,
        kind=given.kind,
        metric="accuracy",
        evaluation=_examples(given, classes, encode, folder, where),
        training=None
        if training is None
        else _examples(training, classes, encode, folder, f"{where}: train"),
        batch=given.batch,
        classes=classes.count,
    )


def _examples(source: Sequences, classes: Classes, encode: Encoder, folder: Path, where: str) -> Examples:
    path = locate(folder, source.data, where)
    records, features = records_of(source, path, where, "labelled texts")
    label_feature = features.get(source.label or "label")
    given = {want: getattr(source, want) for want in ("text", "pair", "label")}
    columns, places = table(records, given, _USUAL, source.limit, path)
    labels = classes.named(columns["label"], label_feature, path)
    numbers = classes.read(labels, path, lambda row: places[row].removeprefix(f"{path}: "))
    first = texts(columns["text"], places, path, "text")
    second = texts(columns["pair"], places, path, "pair") if "pair" in columns else None
    return Examples(encode(first, second, path), torch.tensor(numbers, dtype=torch.long))


class Encoder:
    """A model's tokenizer, with padding and a greatest length.

    answers: texts are what the model is to answer, which some tokenizers write otherwise.

    Raises:
        InputError: the model has no tokenizer, or no token to pad with.
    """

    def __init__(self, config: Any, model: Path, length: int, *, answers: bool = False) -> None:
        self._answers = answers
        self._tokenizer = read_tokenizer(model)
        self._size = vocabulary(config, model)
        limits = (length, positions(config), self._tokenizer.model_max_length)
        self._length = min(limit for limit in limits if limit is not None)
        if self._tokenizer.pad_token_id is None:
            # A decoder is often padded with another of its tokens, which its configuration tells.
            pad = getattr(config.get_text_config(), "pad_token_id", None)
            token = None if pad is None else self._tokenizer.convert_ids_to_tokens(pad)
            if token is None:
                hint = "set pad_token_id in config.json to the token that the model was trained to be padded with"
                raise InputError("the model has no token to pad texts with", where=model, hint=hint)
            self._tokenizer.pad_token = token
        # A tokenizer may make more than the model's class takes: token types, for one.
        stock = model_class(load_json(model / "config.json"))
        self._taken = None if stock is None else set(inspect.signature(stock.forward).parameters)

    def __call__(self, first: list[str], second: list[str] | None, path: Path) -> dict[str, torch.Tensor]:
        """The model's inputs, (n, tokens of the longest)."""
        with quiet():
            try:
                given = {"text_target": first} if self._answers else {"text": first, "text_pair": second}
                found = self._tokenizer(
                    **given, padding="longest", truncation=True, max_length=self._length,
                    return_attention_mask=True, return_tensors="pt",
                )  # fmt: skip
            except Exception as error:  # tokenizers raise plain exceptions
                raise InputError(
                    "texts that the tokenizer fails on", where=path, got=first_line(error)
                ) from error
        inputs = {
            name: values for name, values in found.items() if self._taken is None or name in self._taken
        }
        ids, mask = found["input_ids"], found["attention_mask"]
        if not bool(mask.any(-1).all()):
            row = int((~mask.any(-1)).nonzero()[0])
            raise InputError("a text without tokens", where=f"{path}: example {row}")
        if int(ids.max()) >= self._size:
            got = f"token {int(ids.max())}"
            what = "the tokenizer knows tokens that the model does not"
            raise InputError(what, where=path, expected=f"below {self._size}", got=got)
        return inputs
