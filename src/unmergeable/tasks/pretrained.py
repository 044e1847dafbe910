"""What is read of a model's folder beside its weights: configuration and tokenizer. Its code is never run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..checkpoint.files import load_json
from ..errors import InputError
from ..stock import quiet
from .sources import first_line

_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def read_config(model: Path) -> Any:
    """The configuration of a model, as transformers reads it.

    Raises:
        InputError: there is none, or its type is unknown.
    """
    from transformers import AutoConfig

    load_json(model / "config.json")
    with quiet():
        try:
            return AutoConfig.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                "transformers cannot read the configuration", where=model, got=first_line(error)
            ) from error


def read_tokenizer(model: Path) -> Any:
    """The tokenizer of a model.

    Raises:
        InputError: there is none in the folder, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    hint = "save it beside the model, or give token ids in an .npz file"
    with quiet():
        try:
            found = AutoTokenizer.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # readers of vocabularies raise whatever they trip over
            raise InputError(
                "the model's tokenizer cannot be loaded", where=model, got=first_line(error), hint=hint
            ) from error
    # Some classes make an empty tokenizer where there are no files. Those of bytes need none.
    names = {name for name in getattr(found, "vocab_files_names", {}).values() if isinstance(name, str)}
    patterns = (*names, *_VOCABULARIES)
    if names and not any(True for pattern in patterns for _ in model.glob(pattern)):
        expected = " | ".join(sorted({"tokenizer.json", *names}))
        raise InputError("the model has no tokenizer", where=model, expected=expected, hint=hint)
    return found


def tokenizer_digest(model: Path) -> str:
    """SHA-256 of the files that a tokenizer is read from."""
    digest = hashlib.sha256()
    patterns = (*_TOKENIZER_FILES, *_VOCABULARIES)
    for path in sorted({path for pattern in patterns for path in model.glob(pattern) if path.is_file()}):
        content = path.read_bytes()
        digest.update(f"{path.name}|{len(content)}|".encode())
        digest.update(content)
    return digest.hexdigest()


def positions(config: Any) -> int | None:
    """How many tokens a model takes at most, as its configuration says; None if it does not."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def without_cache(config: Any) -> dict[str, bool]:
    """Arguments of a call that keeps no keys and values of former positions; not every model knows the word."""
    return {"use_cache": False} if hasattr(config, "use_cache") else {}


def vocabulary(config: Any, model: Path) -> int:
    """How many tokens a model knows.

    Raises:
        InputError: its configuration does not say.
    """
    found = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(found, int):
        raise InputError("the model takes no tokens", where=model, expected="vocab_size in config.json")
    return found
