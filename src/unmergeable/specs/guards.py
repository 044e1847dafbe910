"""What no proof on a miniature covers: a checkpoint that says two things of itself is refused.

A spec is proven for the stock class that `architectures` names, on miniatures of its configuration. Whatever else
decides what is computed when the checkpoint is loaded has to agree with that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..arithmetic import evaluate_size, lookup
from ..errors import Contradiction, InputError
from ..spec import Refusal, Spec, name_regex
from ..whole import in_block, spellings

# Two towers' numbers of heads in one configuration: miniatures have both equal where they are equal, so that a proof
# cannot tell which of them a site of the decoder means.
_TWICE = (
    ("encoder_attention_heads", "decoder_attention_heads"),
    ("encoder_num_attention_heads", "decoder_num_attention_heads"),
)


def check_own_code(config: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint that brings code of its own for its model: what was proven is the stock class.

    Raises:
        InputError: `auto_map` names a model.
    """
    given = config.get("auto_map")
    own = given if isinstance(given, Mapping) else {}
    named = [name for name in own if str(name).startswith("AutoModel")]
    if named:
        raise InputError(
            "the checkpoint names code of its own for its model, and no proof is of that",
            where=where,
            expected="a stock class",
            got=f"auto_map: {named[0]} = {own[named[0]]!r}",
            hint="if the stock class is meant, remove auto_map from config.json; else give a spec of your own",
        )


def check_agrees(spec: Spec, config: Mapping[str, Any], canonical: Mapping[str, Any], where: str) -> None:
    """Refuse what the configuration says of the model and the spec was not proven of.

    Raises:
        Contradiction: another type of model than the class is of.
        InputError: two towers with different numbers of heads.
    """
    kind = config.get("model_type")
    if kind is not None and spec.model_type and kind != spec.model_type:
        raise Contradiction(
            "model_type and architectures name different models; loaders go by the first",
            where=where,
            expected=f"model_type {spec.model_type!r}, of {spec.architecture}",
            got=repr(kind),
            hint="correct config.json",
        )
    _check_heads(canonical, where)
    for paths in spec.evidence.get("alike", ()):
        counts = {path: evaluate_size(path, canonical, where) for path in paths if _there(canonical, path)}
        if len(set(counts.values())) > 1:
            raise InputError(
                "two towers have different numbers of heads, and the spec was proven where they have the same",
                where=where,
                expected=" = ".join(counts),
                got=", ".join(map(str, counts.values())),
            )


def _there(config: Mapping[str, Any], path: str) -> bool:
    """Whether the configuration has a field at all, or an entry of it."""
    return lookup(config, path.partition("[")[0]) is not None


def _check_heads(config: Mapping[str, Any], where: str, path: str = "") -> None:
    for one, other in _TWICE:
        first, second = config.get(one), config.get(other)
        if first is not None and second is not None and first != second:
            raise InputError(
                "encoder and decoder have different numbers of heads: no spec is proven for that",
                where=where,
                expected=f"{path}{one} = {path}{other}",
                got=f"{first} and {second}",
            )
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_heads(value, where, f"{path}{name}.")


def spare_named_heads(spec: Spec, *configs: Mapping[str, Any]) -> Spec:
    """The spec without what would give heads other numbers, where a configuration calls heads by their numbers.

    `alignment_heads` (Whisper's word timestamps) means heads of the decoder's cross-attention, `pruned_heads` any.
    """
    named = {name for name in ("alignment_heads", "pruned_heads") for one in configs if one.get(name)}
    if not named:
        return spec
    moved = [site.name for site in spec.sites if site.kind == "heads"]
    cross = [name for name in moved if re.search(r"encoder_attn|cross", name)]
    spared = set(moved if "pruned_heads" in named or not cross else cross)
    reason = f"{' and '.join(sorted(named))} names heads by their numbers"
    return replace(
        spec,
        sites=tuple(site for site in spec.sites if site.name not in spared),
        refused=(*spec.refused, *(Refusal(name, reason) for name in sorted(spared))),
    )


def note_unread(spec: Spec, shapes: Mapping[str, tuple[int, ...]]) -> Spec:
    """The spec with a remark on weights that its class does not read: half a model, say, under the name of the other,
    or another head than its own.

    Nothing is known of them, so they stay as they were; but their owner may think that they are locked.
    """
    patterns = [*spec.untouched, *(slot.tensor for site in spec.sites for slot in site.slots)]
    regexes = [name_regex(pattern.removeprefix(cut)) for pattern in patterns for cut in {"", spec.prefix}]
    unread = {
        name
        for name in shapes
        if (spec.drops(name) or not in_block(name))
        and not any(regex.fullmatch(one) for one in spellings(name) for regex in regexes)
    }
    taken = {start for name in shapes if name not in unread for start in _starts(name)}
    groups: dict[str, list[str]] = {}
    for name in sorted(unread):
        own = next((start for start in _starts(name) if start not in taken), name)
        groups.setdefault(own, []).append(name)
    reason = "loaders of {} drop what is here, so it is not locked: {}"
    found = [
        Refusal(
            start, reason.format(spec.architecture, f"{len(names)} tensors" if names[1:] else "one tensor")
        )
        for start, names in groups.items()
        if any(name.endswith("weight") for name in names)  # masks and positions of old files are none
    ]
    return replace(spec, refused=(*spec.refused, *found)) if found else spec


def _starts(name: str) -> Iterator[str]:
    """The beginnings of a name in whole parts, the shortest first."""
    parts = name.split(".")
    return (".".join(parts[: k + 1]) for k in range(len(parts)))
