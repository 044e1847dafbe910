"""Language modelling: text, or token ids, as one stream that is cut into windows of equal length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoint.files import require_regular
from ..errors import InputError
from ..stock import quiet
from .arrays import Arrays
from .fields import LanguageModelling, Texts, parse_fields
from .pretrained import positions, read_config, read_tokenizer, vocabulary, without_cache
from .records import Record, json_lines, saved_rows
from .sources import column, is_saved, load_saved, locate, training_source
from .task import Examples, TensorTask

SCREEN = 8
TOGETHER = 64  # documents that are tokenised at a time
CHARACTERS = 8  # that are read for a token that is needed, to begin with
SPARE = 64  # tokens at the end of a part of a text that the rest of it might have changed

Ids = NDArray[np.int64]


def read(name: str, fields: Mapping[str, Any], *, folder: Path, model: Path) -> TensorTask:
    """Open a task of language modelling; see `tasks.open_task`.

    Special tokens are not added, but for the end of text between documents of a .jsonl or of a data set's texts.
    Rows of token ids follow one another as they are.
    """
    where = f"task {name}"
    given = parse_fields(LanguageModelling, fields, where)
    config = read_config(model)
    most = positions(config)
    if most is not None and given.length > most:
        what = "windows are longer than what the model takes"
        raise InputError(what, where=f"{where}: length", expected=f"at most {most}", got=given.length)
    size = vocabulary(config, model)
    training = training_source(given, given.train, ("field",), folder, where)
    evaluation, *others = (
        _windows(_Stream(source, folder, model, place), given.length, source.limit, size)
        for source, place in ((given, where), (training, f"{where}: train"))
        if source is not None
    )
    return TensorTask(
        name=name,
        kind=given.kind,
        metric=given.metric,
        evaluation=evaluation,
        training=others[0] if others else None,
        next_token=True,
        batch=given.batch,
        screen=SCREEN,
        constants=without_cache(config),
    )


def _windows(stream: _Stream, length: int, limit: int | None, size: int) -> Examples:
    """Windows of `length` tokens, the remainder dropped; `size` is that of the vocabulary."""
    ids = stream.ids(None if limit is None else limit * length)
    count = len(ids) // length
    if not count:
        raise InputError(
            "not one window of text", where=stream.path, expected=f"{length} tokens", got=len(ids)
        )
    ids = ids[: count * length]
    outside = np.flatnonzero((ids < 0) | (ids >= size))
    if len(outside):
        place = f"{stream.path}: token {outside[0]}"
        what = "a token that the model does not know"
        raise InputError(what, where=place, expected=f"0 to {size - 1}", got=int(ids[outside[0]]))
    windows = torch.from_numpy(ids.reshape(count, length))
    return Examples({"input_ids": windows}, windows[:, 1:].clone())


class _Stream:
    """Where tokens come from, in the order that they are read in."""

    def __init__(self, source: Texts, folder: Path, model: Path, where: str) -> None:
        self.path = locate(folder, source.data, where)
        self._source, self._model, self._where = source, model, where

    def ids(self, need: int | None) -> Ids:
        """So many of the first tokens, or all of them.

        Raises:
            InputError: a form that is not known, or data that cannot be read.
        """
        path, source = self.path, self._source
        if path.is_dir() and is_saved(path):
            return self._saved(need)
        if source.split is not None:
            raise InputError(
                "only saved data sets have splits", where=f"{self._where}: split", got=source.split
            )
        if path.suffix == ".npz":
            with Arrays(path) as file:
                name, found = file.choose(
                    source.field,
                    "input_ids",
                    lambda array: array.ndim in (1, 2) and array.dtype.kind in "iu",
                    "field",
                )
            return _whole(found, f"{path}: {name}")[:need]
        if path.suffix == ".txt":
            return self._text(need)
        if path.suffix == ".jsonl":
            return self._documents(json_lines(path), source.field or "text", need)
        expected = "a .txt, a .jsonl, an .npz of token ids, or a folder saved by datasets"
        raise InputError("no form of text that is known", where=path, expected=expected)

    def _text(self, need: int | None) -> Ids:
        """One text, tokenised as a whole, or as much of it as is enough."""
        require_regular(self.path)
        tokenizer = read_tokenizer(self._model)
        much = None if need is None else CHARACTERS * (need + SPARE)
        while True:
            try:
                with self.path.open(encoding="utf-8-sig", newline="") as file:
                    text = file.read(much)
            except UnicodeDecodeError as error:
                raise InputError("not UTF-8", where=self.path, got=str(error)[:200]) from error
            (ids,) = _encode(tokenizer, [text], self.path)
            if need is None or much is None or len(text) < much or len(ids) >= need + SPARE:
                return np.array(ids[:need], np.int64)
            much *= 2

    def _documents(self, records: Iterator[Record], field: str, need: int | None) -> Ids:
        """Texts, with the tokenizer's end of text between them."""
        tokenizer = read_tokenizer(self._model)
        end = tokenizer.eos_token_id
        found: list[int] = []
        count = 0
        while (need is None or len(found) < need) and (portion := list(islice(records, TOGETHER))):
            for ids in _encode(tokenizer, [_text(place, one, field) for place, one in portion], self.path):
                if count and end is None:
                    hint = "give one text as a .txt, or token ids"
                    what = "the tokenizer has no end of text to put between documents"
                    raise InputError(what, where=self._model, hint=hint)
                found += ([end] if count else []) + ids
                count += 1
        return np.array(found[:need], np.int64)

    def _saved(self, need: int | None) -> Ids:
        found = load_saved(self.path, self._source.split)
        name = column(found, self._source.field, ("text", "input_ids"), self.path, "field")
        rows = found.select_columns([name])
        if isinstance(rows[0][name], str):
            return self._documents(saved_rows(rows, self.path), name, need)
        parts: list[Ids] = []
        total = 0
        for place, row in saved_rows(rows, self.path):
            if need is not None and total >= need:
                break
            try:
                parts.append(_whole(np.asarray(row[name]), place))
            except ValueError as error:  # lists of different lengths in one another
                raise InputError("not token ids", where=place, got=str(error)[:200]) from error
            total += len(parts[-1])
        return np.concatenate(parts)[:need]


def _text(place: str, record: Mapping[str, Any], field: str) -> str:
    if field not in record:
        expected, got = field, " | ".join(map(str, record)) or "no fields"
        raise InputError(
            "a record without the field", where=place, expected=expected, got=got, hint="name it by field:"
        )
    value = record[field]
    if not isinstance(value, str):
        raise InputError("not text", where=f"{place}: {field}", expected="text", got=type(value).__name__)
    return value


def _encode(tokenizer: Any, some: list[str], path: Path) -> list[list[int]]:
    with quiet():  # that a text is longer than the model takes at once is what windows are for
        try:
            ids: list[list[int]] = tokenizer(some, add_special_tokens=False)["input_ids"]
        except Exception as error:  # tokenizers raise plain exceptions
            got = str(error)[:200]
            raise InputError("text that the tokenizer fails on", where=path, got=got) from error
    return ids


def _whole(ids: NDArray[Any], place: str) -> Ids:
    """An array of token ids as one stream, row after row."""
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        got = f"{ids.dtype} of shape {ids.shape}"
        raise InputError("not token ids", where=place, expected="whole numbers, (n,) or (n, length)", got=got)
    return ids.reshape(-1).astype(np.int64)
