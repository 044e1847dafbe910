"""Configurations as data: one spelling for each, and the part of it that decides which symmetries hold.

Nothing here imports torch or transformers, so that a shipped specification can be looked up without them.
What the configuration class knows (its declared defaults, its aliases, the old spellings that it accepts)
is read once by `class_defaults`, where transformers is at hand, and travels with the specification as JSON.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from unmergeable.errors import Contradiction
from unmergeable.fields import (
    DERIVED,
    INERT,
    INERT_ROTARY,
    LAYER_INDICES,
    OVERRIDES,
    PER_LAYER,
    ROTARY_KINDS,
    SIZES,
    by_stage,
    overrides,
    proportions,
)

Config = dict[str, Any]

#: Reserved key of `class_defaults`: what the class knows besides defaults.
CLASS = "$class"

#: Reserved key of `structure`: which sizes are given at all.
SIZES_GIVEN = "$sizes"

#: Reserved key of `structure`: whether an encoder and a decoder are as wide as each other.
COUPLED = "$coupled"

#: Roles of sizes that may be lists: where heads have an entry a stage, so have widths.
_BY_STAGE = ("heads", "width")

_ROTARY = "rope_parameters"
_PROBE = 0.4375
#: How transformers writes them to `config.json`: {"__float__": "Infinity"}.
_TAG, _TAGGED = "__float__", ("Infinity", "-Infinity", "NaN")
_LEGACY_FRACTIONS = ("partial_rotary_factor", "rotary_pct", "rope_pct", "rope_percent", "rotary_percentage")


def for_class(config: Mapping[str, Any]) -> Config:
    """A copy for a configuration class's `from_dict`: numbers that JSON has not, which files tag, are numbers."""

    def read(value: Any) -> Any:
        if isinstance(value, Mapping):
            if value.keys() == {_TAG} and value[_TAG] in _TAGGED:
                return float(value[_TAG])
            return {name: read(one) for name, one in value.items()}
        return [read(one) for one in value] if isinstance(value, list) else value

    return {name: read(value) for name, value in config.items()}


def class_defaults(config_class: Any) -> Config:
    """What a transformers configuration class adds to a `config.json`, as JSON.

    Only *declared* defaults are used, never values that the class derives while it is constructed: a field
    that is absent and one that is given with its declared default reach the constructor as the same
    argument, so two files with one canonical form build the same model.

    Returns:
        declared field defaults, nested for sub-configurations whose class is fixed. The reserved key `$class`
        holds `aliases` (alias -> field), `legacy` (old top-level name -> name inside `rope_parameters`),
        `flat_rotary` (whether an old `rope_scaling` simply becomes `rope_parameters`) and `flat` (sub-configuration ->
        which of its fields old files have at the top: those that are `moved`, and those of which that is not known).
    """
    defaults: Config = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            continue
        if _is_json(value):
            defaults[field.name] = copy.deepcopy(value)
    sub_specs: Mapping[str, Any] = getattr(config_class, "sub_configs_defaults", None) or {}
    for name, spec in sub_specs.items():
        sub_class = spec.config_class
        fixed = bool(getattr(sub_class, "model_type", ""))
        if fixed and dataclasses.is_dataclass(sub_class):
            defaults[name] = class_defaults(sub_class)
            given = {k: v for k, v in spec.init_kwargs.items() if _is_json(v)}
            defaults[name][CLASS]["absent"] = None if getattr(spec, "optional", False) else given
    defaults[CLASS] = {"aliases": dict(getattr(config_class, "attribute_map", None) or {})}
    defaults[CLASS].update(_rotary_spellings(config_class))
    if flat := _flat_spellings(config_class, [name for name, part in defaults.items() if _is_part(part)]):
        defaults[CLASS]["flat"] = flat
    return defaults


def canonical_config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Config:
    """The class's declared defaults overlaid by a `config.json`, in the present spelling.

    Old spellings are renamed only where `class_defaults` saw the class itself accept them. Where an old and
    a new name disagree both are kept: such a file matches no specification and is proven afresh.
    Of a size they may not.

    Args:
        config: the file's content; it is not changed.
        defaults: from `class_defaults`; an empty mapping leaves the file as it is but for its own spelling.

    Raises:
        Contradiction: two spellings of one size that disagree.
    """
    known = defaults.get(CLASS, {})
    given = {name: copy.deepcopy(value) for name, value in config.items() if name != CLASS}
    _rename(given, "torch_dtype", "dtype")
    if given.get("rope_scaling", 0) in (None, {}):
        del given["rope_scaling"]
    for alias, field in known.get("aliases", {}).items():
        _rename(given, alias, field)
    if known.get("flat_rotary"):
        _canonical_rotary(given, known)
    for name, fields in known.get("flat", {}).items():
        _nest(given, name, fields)
    result: Config = {}
    for declared, default in defaults.items():
        if declared == CLASS:
            continue
        name = known.get("aliases", {}).get(
            declared, declared
        )  # a class may declare an alias of its own field
        if name in result:
            continue
        if _is_part(default):
            nested = given.pop(name, None)
            if nested is None:
                nested = default[CLASS].get("absent", {})
            result[name] = canonical_config(nested, default) if isinstance(nested, Mapping) else nested
        else:
            result[name] = given.pop(name) if name in given else copy.deepcopy(default)
    for name, value in given.items():
        result[name] = canonical_config(value, {}) if _is_configuration(value) else value
    if known.get("flat_rotary") and not result.get(_ROTARY):
        result[_ROTARY] = {"rope_type": "default"}
    return result


def structure(config: Mapping[str, Any]) -> Config:
    """The part of a canonical configuration that decides which symmetries hold.

    Neither sizes nor inert fields belong to it, nor empty mappings (such as `pruned_heads` of old files). Of
    a size only "none" or "zero" remains, of a width that may equal the residual width whether it does, of widths by
    stage how many there are, of heads by stage their proportions; other lists of both stay as they are. Lists with one
    entry a layer, and what is another in single layers, become the sorted set of the combinations of kinds that occur,
    lists of layer numbers become whether there are any.
    """
    result: Config = {}
    kinds: dict[str, list[Any]] = {}
    # a class may look for a size that it does not declare: whether it is there can matter
    given = sorted(n for n, v in config.items() if n in SIZES and n not in DERIVED and v is not None)
    if given:
        result[SIZES_GIVEN] = given
    widths = [value for name, value in config.items() if SIZES.get(name) == "width" and value is not None]
    if (alike := coupled(config)) is not None:
        result[COUPLED] = alike
    staged = any(SIZES.get(n) == "heads" and by_stage(v) for n, v in config.items())
    depth = next((v for n, v in config.items() if SIZES.get(n) == "layers" and isinstance(v, int)), 0)
    for name, value in config.items():
        if name == CLASS or name in INERT or value == {}:
            continue
        if name in SIZES:
            if name not in DERIVED and (value is None or (isinstance(value, int | float) and value <= 0)):
                result[name] = None if value is None else 0
            elif isinstance(value, list) and SIZES[name] in _BY_STAGE:
                result[name] = _stages(name, value) if staged and by_stage(value) else copy.deepcopy(value)
            elif SIZES[name] == "linked" and value is not None:
                result[name] = "width" if value in widths else "own"
        elif name in LAYER_INDICES and (value is None or isinstance(value, list)):
            result[name] = bool(value)
        elif name in PER_LAYER and isinstance(value, list):
            kinds[name] = value
        elif name == OVERRIDES and (layers := overrides(config, depth)) is not None:
            kinds[name] = [[sorted(layer), structure(layer)] for layer in layers]
        elif name == _ROTARY and isinstance(value, Mapping):
            result[name] = _rotary_structure(value)
        elif isinstance(value, Mapping):
            result[name] = structure(value)
        else:
            result[name] = copy.deepcopy(value)
    for length in sorted({len(value) for value in kinds.values()}):
        names = sorted(name for name, value in kinds.items() if len(value) == length)
        entries = zip(*(kinds[name] for name in names), strict=True)
        combinations = {json.dumps(entry, sort_keys=True) for entry in entries}
        result["+".join(names)] = sorted(combinations)
    return result


def coupled(config: Mapping[str, Any]) -> bool | None:
    """Whether an encoder and a decoder in a configuration are as wide as each other; None where there are no two."""
    encoder, decoder = config.get("encoder"), config.get("decoder")
    if not isinstance(encoder, Mapping) or not isinstance(decoder, Mapping):
        return None
    return width(encoder) == width(decoder)


def width(config: Mapping[str, Any]) -> int | None:
    """The residual width that other models see; of stages, the last one's."""
    found = next((config[name] for name in ("hidden_size", "d_model", "n_embd") if config.get(name)), None)
    return found if isinstance(found, int) else None


def lookup(config: Mapping[str, Any], name: str) -> Any:
    """The value of a field, searched breadth first through nested configurations, or None."""
    level: list[Mapping[str, Any]] = [config]
    while level:
        for node in level:
            if node.get(name) is not None:
                return node[name]
        level = [value for node in level for value in node.values() if isinstance(value, Mapping)]
    return None


def _stages(name: str, value: list[int]) -> Any:
    """Of which of two stages with as many heads a proof means the number, it cannot tell."""
    return proportions(value) if SIZES[name] == "heads" else f"{len(value)} stages"


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_configuration(value: Any) -> bool:
    return isinstance(value, Mapping) and ("model_type" in value or "hidden_size" in value)


def _is_part(default: Any) -> bool:
    """Whether this default is of a sub-configuration."""
    return isinstance(default, Mapping) and CLASS in default


def _rename(fields: Config, old: str, new: str) -> None:
    if old not in fields or old == new:
        return
    if new not in fields or fields[new] is None or fields[new] == fields[old]:
        fields[new] = fields.pop(old)
    elif fields[old] is None:
        del fields[old]
    elif old in SIZES or new in SIZES:
        raise Contradiction(
            "two spellings of one field disagree",
            where="config.json",
            expected=f"{old} = {new}",
            got=f"{fields[old]!r} and {fields[new]!r}",
            hint="remove the one that the class does not read",
        )


def _canonical_rotary(fields: Config, known: Mapping[str, Any]) -> None:
    scaling = fields.pop("rope_scaling", None)
    rotary = scaling or fields.get(_ROTARY) or {}
    if not isinstance(rotary, dict):
        fields["rope_scaling"] = rotary
        return
    if "type" in rotary and rotary.setdefault("rope_type", rotary["type"]) == rotary["type"]:
        del rotary["type"]
    rotary.setdefault("rope_type", "default")
    for old, new in known.get("legacy", {}).items():
        value = fields.get(old)
        if value is not None and rotary.setdefault(new, value) != value:
            continue
        fields.pop(old, None)
    fields[_ROTARY] = rotary


def _rotary_structure(rotary: Mapping[str, Any]) -> Config:
    result: Config = {}
    for name, value in rotary.items():
        if isinstance(value, Mapping):
            result[name] = _rotary_structure(value)
        elif name == "rope_type" and value in ROTARY_KINDS:
            result[name] = "frequencies"
        elif name not in INERT_ROTARY:
            result[name] = copy.deepcopy(value)
    return result


def _rotary_spellings(config_class: Any) -> Config:
    """Which old spellings the class itself turns into `rope_parameters`, found by asking it."""
    if _ROTARY not in {field.name for field in dataclasses.fields(config_class)}:
        return {}
    plain = _rotary_of(config_class, {})
    scaled = _rotary_of(config_class, {"rope_scaling": {"rope_type": "default", "factor": 2.0}})
    if plain.get("rope_type") != "default" or scaled.get("factor") != 2.0:
        return {}
    legacy = {"rope_theta": "rope_theta"}
    for name in _LEGACY_FRACTIONS:
        if _rotary_of(config_class, {name: _PROBE}).get("partial_rotary_factor") == _PROBE:
            legacy[name] = "partial_rotary_factor"
    return {"flat_rotary": True, "legacy": legacy}


def _nest(given: Config, name: str, fields: Mapping[str, list[str]]) -> None:
    """Put the fields of a sub-configuration where they are now; not where the class may read one of them otherwise."""
    if given.get(name) is not None or any(given.get(field) is not None for field in fields["left"]):
        return
    if part := {field: given.pop(field) for field in fields["moved"] if field in given}:
        given[name] = part


def _flat_spellings(config_class: Any, parts: list[str]) -> Config:
    """The sub-configurations whose fields the class itself takes from the top where they are missing, by asking it.

    Some published models that see have those of their language model there. All fields at once, with other values than
    by default, must make the same configuration at the top as in their place.
    """
    declared = {field.name: field.default for field in dataclasses.fields(config_class)}
    found: Config = {}
    for name in parts:
        if declared.get(name, 0) is not None:
            continue
        part_class = config_class.sub_configs_defaults[name].config_class
        fields = {
            field.name: field.default
            for field in dataclasses.fields(part_class)
            if field.name not in declared
        }
        probes = {one: other for one, default in fields.items() if (other := _another(default)) is not None}
        # A number may be what is missing by default.
        probes |= {
            one: 1 for one, default in fields.items() if default is None and _read(config_class, {one: 1})
        }
        rotary = {"rope_type": "default", "factor": 2.0}
        if _ROTARY in fields:
            probes |= {"rope_scaling": rotary, "rope_theta": _PROBE}
        if _alike(config_class, name, probes):
            moved = {*probes, _ROTARY} if _alike(config_class, name, {_ROTARY: rotary}) else {*probes}
            found[name] = {"moved": sorted(moved), "left": sorted(fields.keys() - moved)}
    return found


def _alike(config_class: Any, part: str, given: Config) -> bool:
    """Whether these fields make a difference, and the same one at the top as in their part."""
    top, nested, plain = (_read(config_class, one) for one in (given, {part: given}, {}))
    return top is not None and plain != top == nested


def _another(default: Any) -> Any:
    """Another value of this kind; None where none is known to be valid."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return 2 * default or 1
    if isinstance(default, float):
        return _PROBE
    return {"silu": "gelu", "gelu": "silu"}.get(default) if isinstance(default, str) else None


def _read(config_class: Any, arguments: Config) -> Config | None:
    made = _made(config_class, arguments)
    return None if made is None else dict(made.to_dict())


def _rotary_of(config_class: Any, arguments: Config) -> Mapping[str, Any]:
    value = getattr(_made(config_class, arguments), _ROTARY, None)
    return value if isinstance(value, Mapping) else {}


def _made(config_class: Any, arguments: Config) -> Any:
    """A configuration; None where the class rejects it, in any way it may: then it does not accept that spelling."""
    try:
        return config_class(**copy.deepcopy(arguments))
    except Exception:  # any class may refuse any argument in any way
        return None
