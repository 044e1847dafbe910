"""What `test_families` runs in the prover's child, where torch computes in fp64: lock, reload, compare, unlock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lock_and_compare(config: dict[str, Any], layout: str, folder: str) -> dict[str, Any]:
    """Errors of a locked tiny model against its source, through stock `from_pretrained`.

    Returns: {method: {"eager" | "sdpa" | "cached": relative error}}, what each site did, and the shard files.
    """
    import filecmp

    from unmergeable.derive import Key
    from unmergeable.lock import lock
    from unmergeable.prove import shrink
    from unmergeable.prove.miniature import build_miniature
    from unmergeable.unlock import unlock

    key = Key(bytes(range(32)))
    # Bounds of activations as the real model has them: the shipped spec is of those.
    shrink._CLAMPED = float("inf")
    small = build_miniature(config, shape=0)
    source = Path(folder) / "source"
    small.model.save_pretrained(source, max_shard_size="40KB", save_original_format=layout != "memory")
    if layout == "bare":
        _strip(source, f"{small.model.base_model_prefix}.")
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    out: dict[str, Any] = {
        "files": sorted(path.name for path in source.iterdir()),
        "methods": {},
        "sites": {},
    }
    for method in ("exact", "gauge"):
        target, back = Path(folder) / method, Path(folder) / f"{method}-back"
        report = lock(source, target, key=key, method=method)
        out["sites"][method] = [(site.kind, site.group, site.acted, site.moved) for site in report.sites]
        out["refused"] = [reason for _, _, reason in report.refused]
        errors = {mode: _error(small, source, target, mode) for mode in ("eager", "sdpa")}
        errors["cached"] = _cached(small, source, target)
        out["methods"][method] = errors
        unlock(target, back, key=key)
        if method == "exact":
            compared = filecmp.cmpfiles(source, back, out["files"], shallow=False)
            out["undone"] = (sorted(compared[0]), sorted(path.name for path in back.iterdir()))
        else:
            out["gauge_undone"] = _error(small, source, back, "eager")
    return out


def _strip(folder: Path, prefix: str) -> None:
    """Rename tensors as old checkpoints of the base model alone have them: without its name in front."""
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file(
            {name.removeprefix(prefix): t for name, t in tensors.items()}, path, metadata={"format": "pt"}
        )
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = {name.removeprefix(prefix): file for name, file in data["weight_map"].items()}
    index.write_text(json.dumps(data))


def _load(small: Any, folder: Path, attention: str) -> Any:
    return small.load(folder=folder, attention=attention)


def _error(small: Any, source: Path, target: Path, attention: str) -> float | None:
    from unmergeable.prove.inputs import flatten_outputs

    try:
        first = _load(small, source, attention)
    except (ValueError, ImportError):
        return None  # the class has no such attention
    second = _load(small, target, attention)
    worst = 0.0
    for entry in small.inputs:
        old = flatten_outputs(first(**entry.arguments), entry.masks)
        new = flatten_outputs(second(**entry.arguments), entry.masks)
        worst = max([worst, *(float((a - b).norm() / b.norm()) for a, b in zip(new, old, strict=True))])
    return worst


def _cached(small: Any, source: Path, target: Path) -> float | None:
    """Greedy tokens and logits of a few steps with a cache; None where the class does not generate."""
    entry = small.inputs[0].arguments
    if not small.model.can_generate() or "input_ids" not in entry:
        return None
    outputs = []
    for folder in (source, target):
        model = _load(small, folder, "eager")
        outputs.append(
            model.generate(
                entry["input_ids"], max_new_tokens=4, do_sample=False, use_cache=True, num_beams=1,
                decoder_start_token_id=0, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
            )
        )  # fmt: skip
    if not outputs[0].sequences.equal(outputs[1].sequences):
        return float("inf")
    pairs = zip(outputs[1].logits, outputs[0].logits, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
