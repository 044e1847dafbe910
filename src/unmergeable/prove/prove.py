"""Prove the symmetries of a real configuration: miniatures, search, and the joint test through real files.

    prove_specs(config)  ->  one spec for every layout of tensor names that stock loaders read

Runs in a forked child in which torch computes in fp64 only. It needs transformers, of whose classes it runs
the code; code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError, RunError
from ..spec import Refusal, Site, Slot, Spec

VERSION = 8  # of the prover: a cached spec of another version is proven again


def prove_specs(
    config: Mapping[str, Any], architecture: str | None = None, *, timeout: float = 900.0
) -> list[Spec]:
    """Specs of the class that a config names, one for each layout of names on disk.

    Args:
        config: the content of a real config.json.
        architecture: the class, where `architectures` does not say.
        timeout: seconds after which the proof is given up.

    Raises:
        InputError: the class is not in transformers, or nothing about it can be proven.
        RunError: the proof died or took too long.
    """
    from .child import in_child

    return [
        Spec.from_dict(data, "the prover's result")
        for data in in_child(_prove, dict(config), architecture, timeout=timeout)
    ]


def _prove(config: dict[str, Any], architecture: str | None) -> list[dict[str, Any]]:
    from .miniature import build_family

    family = build_family(config, architecture)
    layouts = ["disk"] + (["memory"] if any(member.memory is not None for member in family) else [])
    specs = []
    for layout in layouts:
        try:
            specs.append(_prove_layout(family, config, layout))
        except (InputError, RunError):
            if layout == "disk":
                raise
            continue  # stock loaders do not read these names: no such checkpoint exists
    return [spec.as_dict() for spec in specs]


def _prove_layout(family: Sequence[Any], config: Mapping[str, Any], layout: str) -> Spec:
    from .inventory import take_kinds, take_stock, take_uneven
    from .needed import find_rest
    from .oracle import Oracle
    from .search import search
    from .sizes import Sizes
    from .trial import TOLERANCE, Judge
    from .unreached import drop_beside_unreached

    oracles = [Oracle(member, layout) for member in family]
    judge = Judge(oracles, [member.given for member in family])
    sizes = Sizes(judge.configs, [member.config for member in family])
    shapes = [{name: array.shape for name, array in oracle.tensors.items()} for oracle in oracles]
    uneven = take_uneven(shapes)
    kinds = take_kinds(shapes, judge.configs, uneven)
    found = search(judge, take_stock(shapes), sizes, uneven, kinds)
    reached, beside = drop_beside_unreached(oracles, found.sites)
    sites, refused = _named_apart(reached), (*found.refused, *beside)
    if not sites:
        raise InputError(
            "no symmetry of this class could be proven",
            where=type(family[0].model).__name__,
            hint="; ".join(f"{r.site}: {r.reason}" for r in refused) or None,
        )
    worst = _joint(judge, sites)
    if not worst <= TOLERANCE:
        raise RunError("sites that hold one by one do not hold together", got=f"{worst:.1e}")
    model = family[0].model
    folded = _patterns(family[0], oracles[0])
    # Of keys and values that layers take from others a site alone does not say in which layers they have to be.
    spread = {slot.tensor for site in sites for slot in site.slots if not _in_every(site, slot)}
    in_sites = {slot.tensor for site in sites for slot in site.slots if not site.only} - spread
    untouched = tuple(name for name in folded if name not in in_sites)
    ignored = tuple(_ignored(model))
    prefix = _bare_prefix(family, oracles, layout)
    return Spec(
        architecture=type(model).__name__,
        model_type=str(type(model).config_class.model_type),
        layout=layout,
        configs=_spellings(model, config, family[0].defaults),
        defaults=family[0].defaults,
        sites=sites,
        refused=tuple(_unique(refused)),
        untouched=untouched,
        rest=find_rest(family, layout, untouched, sorted(in_sites), ignored),
        ignored=ignored,
        prefix=prefix,
        evidence={**_evidence(model, family, oracles, worst), "alike": sizes.alike_heads()},
    )


def _in_every(site: Site, slot: Slot) -> bool:
    """Whether every instance of a site of keys or values has the slot's tensor once, or for all that it acts on."""
    return site.kind not in ("qk", "vo") or slot.name_dims <= {*site.name_dims, site.acts}


def _named_apart(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites with a name for each: of two in one place the second has the dim that it acts on behind it.

    Secrets and recorded choices go by these names.
    """
    out: list[Site] = []
    for site in sites:
        taken = {other.name for other in out}
        names = [site.name, f"{site.name}.{site.acts}"]
        names += [f"{site.name}.{site.acts}{number}" for number in range(2, len(sites) + 2)]
        out.append(replace(site, name=next(name for name in names if name not in taken)))
    return tuple(out)


def _spellings(
    model: Any, config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], ...]:
    """The structure of the config as it is given, and in other spellings that the class reads as the same.

    These are: as the class itself would write it, and that without the lists of layer kinds, which older files
    lack. The class is asked whether it reads them alike.
    """
    from ..config import canonical_config, for_class, structure
    from ..fields import PER_LAYER

    config_class = type(model).config_class

    def read(fields: Mapping[str, Any]) -> dict[str, Any]:
        plain = config_class.from_dict(for_class(fields)).to_dict()
        return dict(json.loads(json.dumps(plain, default=str)))

    written = read(config)
    candidates = [dict(config), {**config, **written}, written]
    candidates += [{k: v for k, v in each.items() if k not in PER_LAYER} for each in candidates[1:]]
    found: list[dict[str, Any]] = []
    for each in candidates:
        fields = structure(canonical_config(each, defaults))
        if fields not in found and read(each) == written:
            found.append(fields)
    return tuple(found)


def _joint(judge: Any, sites: tuple[Site, ...]) -> float:
    """All sites at once, through files on disk, with a cache and both attention implementations."""
    worst = 0.0
    for on, oracle in enumerate(judge.oracles):
        match = judge.match(sites, on)
        for exact in (True, False):
            changes = judge.edit(match, judge.draw(match, exact=exact), on)
            worst = max(worst, oracle.reload_error(changes, thorough=True))
    return worst


def _patterns(member: Any, oracle: Any) -> list[str]:
    """Patterns of all tensors that a checkpoint of this layout may have, tied copies included."""
    from .inventory import fold

    shapes = {name: tuple(tensor.shape) for name, tensor in member.model.state_dict().items()}
    shapes |= {name: array.shape for name, array in oracle.tensors.items()}
    stored = member.disk if oracle.layout == "disk" or member.memory is None else member.memory
    shapes |= {name: tuple(tensor.shape) for name, tensor in stored.items()}
    return sorted(fold(shapes, shapes))


def _bare_prefix(family: Sequence[Any], oracles: Sequence[Any], layout: str) -> str:
    """The base model's name in front of its tensors, if stock loaders also read them without it."""
    prefix = f"{getattr(family[0].model, 'base_model_prefix', '')}."
    for oracle in oracles:
        if prefix == "." or not any(name.startswith(prefix) for name in oracle.tensors):
            return ""
        if not oracle.reads({name.removeprefix(prefix): name for name in oracle.tensors}):
            return ""
    return prefix


def _ignored(model: Any) -> list[str]:
    """Regular expressions of leftovers in old checkpoints that stock loaders drop: buffers, not weights."""
    known = [r"\.rotary_emb\.inv_freq$", r"\.position_ids$", r"\.masked_bias$", r"\.num_batches_tracked$"]
    return sorted({*known, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])})


def _unique(refused: Sequence[Refusal]) -> list[Refusal]:
    return list(dict.fromkeys(refused))


def _evidence(model: Any, family: Sequence[Any], oracles: Sequence[Any], worst: float) -> dict[str, Any]:
    import torch
    import transformers

    module = sys.modules[type(model).__module__]
    with open(str(module.__file__), "rb") as source:
        digest = hashlib.sha256(source.read()).hexdigest()
    return {
        "prover": VERSION,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "source": type(model).__module__,
        "source_sha256": digest,
        "miniatures": [sum(array.size for array in oracle.tensors.values()) for oracle in oracles],
        "forwards": sum(oracle.forwards for oracle in oracles),
        "inputs": sorted({entry.label for member in family for entry in member.inputs}),
        "decoded_with_cache": any(oracle.decoded for oracle in oracles),
        "joint_error": worst,
    }
