"""Tiny models with tokenizers, and data on disk for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merging_models import transformer

WORDS = [f"w{number}" for number in range(30)]
SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]


def tokenizer(*, pad: bool = True, end: bool = True, types: bool = False) -> Any:
    """Words that are separated by blanks, one token each; ids 0 to 3 are special."""
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    model = tk.Tokenizer(tk.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "[UNK]", "bos_token": "[BOS]"}
    names |= {"pad_token": "[PAD]"} if pad else {}
    names |= {"eos_token": "[EOS]"} if end else {}
    made = ["input_ids", "attention_mask"] + (["token_type_ids"] if types else [])
    return PreTrainedTokenizerFast(tokenizer_object=model, model_input_names=made, **names)


def ids(text: str) -> list[int]:
    """The tokens of a text, worked out here."""
    return [(SPECIAL + WORDS).index(word) for word in text.split()]


def saved(
    folder: Path, kind: str, words: dict[str, bool] | None = None, seed: int = 0, **changes: Any
) -> tuple[Path, torch.nn.Module]:
    """A tiny transformer in a folder, with a tokenizer if its options are given."""
    module: Any = transformer(kind, seed, **changes)
    module.save_pretrained(folder)
    if words is not None:
        tokenizer(**words).save_pretrained(folder)
    return folder, module


def some_text(count: int, seed: int = 0) -> str:
    """So many words, ten in a line."""
    random = np.random.default_rng(seed)
    words = [WORDS[number] for number in random.integers(0, len(WORDS), count)]
    return "\n".join(" ".join(words[start : start + 10]) for start in range(0, count, 10)) + "\n"


def write_lines(path: Path, records: list[Any]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def set_config(model: Path, **changes: Any) -> None:
    """Changes config.json; None takes a field out."""
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
