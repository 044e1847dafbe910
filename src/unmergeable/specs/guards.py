"""What no proof on a miniature covers: a checkpoint that says two things of itself is refused.

A spec is proven for the stock class that `architectures` names, on miniatures of its configuration. Whatever else
decides what is computed when the checkpoint is loaded has to agree with that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import InputError
from ..spec import Refusal, Spec

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
        InputError: another type of model than the class is of, or two towers with different numbers of heads.
    """
    kind = config.get("model_type")
    if kind is not None and spec.model_type and kind != spec.model_type:
        raise InputError(
            "model_type and architectures name different models; loaders go by the first",
            where=where,
            expected=f"model_type {spec.model_type!r}, of {spec.architecture}",
            got=repr(kind),
            hint="correct config.json",
        )
    for one, other in _TWICE:
        first, second = canonical.get(one), canonical.get(other)
        if first is not None and second is not None and first != second:
            raise InputError(
                "encoder and decoder have different numbers of heads: no spec is proven for that",
                where=where,
                expected=f"{one} = {other}",
                got=f"{first} and {second}",
            )


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
