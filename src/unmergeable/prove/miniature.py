"""Miniatures: a model of the real class and structure with small sizes, all weights random, in fp64.

Everything here runs in a child process made by `child.in_child`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmergeable.config import canonical_config, class_defaults, for_class
from unmergeable.errors import InputError, RunError
from unmergeable.fields import DERIVED, PER_LAYER
from unmergeable.prove.child import is_fp64
from unmergeable.prove.inputs import InputSet, flatten_outputs, make_inputs
from unmergeable.prove.random_weights import randomize
from unmergeable.prove.shrink import STYLES, shrink

Config = dict[str, Any]

MAX_PARAMETERS = 20_000_000
WEIGHTS = "model.safetensors"


@dataclass
class Miniature:
    """A small random model and the checkpoint it makes.

    Args:
        model: the transformers model, in eval mode, fp64.
        config: its `config.json` as written, in canonical form.
        given: the fields that were chosen; what the class derives from them is left null.
        defaults: what its configuration class adds (`config.class_defaults`).
        shape: which of the two sets of sizes it has.
        disk: tensors as `save_pretrained` writes them, tied ones once.
        memory: the same under the names and shapes of the model's own parameters; None where nothing differs.
        inputs: the input sets that its forward accepts.
        seconds: time to build it.
    """

    model: Any
    config: Config
    given: Config
    defaults: Config
    shape: int
    disk: dict[str, torch.Tensor]
    memory: dict[str, torch.Tensor] | None
    inputs: list[InputSet]
    seconds: float

    def layouts(self) -> dict[str, dict[str, torch.Tensor]]:
        """Every naming under which a checkpoint of this class may exist, as far as it can be told in general.

        "disk" and "memory" (where it differs); each with the base model's prefix taken off or put on ("bare",
        "prefixed"), as checkpoints written by another head have it; each with the old names of norm weights
        ("gamma"). Whether stock `from_pretrained` reads one is for `Oracle` to say.
        """
        found = {"disk": self.disk}
        if self.memory is not None:
            found["memory"] = self.memory
        prefix = f"{self.model.base_model_prefix}."
        for name, tensors in list(found.items()):
            if any(key.startswith(prefix) for key in tensors):
                bare = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
                if len(bare) == len(tensors):
                    found[f"{name} bare"] = bare
            else:
                found[f"{name} prefixed"] = {prefix + key: tensor for key, tensor in tensors.items()}
        for name, tensors in list(found.items()):
            old = {_old_norm(key): tensor for key, tensor in tensors.items()}
            if old.keys() != tensors.keys():
                found[f"{name} gamma"] = old
        return found

    def layout_of(self, names: Iterable[str]) -> str | None:
        """The layout that explains most of these names; None where none finds half of its own.

        Args:
            names: the tensor names of a real checkpoint.
        """
        real = {_pattern(name) for name in names}
        best, best_count = None, 0
        for layout, tensors in self.layouts().items():
            patterns = {_pattern(name) for name in tensors}
            count = len(patterns & real)
            if count > best_count and 2 * count >= len(patterns):
                best, best_count = layout, count
        return best

    def load(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        folder: Path | None = None,
        attention: str = "eager",
    ) -> Any:
        """A new model of this class, read by stock `from_pretrained` from tensors or from a folder."""
        config = copy.deepcopy(self.model.config)
        options = {
            "dtype": torch.float64,
            "attn_implementation": attention,
            "experts_implementation": "eager",
        }
        if folder is not None:
            model = type(self.model).from_pretrained(folder, **options)
            _no_cache(model.config)
        else:
            state = {name: tensor.clone() for name, tensor in (tensors or {}).items()}
            model = type(self.model).from_pretrained(None, config=config, state_dict=state, **options)
        return model.eval()

    def write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a checkpoint folder with these tensors."""
        from safetensors.torch import save_file

        self.model.config.save_pretrained(folder)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, str(folder / WEIGHTS), metadata={"format": "pt"})


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def _old_norm(name: str) -> str:
    return re.sub(r"(LayerNorm|layer_norm)\.(weight|bias)$", _old_norm_leaf, name)


def _old_norm_leaf(match: re.Match[str]) -> str:
    return f"{match[1]}.{'gamma' if match[2] == 'weight' else 'beta'}"


def model_class(config: Mapping[str, Any], architecture: str | None = None) -> Any:
    """The transformers class that a `config.json` names.

    Raises:
        InputError: no class is named, or transformers has none of that name.
    """
    import transformers

    names = [architecture] if architecture else list(config.get("architectures") or [])
    if not names:
        raise InputError(
            "the configuration names no model class",
            where="config.json",
            expected="a field `architectures` with the class that wrote the checkpoint",
            hint="add it, or give a configuration that has it with --config",
        )
    found = getattr(transformers, str(names[0]), None)
    if (
        not inspect.isclass(found)
        or not hasattr(found, "config_class")
        or not hasattr(found, "from_pretrained")
    ):
        raise InputError(
            f"transformers {transformers.__version__} has no model class {names[0]}",
            where="config.json",
            hint="code that comes with a checkpoint is never run; only classes of transformers can be proven",
        )
    return found


def build_miniature(
    config: Mapping[str, Any],
    architecture: str | None = None,
    *,
    shape: int = 0,
    attention: str = "eager",
    derived: bool = False,
) -> Miniature:
    """Build the miniature of a real configuration.

    Args:
        config: the content of a real `config.json`.
        architecture: the class, where `architectures` does not say.
        shape: 0 or 1, two sets of sizes.
        attention: attention implementation, "eager" or "sdpa".
        derived: leave every size that the class can work out to the class, as many real configs do.

    Raises:
        InputError: unknown class, quantized checkpoint, or no small model of this class runs.
        RunError: called outside `in_child`.
    """
    if not is_fp64():
        raise RunError("miniatures are built in a process of their own", hint="call it through in_child")
    if config.get("quantization_config"):
        raise InputError(
            "the checkpoint is quantized", where="config.json", hint="dequantize it to bf16 first"
        )
    started = time.monotonic()
    cls = model_class(config, architecture)
    defaults, real = _real_config(cls, config)
    failures: list[str] = []
    tried: list[Config] = []
    if derived:
        real = without_derived(real, defaults)
    for style in STYLES:
        if derived and style.free_width:
            continue
        small = shrink(real, shape, style)
        if small in tried:
            continue
        tried.append(small)
        try:
            model = _instantiate(cls, small, attention)
            inputs = _working_inputs(model)
        except Exception as error:  # any class may refuse any size in any way; the next style is tried
            failures.append(f"{type(error).__name__}: {error}"[:300])
            continue
        disk, written = _saved(model, original=True)
        memory, _ = _saved(model, original=False)
        differs = memory.keys() != disk.keys() or any(disk[name].shape != memory[name].shape for name in disk)
        return Miniature(
            model=model,
            config=canonical_config(written, defaults),
            given=small,
            defaults=defaults,
            shape=shape,
            disk=disk,
            memory=memory if differs else None,
            inputs=inputs,
            seconds=time.monotonic() - started,
        )
    raise InputError(
        f"no miniature of {cls.__name__} runs, so nothing can be proven about it",
        where="config.json",
        got="; ".join(failures),
    )


def build_miniatures(config: Mapping[str, Any], architecture: str | None = None) -> list[Miniature]:
    """The two miniatures of different shape that a proof needs (see `build_miniature`)."""
    return [build_miniature(config, architecture, shape=shape) for shape in (0, 1)]


def build_family(config: Mapping[str, Any], architecture: str | None = None) -> list[Miniature]:
    """The miniatures of a proof: two shapes, and one whose derivable sizes are left to the class.

    The last one is left out where it is the same config, or where no such model runs.
    """
    family = [build_miniature(config, architecture, shape=shape) for shape in (0, 1)]
    try:
        last = build_miniature(config, architecture, shape=1, derived=True)
    except InputError:
        return family
    return [*family, last] if all(last.given != other.given for other in family) else family


def without_derived(real: Config, defaults: Mapping[str, Any]) -> Config:
    """The config without the sizes that its class works out by itself: null where declared, else left out."""
    out: Config = {}
    for name, value in real.items():
        nested = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(nested, Mapping):
            out[name] = without_derived(dict(value), nested)
        elif name in DERIVED and nested is None:
            if name in defaults:
                out[name] = None
        else:
            out[name] = value
    return out


def _real_config(cls: Any, config: Mapping[str, Any]) -> tuple[Config, Config]:
    """Class defaults, and the canonical configuration with the per-layer lists that the class works out."""
    config_class = cls.config_class
    own = dict(config)
    key = getattr(config_class, "base_config_key", "")
    if key and isinstance(own.get(key), Mapping) and own.get("model_type") != config_class.model_type:
        own = dict(own[key])
    defaults = {**class_defaults(config_class), **_chosen_defaults(config_class, own)}
    real = canonical_config(own, defaults)
    try:
        derived = config_class.from_dict(for_class(own)).to_dict()
    except Exception as error:
        raise InputError(
            "its own class rejects the configuration", where="config.json", got=f"{error}"[:500]
        ) from error
    _add_lists(real, derived)
    return defaults, real


def _chosen_defaults(config_class: Any, own: Mapping[str, Any]) -> Config:
    """Defaults of parts whose class the file chooses, by `model_type`: it may leave out all that is as there.

    So does LLaVA 1.5, of whose language model no width is said. A spec holds for this class alone: the structure of a
    configuration has its types.
    """
    import transformers

    from unmergeable.config import CLASS

    chosen: Config = {}
    for name, part in (getattr(config_class, "sub_configs_defaults", None) or {}).items():
        given, known = own.get(name), transformers.CONFIG_MAPPING
        if getattr(part.config_class, "model_type", "") or not isinstance(given, Mapping):
            continue
        if given.get("model_type") in known and dataclasses.is_dataclass(known[given["model_type"]]):
            chosen[name] = class_defaults(known[given["model_type"]])
            chosen[name][CLASS]["absent"] = {}
    return chosen


def _add_lists(real: Config, derived: Mapping[str, Any]) -> None:
    for name, value in derived.items():
        if isinstance(value, list) and name in PER_LAYER and real.get(name) is None:
            real[name] = copy.deepcopy(value)
        elif isinstance(value, Mapping) and isinstance(real.get(name), dict):
            _add_lists(real[name], value)


def _instantiate(cls: Any, small: Config, attention: str) -> Any:
    config = cls.config_class.from_dict(for_class(small))
    for name in ("pad_token_id",):
        # heads that pool at the last real token refuse a batch without it
        if getattr(config, name, 0) is None:
            setattr(config, name, 0)
    _no_cache(config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in cls._from_config(copy.deepcopy(config)).parameters())
    if parameters > MAX_PARAMETERS:
        raise InputError("the miniature is too large", expected=f"at most {MAX_PARAMETERS}", got=parameters)
    torch.manual_seed(0)
    model = cls._from_config(
        config, dtype=torch.float64, attn_implementation=attention, experts_implementation="eager"
    )
    randomize(model, seed=1)
    return model.eval()


def _no_cache(config: Any, seen: set[int] | None = None) -> None:
    seen = set() if seen is None else seen
    if id(config) in seen:
        return
    seen.add(id(config))
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _no_cache(value, seen)


def _working_inputs(model: Any) -> list[InputSet]:
    """The input sets on which the model runs and gives finite outputs; the first one has to."""
    candidates = make_inputs(model, model.config.to_dict())
    if not candidates:
        raise InputError("no input of a known kind fits the model's forward")
    working = []
    for index, entry in enumerate(candidates):
        try:
            outputs = flatten_outputs(model(**entry.arguments), entry.masks)
        except Exception:  # a class may refuse an input in any way; the first one it has to take
            if index == 0:
                raise
            continue
        if outputs and all(bool(torch.isfinite(output).all()) for output in outputs):
            working.append(entry)
        elif index == 0:
            raise InputError("the miniature's outputs are not finite", where=entry.label)
    return working


def _saved(model: Any, *, original: bool) -> tuple[dict[str, torch.Tensor], Config]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="unmergeable-") as folder:
        model.save_pretrained(folder, save_original_format=original)
        tensors = load_file(str(Path(folder) / WEIGHTS))
        written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return tensors, written
