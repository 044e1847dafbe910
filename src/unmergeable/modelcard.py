"""A section for the model card of a locked model: what was done, what it stops, how to check it."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import InputError
from .manifest import Manifest, manifest_path

_DONE = {
    "exact": "Rows and columns of its weight matrices were rearranged and some signs flipped. Nothing was "
    "rounded: the weights hold the same numbers in other places, and the key restores every bit.",
    "gauge": "Its weight matrices were multiplied by secret matrices that cancel each other inside the "
    "model. Outputs differ by the rounding of the stored dtype, no more.",
    "mergelock": "Its attention weights were multiplied by secret invertible matrices that cancel each "
    "other (MergeLock, arXiv 2509.01548). Outputs differ by the rounding of the stored dtype, no more.",
    "params": "Its MLP rows were rearranged and its attention heads scaled by secret factors that cancel "
    "each other (arXiv 2503.07661).",
}
_QUANTISED = {
    True: "Quantised, it loses about what the original would.",
    False: "Quantised below eight bits it may lose more than the original would: measure it.",
}
_SCALED = (
    "Rows and columns of its weight matrices were rearranged, some signs flipped, and some multiplied by powers of two "
    "that cancel each other. Nothing was rounded, and the key restores every bit."
)
_PRUNED = "Part of its MLP weights was also dropped, which changes the outputs a little."


def model_card(model: str | os.PathLike[str]) -> str:
    """A Markdown section about a locked model, from its manifest alone: no secret and no key is needed.

    Args:
        model: the locked folder or .safetensors file.

    Raises:
        InputError: the model is not locked, or its manifest is damaged.
    """
    path = Path(model)
    where = manifest_path(path, single_file=path.is_file())
    if not path.exists() or not where.exists():
        raise InputError(
            "there is no locked model here",
            where=path,
            expected=f"{where.name} beside the weights",
            hint="lock the model first",
        )
    manifest = Manifest.read(where)
    done = _DONE.get(manifest.method, f"It was locked by the method {manifest.method}.")
    scales, pruned = (bool(manifest.options.get(name)) for name in ("scales", "prune_rate"))
    if scales:
        done = _SCALED
    if pruned:
        done += f" {_PRUNED}"
    passed = sorted(name for name, part in manifest.components.items() if part.spec is None)
    if passed:
        done += f" These components were not locked: {', '.join(passed)}."
    same = "computes nearly what it computed before" if pruned else "computes what it computed before"
    others = "" if path.is_file() else " and of every other file"
    tensors = sum(len(part.tensors) for part in manifest.components.values())
    return f"""\
## This model is locked against merging

It was published with `unmergeable` {manifest.tool}, method `{manifest.method}`, under the key \
`{manifest.key}`. {done}

**Use it as any other model.** It loads with the stock library, {same}, can be \
fine-tuned, and needs no key. {_QUANTISED[manifest.method == "exact" and not scales]} What does not fit it \
any more, or in part only: adapters (LoRA) that were trained on its base, and anything else that reads its \
weights by position.

**What this stops:** merging it off the shelf. Averaging, task arithmetic, TIES and their kin combine \
weights by position, and its positions are its own.

**What this does not stop:** somebody who aligns it to its base model or to another fine-tune of that \
base, who puts both models side by side in a wider one, or who trains on its outputs or on labelled data. \
It is a statement of the owner's will and a price, not a wall.

**What can be checked:** `{where.name}` beside the weights holds the SHA-256 of {tensors:,} tensors\
{others}, signed with the owner's key. `unmergeable inspect MODEL` shows its facts; who has the \
original and the key can run `unmergeable verify ORIGINAL MODEL -k KEY`.
"""
