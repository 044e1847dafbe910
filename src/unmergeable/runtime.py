"""Both models side by side: the stock classes load them, and their outputs are compared on generated inputs.

What may differ is what rounding makes of it: the source is run once more with its weights moved by half an
ulp, and the destination may be four times as far off. Wide weights are run in float64, where the arithmetic adds
nothing of its own: in float32 it differs by as much as half an ulp of the weights does, and more by bad luck.
Only one model is in memory at a time.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .certificate import Check
from .checkpoint import is_float
from .config import for_class
from .errors import RunError, UsageError
from .plan import Member, Opened
from .stock import model_class, quiet

if TYPE_CHECKING:
    import torch

Outputs = dict[str, list["torch.Tensor"]]

FACTOR = 4.0
BLIND = 0.5  # a bound above this lets unrelated outputs pass: two of one size are 1.4 apart
LEAST_AGREEMENT = 0.5  # of the positions whose largest output stands where rounding leaves it
ATTENTION = ("eager", "sdpa")
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
NARROW = ("BF16", "F16")
_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


def check_runtime(before: Opened, after: Opened, run: str, method: str | None) -> list[Check]:
    """Run both models and compare their outputs.

    In the dtype that they are stored in, float32 in the arithmetic of float64; where it has 16 bits and the lock
    is exact, widened as well, which sees much smaller differences.

    Args:
        run: "always", or "auto": only with torch and transformers, and if both fit in half of the memory.
        method: what the model was locked by.

    Raises:
        UsageError: "always", and the models cannot be run. RunError: "always", and the source fails to run.
    """
    reason = _obstacle(before, after, run)
    if reason is not None:
        if run == "always":
            hint = "install unmergeable[prove], and give a folder with a config.json"
            raise UsageError("the models cannot be run", got=reason, hint=hint)
        return [Check("runtime", None, detail=reason)]
    source, target = before.members[0], after.members[0]
    stored = _stored(target)
    wide = next((kind for kind in ("F64", "F32") if 2 * _nbytes(before, after, kind) <= _memory()), None)
    kinds = [stored if stored != "F32" else wide or stored]
    if method == "exact" and stored in NARROW and wide is not None:
        kinds.append(wide)
    # noise of float32 at the least, unless there is more precision than that to begin with
    noises = ["F32" if kind == "F64" != stored else kind for kind in kinds]
    return [_check(source, target, kind, noise, run) for kind, noise in zip(kinds, noises, strict=True)]


def _obstacle(before: Opened, after: Opened, run: str) -> str | None:
    if before.pipeline is not None or before.single_file:
        return "only a folder with a config.json is run"
    config = before.members[0].source.config
    if config is None or not isinstance(config.get("model_type"), str):
        return "config.json names no model_type"
    if _stored(after.members[0]) not in DTYPES:
        return "its dtype is none that models run in"
    need = _nbytes(before, after, _stored(after.members[0]))
    if run == "auto" and 2 * need > _memory():
        return f"both models need {need / 2**30:.1f} GiB, more than half of the memory"
    if any(find_spec(name) is None for name in ("torch", "transformers")):
        return "torch and transformers are not installed"
    if model_class(config) is None:
        return "transformers has no class for it"
    return None


def _stored(member: Member) -> str:
    """The dtype of most of the weights."""
    counts: dict[str, int] = {}
    for info in member.source.tensors.values():
        if is_float(info.dtype):
            counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes
    return max(counts, key=lambda dtype: counts[dtype], default="")


def _nbytes(before: Opened, after: Opened, dtype: str) -> int:
    numbers = 0
    for opened in (before, after):
        for info in opened.members[0].source.tensors.values():
            numbers += info.nbytes // _SIZES.get(info.dtype, 8)
    return numbers * _SIZES[dtype]


def _memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- running ------------------------------------------------------------------------------------------------


def _check(source: Member, target: Member, kind: str, noise: str, run: str) -> Check:
    name = f"runtime {DTYPES[kind]}"
    try:
        plain, shaken = _run_source(source, kind, noise)
    except Exception as error:  # a model may fail in any way; then nothing is claimed
        if run == "always":
            raise RunError("the source does not run", where=source.source.root, got=_short(error)) from error
        return Check(name, None, detail=f"the source does not run here: {_short(error)}")
    if not plain:
        return Check(name, None, detail="no inputs are known for this model")
    try:
        other = _run(target.source.root, source, kind, set(plain))
    except Exception as error:  # the source ran: whatever stops this one is a difference
        detail = f"the destination does not run: {_short(error)}"
        return Check(name, False, detail=detail, place=str(target.source.root))
    floor = max(_distance(shaken[label], plain[label]) for label in plain)
    errors = {label: _distance(other[label], plain[label]) for label in plain}
    worst = max(errors, key=lambda label: errors[label])
    agreement = min(_agreement(other[label], plain[label]) for label in plain)
    noisy = min(_agreement(shaken[label], plain[label]) for label in plain)
    bound = FACTOR * floor
    if not bound <= BLIND:
        detail = f"rounding alone changes the outputs by {floor:.0%}: they tell nothing"
        return Check(name, None, detail=detail)
    said = f"argmax agreement {agreement:.3f}, {noisy:.3f} under half an ulp of noise; {len(plain)} runs"
    held = errors[worst] <= bound and agreement >= LEAST_AGREEMENT * noisy
    detail = f"{said}, worst: {worst}" if held else f"{worst}: outputs differ; {said}"
    return Check(name, held, errors[worst], bound, detail, worst)


def _short(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


def _run_source(source: Member, kind: str, noise: str) -> tuple[Outputs, Outputs]:
    """Outputs by "attention, input" as they are, and with noise of a dtype on the weights that sites act on.

    Inputs that the model does not take are left out; the first one must run.
    """
    from .prove.inputs import make_inputs

    plain: Outputs = {}
    shaken: Outputs = {}
    with quiet():
        for attention in ATTENTION:
            model = _load(source.source.root, source, kind, attention)
            if model is None:
                continue
            entries = []
            for number, entry in enumerate(make_inputs(model, model.config.to_dict())):
                try:
                    plain |= _forward(model, entry, attention)
                except Exception:  # a class may refuse an input in any way; the first one it has to take
                    if number == 0:
                        raise
                    continue
                entries.append(entry)
            _shake(model, source, noise)
            for entry in entries:
                shaken |= _forward(model, entry, attention)
    return plain, shaken


def _run(root: Path, source: Member, kind: str, wanted: set[str]) -> Outputs:
    """Outputs of the destination, for what ran in the source."""
    from .prove.inputs import make_inputs

    found: Outputs = {}
    with quiet():
        for attention in ATTENTION:
            if not any(label.startswith(f"{attention}, ") for label in wanted):
                continue
            model = _load(root, source, kind, attention)
            for entry in make_inputs(model, model.config.to_dict()):
                if f"{attention}, {entry.label}" in wanted:
                    found |= _forward(model, entry, attention)
    return found


def _load(root: Path, source: Member, kind: str, attention: str) -> Any:
    """The model in evaluation mode; None where its class has no such attention."""
    import torch
    import transformers

    given = source.source.config or {}
    config = transformers.CONFIG_MAPPING[given["model_type"]].from_dict(for_class(given))
    options = {
        "config": config,
        "dtype": getattr(torch, DTYPES[kind]),
        "attn_implementation": attention,
        "experts_implementation": "eager",  # grouped kernels know few dtypes
        "local_files_only": True,
        "trust_remote_code": False,
    }
    try:
        model = model_class(given).from_pretrained(str(root), **options)
    except (ValueError, ImportError):
        if attention == ATTENTION[0]:
            raise
        return None
    return model.eval()


def _forward(model: Any, entry: Any, attention: str) -> Outputs:
    import torch

    from .prove.inputs import flatten_outputs

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    arguments = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in entry.arguments.items()
    }
    torch.manual_seed(0)
    with torch.no_grad():
        label = f"{attention}, {entry.label}"
        found = {label: _kept(flatten_outputs(model(**arguments), entry.masks))}
        decoded = [] if entry.masks else _decoded(model, arguments)
    if decoded:
        found[f"{label}, with a cache"] = _kept(decoded)
    return found


def _kept(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().double().clone() for tensor in tensors]


def _decoded(model: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Logits of a text in two parts, the second with the cache of the first; none where there is no cache."""
    name = "decoder_input_ids" if "decoder_input_ids" in arguments else "input_ids"
    if name not in arguments or not model.can_generate():
        return []
    ids = arguments[name]
    half = ids.shape[1] // 2
    rest = {key: value for key, value in arguments.items() if key not in (name, "token_type_ids")}
    first = model(**{**rest, name: ids[:, :half]}, use_cache=True)
    cache = getattr(first, "past_key_values", None)
    if cache is None or not hasattr(first, "logits"):
        return []
    second = model(**{**rest, name: ids[:, half:]}, past_key_values=cache, use_cache=True)
    return [first.logits, second.logits]


def _shake(model: Any, source: Member, kind: str) -> None:
    """Move weights by half an ulp of a dtype, root mean square: one ulp up or down for a quarter of them.

    All those that sites act on; all matrices where the model calls them by other names than the file.
    """
    import torch

    touched = source.match.parts.keys() if source.match is not None else ()
    named = dict(model.named_parameters())
    chosen = [
        parameter
        for name, parameter in named.items()
        if any(t == name or t.endswith(f".{name}") or name.endswith(f".{t}") for t in touched)
    ]
    chosen = chosen or [p for p in named.values() if p.dim() > 1]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    generator = torch.Generator().manual_seed(0)
    for parameter in chosen:
        if not parameter.is_floating_point():
            continue
        values = parameter.data.to(getattr(torch, DTYPES[kind]))
        bits = values.view(integers[values.element_size()])
        draw = torch.randint(0, 8, bits.shape, generator=generator)
        step = (draw == 0).to(bits.dtype) - (draw == 1).to(bits.dtype)
        step[~torch.isfinite(values) | (values == 0)] = 0
        bits += step
        parameter.data.copy_(values)


def _distance(new: list[torch.Tensor], old: list[torch.Tensor]) -> float:
    """Largest ‖new − old‖ / ‖old‖ of the output tensors; numbers that are not finite must be the same."""
    if [tensor.shape for tensor in new] != [tensor.shape for tensor in old]:
        return float("inf")
    worst = 0.0
    for a, b in zip(new, old, strict=True):
        finite = a.isfinite()
        if not bool((finite == b.isfinite()).all()):
            return float("inf")
        norm = float(b[finite].norm())
        change = float((a[finite] - b[finite]).norm())
        worst = max(worst, change / norm if norm else change)
    return worst


def _agreement(new: list[torch.Tensor], old: list[torch.Tensor]) -> float:
    """Part of the positions whose largest output is the same one, of the first output."""
    if not new or not old or new[0].shape != old[0].shape or old[0].dim() == 0 or not old[0].numel():
        return 0.0
    return float((new[0].argmax(-1) == old[0].argmax(-1)).double().mean())
