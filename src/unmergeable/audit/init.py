"""`audit --init`: a commented configuration for a base and its fine-tunes, with what can be read off the models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..checkpoint import MANIFEST
from ..checkpoint.files import load_json
from ..errors import InputError, UsageError
from ..merging.vectors import CONFIG as ADAPTER
from .config import RELEASE, RESERVED
from .rows import LEVELS

_KINDS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "language-modelling",
    "LMHeadModel": "language-modelling",
}
_ANSWERS = ("ForConditionalGeneration", "MarianMTModel")
_DATA = {
    "image-classification": """\
    data: DATA                # a folder with a folder a class, an .npz (images, labels), or a saved data set
    # mean: 0.5               # how pixels in 0 … 1 become inputs, if the model has no preprocessor_config.json
    # std: 0.5
    # limit: 1000             # only so many examples; about 200 a task are the least that says something
    # train:                  # examples that a thief with data may use (levels 2 and 3); none that are scored
    #   data: DATA
""",
    "text-classification": """\
    data: DATA                # a .csv with a header, a .jsonl, or a saved data set
    # text: text              # columns or fields
    # label: label
    # train:                  # examples that a thief with data may use (levels 2 and 3); none that are scored
    #   data: DATA
""",
    "sequence-to-sequence": """\
    data: DATA                # a .csv with a header, a .jsonl, or a saved data set
    # text: text              # columns or fields
    # target: target
    # train:                  # examples that a thief with data may use (levels 2 and 3); none that are scored
    #   data: DATA
""",
    "language-modelling": """\
    data: DATA                # a .txt, a .jsonl (text), an .npz of token ids, or a saved data set
    # field: text             # field of a .jsonl, array of an .npz, column of a data set
    # length: 256             # tokens a window; a window is an example
    # limit: 64               # only so many windows
    # train:                  # texts that a thief with data may use (levels 2 and 3); none that are scored
    #   data: DATA
""",
}
_OTHERWISE = """\
    # One of: image-classification, text-classification, language-modelling, sequence-to-sequence, lm-eval, python.
    function: FILE.py:score   # score(model, indices) -> one number for each, higher is better
    examples: 500
"""


def init(
    base: str | os.PathLike[str],
    models: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    plain: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a commented configuration; data are left to fill in.

    Args:
        base: the model that all were fine-tuned from.
        models: the protected model, then one or more fine-tunes of thieves. Tasks get the names of folders, the
            protected one that of `plain`.
        output: the new YAML file; paths in it are relative to its folder.
        plain: the protected model before it was locked or hardened; the first fine-tune itself if not given,
            which audits what merging gives without any protection.

    Returns: the file.

    Raises:
        UsageError: fewer than two fine-tunes, or one of them twice. InputError: no such model, or the file exists.
    """
    if len(models) < 2:
        raise UsageError(
            "an audit needs the protected model and a fine-tune of a thief's", hint="name two models or more"
        )
    target = Path(output)
    if target.exists():
        raise InputError("the file exists", where=target, hint="give another name by -o")
    protected, *others = [Path(model) for model in models]
    unlocked = Path(plain) if plain is not None else protected
    if len({unlocked, *others}) <= len(others) or protected in others:
        raise UsageError("a model is named twice", got=", ".join(map(str, [unlocked, *others])))
    configs = {path: _config(path) for path in (Path(base), protected, unlocked, *others)}
    text = _text(Path(base), protected, unlocked, others, configs, target.parent)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError("the file cannot be written", where=target, got=error.strerror) from None
    return target


def _config(path: Path) -> dict[str, Any]:
    if (path / ADAPTER).is_file():
        return {}
    if not (path / "config.json").is_file():
        raise InputError("no model is there", where=path, expected="a folder with a config.json")
    return load_json(path / "config.json")


def _text(
    base: Path,
    protected: Path,
    plain: Path,
    others: Sequence[Path],
    configs: Mapping[Path, Mapping[str, Any]],
    folder: Path,
) -> str:
    def relative(path: Path) -> str:
        # The folder may be a link: its own parent is not what `..` leads to.
        return _scalar(os.path.relpath(os.path.realpath(path), os.path.realpath(folder or ".")))

    tasks = {path: _scalar(name) for path, name in _names([plain, *others]).items()}
    tasks[protected] = tasks[plain]
    note = ""
    if (protected / MANIFEST).is_file() and plain == protected:
        note = "    # It is locked: put the model from before the lock here.\n"
    lines = [
        f"# An audit by unmergeable {__version__}: what thieves get from a protected model, and at what cost.",
        "# Run it with: unmergeable audit FILE -o DIR",
        "version: 1",
        "",
        "# What all models were fine-tuned from.",
        f"base: {relative(base)}",
        "",
        "protected:",
        f"  model: {relative(protected)}    # as it is released",
        f"{note}  plain: {relative(plain)}    # the same fine-tune without protection: what values are relative to",
        f"  task: {tasks[protected]}",
        "  # releases: []             # further releases of it that thieves could bring together",
        "",
        "# The thief's own fine-tunes, by task.",
        "others:",
        *(f"  {tasks[path]}: {relative(path)}" for path in others),
        "",
        "# Tensors that belong to a task alone and are never merged, by the beginning of their names; auto: heads",
        "# of classifiers, and whatever the base lacks or has in another shape.",
        "private: auto",
        "",
        "# Levels of access: " + "; ".join(f"{number} {text}" for number, text in LEVELS.items()) + ".",
        "# 2 and 3 need `train:` in every task.",
        "levels: [0, 1]",
        "",
        "# attacks: [task_arithmetic, full_dose]    # only these of the suite",
        "seed: 0",
        "device: auto",
        "",
        "# What models are scored on, half to choose merges and half to report them. Paths are relative to this file.",
        "tasks:",
    ]
    text = "\n".join(lines) + "\n"
    for path in (protected, *others):
        kind = kind_of(configs[path] or configs[base])
        text += f"  {tasks[path]}:\n    kind: {kind or 'python'}\n" + (_DATA[kind] if kind else _OTHERWISE)
    return text


def kind_of(config: Mapping[str, Any]) -> str | None:
    """The kind of task that a model's class is for; None if that cannot be said."""
    for name in config.get("architectures") or ():
        for ending, kind in _KINDS.items():
            if str(name).endswith(ending):
                return kind
        # Models of speech and of pictures with text end so as well.
        texts = config.get("is_encoder_decoder") and not {"vision_config", "num_mel_bins"} & config.keys()
        if str(name).endswith(_ANSWERS) and texts:
            return "sequence-to-sequence"
    return None


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Names of tasks: of the folders; a second one of a name gets its number."""
    found: dict[Path, str] = {}
    for path in paths:
        stem = Path(os.path.abspath(path)).name
        if stem in RESERVED or stem.startswith(RELEASE):
            stem = f"task-{stem}"
        name, number = stem, 2
        while name in found.values():
            name, number = f"{stem}-{number}", number + 1
        found[path] = name
    return found


def _scalar(text: str) -> str:
    """A string as YAML writes it on one line, in quotes where it needs them."""
    plain = text.isprintable()
    style = None if plain else '"'
    dumped = yaml.safe_dump(text, width=10**6, allow_unicode=plain, default_style=style)
    return dumped.removesuffix("...\n").strip()
