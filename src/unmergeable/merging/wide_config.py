"""The configuration of a wide merge: more heads and MLP rows at the same width, where a class allows it.

Which fields count heads and rows is read from the sizes in the spec, and what a class makes of a configuration
from building it: only one that gives every tensor the shape it must have is taken.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import Any, TypeAlias

import torch
from torch import nn

from ..arithmetic import lookup
from ..config import CLASS, for_class
from ..errors import InputError
from ..fields import SIZES
from ..match import Match
from ..stock import module_state, quiet
from .wide_tensors import HINT, Wider

Shapes: TypeAlias = dict[str, tuple[int, ...]]
Fields: TypeAlias = dict[str, int]  # by dotted path

_PATH = re.compile(r"[a-z_][\w.]*")


@dataclass(frozen=True)
class Widened:
    """A configuration that fits.

    Attributes:
        config: config.json with the grown fields.
        fields: those, by dotted path: what was there and what is; None where there was nothing.
        wider: how far heads and rows grow.
        empty: key-value heads of a layer that belong to no model.
    """

    config: dict[str, Any]
    fields: Mapping[str, tuple[int | None, int]]
    wider: Wider
    empty: int


def widen(
    host: nn.Module, config: Mapping[str, Any], canonical: Mapping[str, Any], match: Match, count: int
) -> Widened:
    """The least configuration of the same class and width that holds so many models side by side.

    Some classes refuse a number of heads that does not divide their width: then heads stay empty.

    Args:
        host: a model of the class.
        config: its config.json.
        canonical: the same as the spec reads it.
        match: the spec, laid over its tensors.
        count: how many models.

    Raises:
        InputError: there is none, with the reason.
    """
    where = type(host).__name__
    groups = _group_counts(match)
    if any(matched.site.kind == "experts" for matched in match.sites):
        what = "one router chooses between all experts, so those of two models cannot stand side by side"
        raise InputError(what, where=where, hint=HINT)
    if not groups:
        what = "no values and outputs of heads were proven for the class, so none can be added"
        raise InputError(what, where=where, hint=HINT)
    unit = gcd(*groups)
    ways = list(_head_sizes(canonical, match))
    misfits: list[tuple[str, object, object]] = []
    for extra in range(count * unit + 1):
        wider = Wider(match, count, count + Fraction(extra, unit))
        for way in list(ways):
            grown = {**_grown(canonical, wider), **way}
            given, fields = _with_fields(config, grown, match.spec.defaults)
            made = _built(host, given)
            if made is None:
                continue  # the class refuses these numbers; it may take others
            wanted = _shapes(host, wider)
            if made == wanted:
                return Widened(given, fields, wider, extra * max(groups) // unit)
            name = next(key for key in {**wanted, **made} if wanted.get(key) != made.get(key))
            misfits.append((name, wanted.get(name), made.get(name)))
            ways.remove(way)  # it means something else to this class, whatever the number
    derived = len(list(_head_sizes(canonical, match))) > 1
    what = "heads and MLP rows of this class cannot grow at the same width"
    if derived:
        what = "the class takes the size of a head from its width and number of heads: none can be added"
    name, expected, got = misfits[0] if misfits else ("", None, "no number of heads that it accepts")
    place = f"{where}: {name}" if name else where
    raise InputError(what, where=place, expected=expected, got=got, hint=HINT)


def _group_counts(match: Match) -> list[int]:
    """How many key-value heads the attention sites of a model have."""
    return [
        matched.sizes[dim]
        for matched in match.sites
        if matched.site.kind == "vo"
        for dim in matched.site.batch_dims
    ]


def _grown(canonical: Mapping[str, Any], wider: Wider) -> Fields:
    """The fields that count heads and MLP rows, grown."""
    found: Fields = {}
    for matched in wider.match.sites:
        growing = wider.growing(matched.site)
        for dim, text in matched.site.sizes.items() if growing else ():
            for path in _PATH.findall(text):
                role, value = SIZES.get(path.rpartition(".")[2]), lookup(canonical, path)
                if not isinstance(value, int):
                    continue
                if role in ("heads", "kv_heads"):
                    found[path] = int(value * wider.factor)
                elif role == "inner" and dim in growing:
                    found[path] = value * wider.count
    return found


def _head_sizes(canonical: Mapping[str, Any], match: Match) -> Iterator[Fields]:
    """Ways to say the size of a head: by the field that the spec knows, else by every name that classes have."""
    known: Fields = {}
    scopes: dict[str, int] = {}
    declared = False
    for matched in match.sites:
        if matched.site.kind != "vo":
            continue
        dim = matched.site.acts
        for path in _PATH.findall(matched.site.sizes[dim]):
            scope, _, leaf = path.rpartition(".")
            if SIZES.get(leaf) in ("head_dim", "value_dim"):
                declared = True
                if lookup(canonical, path) is None:
                    known[path] = matched.sizes[dim]
            elif leaf in SIZES:
                scopes[scope] = matched.sizes[dim]
    yield known
    if not declared:
        for leaf in (name for name, role in SIZES.items() if role == "head_dim"):
            yield {f"{scope}.{leaf}" if scope else leaf: size for scope, size in scopes.items()}


def _with_fields(
    config: Mapping[str, Any], fields: Fields, defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[int | None, int]]]:
    """A config.json with fields set under the names that it has for them, and what was changed."""
    out = copy.deepcopy(dict(config))
    changed = {}
    for path, value in fields.items():
        *scopes, leaf = path.split(".")
        node, known = out, defaults
        for scope in scopes:
            node, known = node.setdefault(scope, {}), known.get(scope) or {}
        aliases = known.get(CLASS, {}).get("aliases", {})
        names = [leaf, *(alias for alias, field in aliases.items() if field == leaf)]
        key = next((name for name in names if name in node), leaf)
        if node.get(key) != value:
            changed[".".join([*scopes, key])] = node.get(key), value
            node[key] = value
    return out, changed


def _built(host: nn.Module, config: Mapping[str, Any]) -> Shapes | None:
    """The shapes that the host's class gives its tensors under a configuration; None where it refuses it."""
    kind: Any = type(host)
    known: Any = host.config
    try:
        with quiet(), torch.device("meta"):
            module = kind._from_config(type(known).from_dict(for_class(config)))
    except Exception:  # a class may refuse any numbers in any way
        return None
    return {name: tuple(tensor.shape) for name, tensor in module_state(module).items()}


def _shapes(host: nn.Module, wider: Wider) -> Shapes:
    """The shapes that the tensors of the wide model must have."""
    found: Shapes = {}
    for name, tensor in module_state(host).items():
        shape = list(tensor.shape)
        rows = wider.rows(name)
        if rows is not None:
            shape[rows.axis] = len(rows.places)
        found[name] = tuple(shape)
    return found
