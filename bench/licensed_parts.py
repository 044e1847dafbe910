"""The measurements of `licensed.py`, one function a part; each takes a bench and a subject and returns JSON values."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from licensed_models import Subject, make_key, make_salt, train
from unmergeable.lock import lock
from unmergeable.merging import merge_method
from unmergeable.unlock import unlock

MANIFEST = "unmergeable.json"
Options = dict[str, Any]

#: The ways to lock that are measured; "none" is the original.
VARIANTS: dict[str, Options] = {
    "exact": {"method": "exact"},
    "exact --scales": {"method": "exact", "scales": True},
    "gauge": {"method": "gauge"},
    "mergelock": {"method": "mergelock"},
    "params, diagonal": {"method": "params", "options": {"form": "diagonal"}},
    "params, symmetric": {"method": "params", "options": {"form": "symmetric"}},
    "params, nonsymmetric": {"method": "params", "options": {"form": "nonsymmetric"}},
    "params, diagonal, --prune-rate 0.1": {"method": "params", "prune_rate": 0.1},
}
MERGED = ("exact", "exact --scales", "gauge", "mergelock", "params, diagonal")


@dataclass
class Bench:
    """Where a run works, and its locked models.

    Attributes:
        locks: how many locks, of different salts, a quantised score is taken over.
        steps: of training.
    """

    folder: Path
    seed: int
    locks: int = 3
    steps: int = 60

    def locked(self, subject: Subject, variant: str, number: int = 0, **more: Any) -> Path:
        """The subject's expert, locked; "none" is the original."""
        source = subject.folder("expert", subject.own)
        if variant == "none":
            return source
        label = "".join(c if c.isalnum() else "-" for c in f"{subject.name} {variant} {number} {more}")
        target = self.folder / label
        if not target.exists():
            salt = make_salt(self.seed, number, subject.name)
            lock(source, target, key=make_key(self.seed), salt=salt, **VARIANTS[variant], **more)
        return target

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))


# --- quantisation -------------------------------------------------------------------------------------------


def int4_groups(weight: torch.Tensor, group: int = 32) -> torch.Tensor:
    """Symmetric 4 bits, round to nearest, one scale for 32 neighbours along the input dim."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % group)).view(rows, -1, group)
    scale = padded.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
    return ((padded / scale).round().clamp(-7, 7) * scale).view(rows, -1)[:, :columns]


def int8_rows(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric 8 bits, round to nearest, one scale for a row (an output)."""
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round().clamp(-127, 127) * scale


def fp8_tensor(weight: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn, one scale for the tensor."""
    scale = weight.abs().amax().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


QUANTISERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int4-g32": int4_groups,
    "int8": int8_rows,
    "fp8": fp8_tensor,
}


def quantise(bench: Bench, subject: Subject) -> Any:
    """Scores before and after quantising every two-dimensional weight, over several locks."""
    found: dict[str, Any] = {}
    base = load_file(subject.folder("base", subject.own) / "model.safetensors")
    expert = load_file(subject.folder("expert", subject.own) / "model.safetensors")
    for variant in ("none", *VARIANTS):
        scores: dict[str, list[float]] = {"as it is": [], **{name: [] for name in QUANTISERS}}
        far = []
        for number in range(1 if variant == "none" else bench.locks):
            folder = bench.locked(subject, variant, number)
            far.append(_distance(load_file(folder / "model.safetensors"), base) / _distance(expert, base))
            scores["as it is"].append(subject.score(subject.load(folder), subject.own))
            for name, rounded in QUANTISERS.items():
                model = subject.load(folder)
                with torch.no_grad():
                    for value in model.parameters():
                        if value.ndim == 2:
                            value.copy_(rounded(value))
                scores[name].append(subject.score(model, subject.own))
        found[variant] = {"scores": scores, "distance from base": far}
    return found


def _distance(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """‖a − b‖ over the tensors that both have in one shape."""
    shared = [name for name in a if name in b and a[name].shape == b[name].shape]
    return float(sum(float((a[n].double() - b[n].double()).square().sum()) for n in shared) ** 0.5)


# --- further training ---------------------------------------------------------------------------------------


def training(bench: Bench, subject: Subject) -> Any:
    """The same steps from the original and from every locked model; then the trained ones unlocked."""
    found: dict[str, Any] = {}
    for variant in ("none", "none, other batches", *VARIANTS):
        other = variant == "none, other batches"
        folder = bench.locked(subject, "none" if other else variant)
        model = subject.fit_head(subject.load(folder), subject.new)
        before = subject.score(model, subject.new)
        seed = bench.seed + 1000 * other
        losses = train(subject, model.train(), subject.new, bench.steps, seed)
        model.eval()
        entry: dict[str, Any] = {
            "before": before,
            "losses": [round(value, 5) for value in losses],
            "after": subject.score(model, subject.new),
        }
        if variant in VARIANTS:
            entry["unlocked"] = _unlock_trained(bench, subject, model, folder)
        found[variant] = entry
    start = found["none"]["losses"]
    for entry in found.values():
        pairs = zip(entry["losses"], start, strict=True)
        entry["largest difference of losses"] = max(abs(a - b) for a, b in pairs)
    return found


def _unlock_trained(bench: Bench, subject: Subject, model: Any, locked: Path) -> dict[str, Any]:
    """Save what was trained as a user does, put the manifest beside it, unlock, and compare the functions."""
    trained, back = bench.fresh(), bench.fresh() / "back"
    model.save_pretrained(trained)
    shutil.copyfile(locked / MANIFEST, trained / MANIFEST)
    report = unlock(trained, back, key=make_key(bench.seed), accept_changed=True)
    again = subject.load(back)
    old, new = subject.outputs(model, subject.new), subject.outputs(again, subject.new)
    result = {
        "score": subject.score(again, subject.new),
        "difference": _relative(new, old),
        "argmax": _agree(new, old),
        "altered": len(report.altered),
    }
    shutil.rmtree(trained)
    shutil.rmtree(back.parent)
    return result


# --- adapters -----------------------------------------------------------------------------------------------


def adapters(bench: Bench, subject: Subject) -> Any:
    """A LoRA that was trained on the base, on the plain fine-tune and on every locked one."""
    linear = _linear_names(subject.load(subject.folder("base", subject.learnt)))
    found: dict[str, Any] = {"modules": len(linear), "steps": bench.steps}

    def both(folder: Path, adapter: Path | None) -> dict[str, float]:
        model = _with_adapter(subject.load(folder), adapter)
        own = subject.score(model, subject.own) if folder != base else None
        new = subject.score(subject.fit_head(model, subject.learnt), subject.learnt)
        return {"new": new} if own is None else {"own": own, "new": new}

    base = subject.folder("base", subject.learnt)
    adapter = _train_adapter(bench, subject, base, linear)
    found["base"] = {"without": both(base, None), "with": both(base, adapter)}
    for variant in ("none", *VARIANTS):
        folder = bench.locked(subject, variant)
        found[variant] = {"without": both(folder, None), "with": both(folder, adapter)}
    for variant in ("none", "exact"):
        folder = bench.locked(subject, variant)
        own = _train_adapter(bench, subject, folder, linear)
        found[variant]["trained on it"] = both(folder, own)
    house = {"key": make_key(bench.seed), "domain": f"house {bench.seed}"}
    for name, folder in {"base": base, "expert": subject.folder("expert", subject.own)}.items():
        lock(folder, bench.folder / f"house-{name}", **house)
    inside = _train_adapter(bench, subject, bench.folder / "house-base", linear)
    expert = bench.folder / "house-expert"
    found["exact, and the base in one domain"] = {"without": both(expert, None), "with": both(expert, inside)}
    return found


def _linear_names(model: Any) -> list[str]:
    """Every linear layer but the head."""
    layers = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    return [name for name in layers if not name.endswith(("lm_head", "classifier"))]


def _train_adapter(bench: Bench, subject: Subject, folder: Path, names: list[str]) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(bench.seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=names)
    model = get_peft_model(subject.fit_head(subject.load(folder), subject.learnt), config)
    train(subject, model.train(), subject.learnt, bench.steps, bench.seed, adapter=True)
    target = bench.fresh()
    model.save_pretrained(target)
    return target


def _with_adapter(model: Any, adapter: Path | None) -> Any:
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


# --- dtypes -------------------------------------------------------------------------------------------------


def dtypes(bench: Bench, subject: Subject) -> Any:
    """Outputs of locked models against the original's: stored and run in the checkpoint's dtype, and float32."""
    source = subject.folder("expert", subject.own)
    stored = _stored(source)
    run = getattr(torch, stored)
    plain, plain_states = subject.outputs(subject.load(source), hidden=True)
    native = subject.outputs(subject.load(source, run))
    found: dict[str, Any] = {"stored": stored, "none": {"native, against float32": _pair(native, plain)}}
    for variant in VARIANTS:
        folder = bench.locked(subject, variant)
        wide = bench.locked(subject, variant, dtype="float32")
        logits, states = subject.outputs(subject.load(folder), hidden=True)
        found[variant] = {
            "stored and run in it": _pair(subject.outputs(subject.load(folder, run)), native),
            "stored in it, run in float32": _pair(logits, plain),
            "--dtype float32": _pair(subject.outputs(subject.load(wide)), plain),
            "states": max(
                _relative(a, b)
                for new, old in zip(states, plain_states, strict=True)
                for a, b in zip(new, old, strict=True)
            ),
        }
    return found


def _stored(folder: Path) -> str:
    """The dtype that most of a checkpoint's tensors have."""
    kinds = [str(value.dtype) for value in load_file(folder / "model.safetensors").values()]
    return max(set(kinds), key=kinds.count).removeprefix("torch.")


def _relative(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new.double() - old.double()).norm() / old.double().norm())


def _agree(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new.argmax(-1) == old.argmax(-1)).float().mean())


def _pair(new: torch.Tensor, old: torch.Tensor) -> dict[str, float]:
    return {"difference": _relative(new, old), "argmax": _agree(new, old)}


# --- domains ------------------------------------------------------------------------------------------------

State = dict[str, torch.Tensor]


def linear(base: State, experts: dict[str, State]) -> State:
    """The mean, in float32, in the dtypes of the base."""
    out = {}
    for name, value in base.items():
        same = [state[name].float() for state in experts.values() if state[name].shape == value.shape]
        out[name] = torch.stack(same).mean(0).to(value.dtype) if same else value
    return out


def even_ties(base: State, experts: dict[str, State], weight: float = 0.7, density: float = 0.2) -> State:
    """TIES that keeps all entries of the smallest magnitude it keeps, and none where signs are even."""
    out = {}
    for name, value in base.items():
        same = [state[name].float() for state in experts.values() if state[name].shape == value.shape]
        if not same:
            out[name] = value
            continue
        deltas = torch.stack(same) - value.float()
        sizes = deltas.abs().flatten(1)
        least = sizes.topk(max(1, int(density * sizes.shape[1]))).values[:, -1]
        kept = (deltas * (sizes >= least[:, None]).view_as(deltas)).double()
        agree = kept.sign() == kept.sum(0).sign()
        mean = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
        out[name] = (value.double() + weight * mean).to(value.dtype)
    return out


MERGES: dict[str, Callable[[State, dict[str, State]], State]] = {
    "linear": linear,
    "task arithmetic": lambda b, e: dict(merge_method("task_arithmetic")(b, e, weight=0.4).shared),
    "TIES": lambda b, e: dict(merge_method("ties")(b, e, weight=0.7, density=0.2).shared),
    "TIES, ties kept": even_ties,
}


def domains(bench: Bench, subject: Subject) -> Any:
    """Base and two fine-tunes locked in one domain, merged as they are, and the merge unlocked."""
    tasks = (subject.own, subject.new)
    folders = {"base": subject.folder("base", subject.own)}
    folders |= {task: subject.folder("expert", task) for task in tasks}
    states = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    wanted = {name: merge(states["base"], {t: states[t] for t in tasks}) for name, merge in MERGES.items()}
    found: dict[str, Any] = {"none": {name: _merge_scores(bench, subject, m) for name, m in wanted.items()}}
    for variant in MERGED:
        for domain in (True, False) if variant == "exact" else (True,):
            locked = {name: bench.fresh() / "locked" for name in folders}
            for number, (name, folder) in enumerate(folders.items()):
                how: Options = (
                    {"domain": f"house {bench.seed}"}
                    if domain
                    else {"salt": make_salt(bench.seed, "apart", number)}
                )
                lock(folder, locked[name], key=make_key(bench.seed), **VARIANTS[variant], **how)
            entry = {}
            for name, merge in MERGES.items():
                parts = {n: load_file(folder / "model.safetensors") for n, folder in locked.items()}
                merged = merge(parts["base"], {t: parts[t] for t in tasks})
                entry[name] = {"scores": _merge_scores(bench, subject, merged)}
                if domain:
                    back = _open_merge(bench, subject, merged, locked[subject.own] / MANIFEST)
                    entry[name] |= _compare(back, wanted[name])
                    entry[name]["unlocked"] = _merge_scores(bench, subject, back)
            found[f"{variant}, {'one domain' if domain else 'no domain'}"] = entry
            for folder in locked.values():
                shutil.rmtree(folder.parent)
    return found


def _write(bench: Bench, subject: Subject, state: State) -> Path:
    """A merge as a folder, with the config of the subject's expert."""
    source, target = subject.folder("expert", subject.own), bench.fresh()
    shutil.copyfile(source / "config.json", target / "config.json")
    head = load_file(source / "model.safetensors")
    state = {name: head[name] if head[name].shape != value.shape else value for name, value in state.items()}
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    return target


def _merge_scores(bench: Bench, subject: Subject, state: State) -> dict[str, float]:
    folder = _write(bench, subject, state)
    model = subject.load(folder)
    scores = {task: subject.score(subject.fit_head(model, task), task) for task in (subject.own, subject.new)}
    shutil.rmtree(folder)
    return scores


def _open_merge(bench: Bench, subject: Subject, merged: State, manifest: Path) -> State:
    """`unlock --manifest` of a merge that has no manifest of its own."""
    folder, back = _write(bench, subject, merged), bench.fresh() / "back"
    unlock(folder, back, key=make_key(bench.seed), manifest=manifest)
    return load_file(back / "model.safetensors")


def _compare(back: State, wanted: State) -> dict[str, float]:
    same = [name for name in wanted if name in back and back[name].shape == wanted[name].shape]
    differing = sum(int((back[name] != wanted[name]).sum()) for name in same)
    total = sum(wanted[name].numel() for name in same)
    old = torch.cat([wanted[name].double().flatten() for name in same])
    new = torch.cat([back[name].double().flatten() for name in same])
    return {"weights that differ": differing / total, "difference": float((new - old).norm() / old.norm())}


PARTS: dict[str, Callable[[Bench, Any], Any]] = {
    "quantise": quantise,
    "train": training,
    "adapters": adapters,
    "dtypes": dtypes,
    "domains": domains,
}
