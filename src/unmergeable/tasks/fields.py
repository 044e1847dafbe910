"""The fields of every kind of task, as a configuration has them. Unknown fields are errors.

Paths are relative to the folder that the configuration lies in. `train:` names examples that a thief with data
may use (and an owner who hardens): other ones than those that models are scored on, in the same form; names of
arrays, fields and columns that it leaves out are the task's own. `parse_fields` reads them and tells all errors.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt

from .parsing import parse_fields

__all__ = [
    "Fields",
    "Function",
    "Harness",
    "ImageClassification",
    "Images",
    "LanguageModelling",
    "Pairs",
    "SequenceToSequence",
    "Sequences",
    "Source",
    "TaskFields",
    "TextClassification",
    "Texts",
    "parse_fields",
]

_FUNCTION = r"^[^:]+:[A-Za-z_]\w*$"
Numbers = FiniteFloat | list[FiniteFloat]


class Fields(BaseModel):
    """Frozen, and a misspelt field is an error, not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Exact(Fields):
    """Values are what they are: neither "8" nor true is a number."""

    model_config = ConfigDict(strict=True)


class Source(Exact):
    """Where examples come from.

    data: a file or folder. split: of a `datasets` dictionary. limit: only the first so many examples.
    """

    data: str
    split: str | None = None
    limit: PositiveInt | None = None


class Images(Source):
    """images, labels: names of an npz's arrays, or of a data set's columns."""

    images: str | None = None
    labels: str | None = None


class ImageClassification(Images):
    """Images with a class each: a folder with a folder a class, an .npz, or a data set saved by `datasets`.

    mean, std, size: how pixels in 0 … 1 become inputs, where the model has no preprocessor_config.json: scaled to
    size × size, less the mean, over the standard deviation, one number or one a channel.
    classes: names of the folders or of a data set's classes in the order of the model's outputs, where they
    are not the model's own label2id.
    """

    kind: Literal["image-classification"]
    mean: Numbers | None = None
    std: Numbers | None = None
    size: PositiveInt | None = None
    classes: list[str] | None = None
    batch: PositiveInt = 50
    train: Images | None = None


class Texts(Source):
    """field: the name of an npz's array of token ids, of a field of jsonl, or of a data set's column."""

    field: str | None = None


class LanguageModelling(Texts):
    """Text in windows of `length` tokens: a .txt, a .jsonl, an .npz of ids, or a data set saved by `datasets`.

    metric: cross-entropy (minus nats a token; perplexity is its exponential) or accuracy (next token).
    """

    kind: Literal["language-modelling"]
    metric: Literal["cross-entropy", "accuracy"] = "cross-entropy"
    length: Annotated[int, Field(ge=2)] = 256
    batch: PositiveInt = 8
    train: Texts | None = None


class Sequences(Source):
    """text, label: columns of a csv, fields of jsonl, or columns of a data set; pair: a second text."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


class TextClassification(Sequences):
    """Texts with a class each: a .csv with a header, a .jsonl, or a data set saved by `datasets`.

    classes: as for images. length: tokens at most.
    """

    kind: Literal["text-classification"]
    classes: list[str] | None = None
    length: Annotated[int, Field(ge=2)] = 128
    batch: PositiveInt = 32
    train: Sequences | None = None


class Pairs(Source):
    """text, target: columns of a csv, fields of jsonl, or columns of a data set."""

    text: str | None = None
    target: str | None = None


class SequenceToSequence(Pairs):
    """Texts with the texts to answer them with: a .csv with a header, a .jsonl, or a data set saved by `datasets`.

    metric: of the target's tokens, cross-entropy (minus nats a token) or accuracy, each after the right ones before
    it. length, target_length: tokens at most.
    """

    kind: Literal["sequence-to-sequence"]
    metric: Literal["cross-entropy", "accuracy"] = "cross-entropy"
    length: Annotated[int, Field(ge=2)] = 256
    target_length: Annotated[int, Field(ge=2)] = 64
    batch: PositiveInt = 16
    train: Pairs | None = None


class Harness(Exact):
    """A task of lm-evaluation-harness: `task` as it names it, `metric` one of its per-example metrics.

    metric: "name", or "name,filter" where the task filters answers in several ways.
    include: a folder of further task definitions; functions that they name are run. fewshot: as its num_fewshot,
    the task's own if not given. limit: examples at most.
    """

    kind: Literal["lm-eval"]
    task: str
    metric: str = "acc"
    include: str | None = None
    fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: PositiveInt | None = None
    batch: PositiveInt = 8


class Function(Exact):
    """`function`: "module:name" or "file.py:name", called as name(model, indices, **options): a score for each
    index, higher is better; the file is run. examples: how many there are. metric: what its scores are called.
    """

    kind: Literal["python"]
    function: Annotated[str, Field(pattern=_FUNCTION, examples=["module:name", "file.py:name"])]
    examples: Annotated[int, Field(ge=2)]
    metric: str = "score"
    options: dict[str, str | int | FiniteFloat | bool] = {}


TaskFields = Annotated[
    ImageClassification | LanguageModelling | TextClassification | SequenceToSequence | Harness | Function,
    Field(discriminator="kind"),
]
