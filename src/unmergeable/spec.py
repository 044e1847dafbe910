"""Specs: where the symmetries of one architecture act, as data.

A `Spec` is a table from tensors to sites, proven by `prove` and kept as JSON. A `Site` acts on one named dim
and has one element for every combination of its `per` dims; a tensor takes part through a `Slot`, which says
where on its axes the dims lie (see `index`) and with which power. Dims live on axes or in tensor names:
`model.layers.{l}.mlp.experts.{e}.w1.weight` has the dims l and e.

Everything else in the package reads this table and knows no architecture.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from .errors import InputError
from .groups import group
from .index import Index, parse_index

FORMAT = (
    3  # of specs with one element for some layers; the second has some layers alone, others are of the first
)
KINDS = ("qk", "vo", "mlp", "heads", "experts")

#: In place of a size's expression, where layers differ in it: what the tensors of each one have.
AS_FOUND = "*"

_ONLY = re.compile(r"[A-Za-z_][\w.]*=[\w-]+|\d+( \d+)*")


@dataclass(frozen=True)
class Slot:
    """One tensor's part in a site: dims by axis, and the power with which the element acts on it."""

    tensor: str
    index: Mapping[int, str]
    power: int = 1

    @cached_property
    def name_dims(self) -> frozenset[str]:
        return frozenset(re.findall(r"\{(\w+)\}", self.tensor))

    @cached_property
    def axes(self) -> dict[int, Index]:
        return {axis: parse_index(text) for axis, text in self.index.items()}

    def axis_of(self, dim: str) -> int | None:
        """The axis that a dim lies on; None where it is in the name, or nowhere."""
        return next((axis for axis, index in self.axes.items() if dim in index.dims), None)


@dataclass(frozen=True)
class Site:
    """One place where a group acts, for all layers at once, or for those of one kind.

    only: of a dim in names the numbers that are meant, `layer_types=sliding_attention` by an entry of a list in the
    config, or `0 1 3` themselves.
    """

    name: str
    kind: str
    acts: str
    per: tuple[str, ...]
    group: str
    sizes: Mapping[str, str]
    slots: tuple[Slot, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def name_dims(self) -> tuple[str, ...]:
        """The `per` dims that stand in tensor names: one draw for each of their values."""
        in_names = frozenset().union(*(slot.name_dims for slot in self.slots))
        return tuple(dim for dim in self.per if dim in in_names)

    @cached_property
    def batch_dims(self) -> tuple[str, ...]:
        """The `per` dims that lie on axes: one element of a batch for each of their values."""
        return tuple(dim for dim in self.per if dim not in self.name_dims)

    @property
    def format(self) -> int:
        """Of specs, the first that can say it."""
        if not self.only:
            return 1
        return 2 if all(dim in self.name_dims for dim in self.only) else FORMAT

    def check(self) -> None:
        """Raise InputError where the site contradicts itself."""
        group(self.group)
        if self.kind not in KINDS:
            raise InputError(
                "unknown kind of site", where=self.name, expected=" | ".join(KINDS), got=self.kind
            )
        if not self.slots:
            raise InputError("a site without tensors", where=self.name)
        for dim in self.name_dims:
            if f"{{{dim}}}" not in self.name:  # two instances of one name would share their secret
                raise InputError(f"the dim '{dim}' of the site is not in its name", where=self.name)
        for dim, text in self.only.items():
            if not all(dim in slot.name_dims for slot in self.slots) or not _ONLY.fullmatch(text):
                got = f"{dim}: {text}"
                raise InputError("not a choice of layers", where=self.name, expected="l: list=entry", got=got)
        for slot in self.slots:
            where = f"{self.name}: {slot.tensor}"
            on_axes = [dim for index in slot.axes.values() for dim in index.dims]
            if len(set(on_axes)) != len(on_axes):
                raise InputError("a dim lies on two axes", where=where, got=dict(slot.index))
            if self.acts not in on_axes and self.acts not in slot.name_dims:
                raise InputError(
                    f"the acted dim '{self.acts}' is neither on an axis nor in the name", where=where
                )
            for dim in self.batch_dims:
                if dim not in on_axes:
                    raise InputError(f"the dim '{dim}' of the site is not on an axis", where=where)
            for dim in self.name_dims:
                if dim not in slot.name_dims:
                    raise InputError(f"the dim '{dim}' of the site is not in the tensor's name", where=where)
            unsized = {d for index in slot.axes.values() for d in index.all_dims} - set(self.sizes)
            if unsized:
                raise InputError(f"no size for {', '.join(sorted(unsized))}", where=where)
        for dim, text in self.sizes.items():
            if text == AS_FOUND and self.alone(dim) is None:
                raise InputError(f"no axis has the size of '{dim}' by itself", where=self.name)

    def alone(self, dim: str) -> tuple[Slot, int] | None:
        """The first slot with an axis that this dim has to itself, and the axis."""
        every = ((slot, axis, index) for slot in self.slots for axis, index in slot.axes.items())
        return next(((slot, axis) for slot, axis, index in every if index.text == dim), None)


@dataclass(frozen=True)
class Rest:
    """What the prover knows of tensors that no site acts on: where they have to be, and how wide they are.

    beside: the beginning of a name, with the dims that it has in common with the tensor's; wherever a tensor has a
    name of that beginning, this one is needed ("" for always). None where stock loaders do without.
    tied: the pattern of the tensor that takes its place, and the other way round, in models that tie the two.
    always: whether the class ties them whatever the config says.
    sizes: by axis the fields that may give its size, `vocab_size | num_labels`.
    """

    beside: str | None = None
    tied: str = ""
    always: bool = False
    sizes: Mapping[int, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        said: dict[str, Any] = {} if self.beside is None else {"beside": self.beside}
        if self.tied:
            said |= {"tied": self.tied, "always": self.always}
        if self.sizes:
            said["sizes"] = {str(axis): text for axis, text in self.sizes.items()}
        return said

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rest:
        sizes = {int(axis): str(text) for axis, text in data.get("sizes", {}).items()}
        return cls(data.get("beside"), data.get("tied", ""), bool(data.get("always")), sizes)


@dataclass(frozen=True)
class Refusal:
    """A place that was looked at and is left alone, and why."""

    site: str
    reason: str


@dataclass(frozen=True)
class Spec:
    """The proven sites of one architecture, configuration and layout of names.

    `configs` holds the fields that decide the structure, with the values they must have, in every spelling
    that was proven; `defaults` what config.json may leave out. `untouched` are the name patterns of all further tensors
    that the function reads, `rest` what is known of them, `ignored` regular expressions of leftovers that stock loaders
    drop.
    """

    architecture: str
    model_type: str
    layout: str
    configs: tuple[Mapping[str, Any], ...]
    defaults: Mapping[str, Any]
    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...] = ()
    untouched: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    rest: Mapping[str, Rest] = field(default_factory=dict)
    prefix: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def drops(self, name: str) -> bool:
        """Whether stock loaders drop a tensor of this name: its class does not read it."""
        return any(re.search(pattern, name) for pattern in self.ignored)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the spec does to tensors; evidence, versions and what only checks a source left out."""
        said = self.as_dict()
        del said["evidence"]
        said["untouched"] = list(self.untouched)
        for site in said["sites"]:
            del site["evidence"]
        return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": max((site.format for site in self.sites), default=1),
            "architecture": self.architecture,
            "model_type": self.model_type,
            "layout": self.layout,
            "configs": [dict(config) for config in self.configs],
            "defaults": dict(self.defaults),
            "prefix": self.prefix,
            "sites": [
                {
                    "name": site.name,
                    "kind": site.kind,
                    "acts": site.acts,
                    "per": list(site.per),
                    "group": site.group,
                    "sizes": dict(site.sizes),
                    "slots": [
                        {
                            "tensor": slot.tensor,
                            "index": {str(axis): text for axis, text in slot.index.items()},
                            "power": slot.power,
                        }
                        for slot in site.slots
                    ],
                    "evidence": dict(site.evidence),
                    **({"only": dict(site.only)} if site.only else {}),
                }
                for site in self.sites
            ],
            "refused": [{"site": refusal.site, "reason": refusal.reason} for refusal in self.refused],
            "untouched": [
                {"tensor": name, **self.rest[name].as_dict()} if name in self.rest else name
                for name in self.untouched
            ],
            "ignored": list(self.ignored),
            "evidence": dict(self.evidence),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "spec") -> Spec:
        """Read a spec from its JSON form.

        Raises:
            InputError: a newer format, a missing or unknown field, or a site that contradicts itself.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("format"), int):
            raise InputError(
                "not a spec", where=where, expected=f"a JSON object with a format, {FORMAT} at most"
            )
        if data["format"] > FORMAT:
            raise InputError(
                "a spec of a newer format",
                where=where,
                expected=FORMAT,
                got=data["format"],
                hint="update unmergeable",
            )
        try:
            sites = tuple(
                Site(
                    name=site["name"],
                    kind=site["kind"],
                    acts=site["acts"],
                    per=tuple(site["per"]),
                    group=site["group"],
                    sizes=dict(site["sizes"]),
                    slots=tuple(
                        Slot(
                            slot["tensor"],
                            {int(k): v for k, v in slot["index"].items()},
                            int(slot.get("power", 1)),
                        )
                        for slot in site["slots"]
                    ),
                    evidence=site.get("evidence", {}),
                    only=dict(site.get("only", {})),
                )
                for site in data["sites"]
            )
            spec = cls(
                architecture=data["architecture"],
                model_type=data["model_type"],
                layout=data["layout"],
                configs=tuple(dict(config) for config in data["configs"]),
                defaults=data["defaults"],
                prefix=data.get("prefix", ""),
                sites=sites,
                refused=tuple(Refusal(item["site"], item["reason"]) for item in data["refused"]),
                untouched=tuple(
                    item if isinstance(item, str) else item["tensor"] for item in data["untouched"]
                ),
                rest={
                    item["tensor"]: Rest.from_dict(item)
                    for item in data["untouched"]
                    if not isinstance(item, str)
                },
                ignored=tuple(data["ignored"]),
                evidence=data.get("evidence", {}),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"a spec with a missing or malformed field: {error!r}", where=where) from None
        for site in spec.sites:
            site.check()
        return spec


# --- name patterns -----------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def name_regex(pattern: str) -> re.Pattern[str]:
    """The regular expression of a name pattern: `{l}` matches one number."""
    parts = re.split(r"\{(\w+)\}", pattern)
    seen: set[str] = set()
    out = []
    for k, part in enumerate(parts):
        if k % 2 == 0:
            out.append(re.escape(part))
        elif part in seen:
            out.append(f"(?P={part})")
        else:
            seen.add(part)
            out.append(rf"(?P<{part}>0|[1-9]\d*)")
    return re.compile("".join(out))


def bound(pattern: str, names: Iterable[str]) -> Iterator[tuple[str, dict[str, int]]]:
    """The names that a pattern matches, each with the numbers in it."""
    for name, found in ((name, name_regex(pattern).fullmatch(name)) for name in names):
        if found is not None:
            yield name, {dim: int(number) for dim, number in found.groupdict().items()}


def fill(pattern: str, dims: Mapping[str, int]) -> str:
    """The name that a pattern has for these numbers."""
    return re.sub(r"\{(\w+)\}", lambda match: str(dims[match.group(1)]), pattern)
