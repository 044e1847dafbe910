"""Planning: which components a checkpoint has, what each is by its spec, what happens to its tensors.

Everything that can be refused is refused here, before a byte is written, and every choice that depends on
the weights is made here and recorded. What is left are jobs that depend on one source tensor each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import (
    Checkpoint,
    Pipeline,
    Shard,
    build_shard,
    is_float,
    is_pipeline,
    open_checkpoint,
    open_pipeline,
    to_float64,
)
from .checkpoint.files import load_json
from .engine import Job, Source
from .errors import ClaimError, Contradiction, InputError, UsageError
from .groups import Stream
from .match import Match, match_spec
from .methods import Context, Drawn, method
from .methods.prune import PrunedSource
from .spec import Spec
from .transform import Array, TensorPlan, compile_tensor

SpecLike = Spec | str | os.PathLike[str]
ConfigLike = Mapping[str, Any] | str | os.PathLike[str]
DTYPES = {"float32": "F32"}
GENERATION = "generation_config.json"


class Weights:
    """The tensors of a source, for methods that look at them."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def dtype(self, name: str) -> str:
        """The safetensors dtype of a tensor."""
        return self._source.tensors[name].dtype

    def bits(self, name: str) -> Array:
        """Raw bits, in the tensor's shape."""
        return self._source.read(name)

    def floats(self, name: str) -> Array:
        """Values as float64, in the tensor's shape."""
        return to_float64(self._source.read(name), self.dtype(name))


class Labelled:
    """A key whose streams belong to one component of a pipeline."""

    def __init__(self, key: Any, component: str) -> None:
        self._key, self._component = key, component

    def stream(self, salt: bytes, label: str) -> Stream:
        """The key's stream for the label with the component before it; "." is a plain checkpoint."""
        return self._key.stream(salt, label if self._component == "." else f"{self._component}|{label}")


@dataclass(eq=False)
class Member:
    """One component: a plain checkpoint has the one called ".", a pipeline one for each folder.

    source: the checkpoint. shards: layouts of the files to write. match, drawn: None where it is passed
    through, for `reason`. files: its other files, by name, that are not copied but written. headers,
    originals: headers and files of the source where a lock changes them, by name. tensors: where tensors are
    read from, if not from the checkpoint itself. digest: of the spec, if not the matched one's.
    """

    name: str
    source: Checkpoint
    shards: list[Shard]
    match: Match | None = None
    reason: str | None = None
    drawn: Drawn | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, bytes] = field(default_factory=dict)
    originals: dict[str, bytes] = field(default_factory=dict)
    tensors: Source | None = None
    digest: str | None = None

    @property
    def reading(self) -> Source:
        return self.source if self.tensors is None else self.tensors

    @property
    def passed(self) -> bool:
        """Whether it is copied as it is."""
        return self.match is None

    def jobs(self, *, undo: bool = False) -> list[Job]:
        """One job for every tensor of the destination."""
        match, drawn = self.match, self.drawn
        if match is None or drawn is None:
            return []

        def plan(name: str) -> Callable[[], TensorPlan]:
            return lambda: compile_tensor(match, drawn.elements, name, undo=undo)

        return [Job(info, plan(info.name)) for shard in self.shards for info in shard.tensors]


@dataclass(eq=False)
class Opened:
    """A checkpoint or pipeline, open for reading."""

    root: Path
    members: list[Member]
    pipeline: Pipeline | None
    manifest_path: Path | None

    @property
    def single_file(self) -> bool:
        return self.pipeline is None and self.members[0].source.single_file

    @property
    def nbytes(self) -> int:
        """Bytes that the destination takes on disk, its manifest included."""
        sizes = [sum(shard.size for shard in m.shards) + m.source.side_bytes for m in self.members]
        names = sum(len(m.source.tensors) for m in self.members)
        return sum(sizes) + (self.pipeline.side_bytes if self.pipeline else 0) + 256 * names + (1 << 20)


def open_all(path: str | os.PathLike[str], config: ConfigLike | None, stack: ExitStack) -> Opened:
    """Open a checkpoint folder, a single file or a pipeline; `stack` closes what was opened.

    Raises:
        InputError: as `open_checkpoint` and `open_pipeline`.
    """
    root = Path(path)
    if not is_pipeline(root):
        source = stack.enter_context(open_checkpoint(root, config=read_config(config)))
        return Opened(root, [Member(".", source, list(source.shards))], None, source.manifest_path)
    pipeline = open_pipeline(root)
    members = []
    for component in pipeline.components:
        if component.has_weights:
            source = stack.enter_context(open_checkpoint(root / component.name))
            members.append(Member(component.name, source, list(source.shards)))
    return Opened(root, members, pipeline, pipeline.manifest_path)


def read_config(config: ConfigLike | None) -> dict[str, Any] | None:
    """The fields of a config, given as a mapping or a file. Raises InputError."""
    if config is None or isinstance(config, Mapping):
        return None if config is None else dict(config)
    return load_json(Path(config))


def find_match(source: Checkpoint, spec: SpecLike | None) -> Match:
    """Lay the spec that belongs to a checkpoint over its tensors.

    Raises:
        UnknownArchitecture: no spec, and none can be proven. Contradiction: the tensors contradict the config.
    """
    shapes = {name: info.shape for name, info in source.tensors.items()}
    config = source.config
    if config is None:
        hint = "give the model's config.json by --config"
        raise InputError("there is no config.json", where=source.root, hint=hint)
    from .specs import spec_of

    beside = (source.root.parent if source.single_file else source.root) / GENERATION
    generation = load_json(beside) if beside.is_file() else {}
    try:
        found, canonical = spec_of(spec, config, shapes, generation, str(source.root))
    except Contradiction:
        raise
    except InputError as error:
        if isinstance(spec, Spec):
            raise
        raise UnknownArchitecture(
            error.what,
            where=error.where or source.root,
            expected=error.expected,
            got=error.got,
            hint=error.hint,
        ) from None
    return match_spec(found, shapes, canonical, str(source.root))


class UnknownArchitecture(InputError):  # noqa: N818
    """A model without a spec: refused alone, passed through as a part of a pipeline."""


def match_all(opened: Opened, spec: SpecLike | None) -> None:
    """Find every member's spec; of a pipeline, members without one are passed through, damaged ones are not.

    Raises:
        InputError: a plain checkpoint without a spec, or a pipeline with nothing to lock; as `find_match`.
    """
    for member in opened.members:
        if opened.pipeline is not None and isinstance(spec, Spec) and not _is_for(spec, member.source):
            member.reason = f"the spec is for {spec.architecture}"
            continue
        try:
            match = find_match(member.source, spec)
        except UnknownArchitecture as error:
            if opened.pipeline is None:
                raise
            member.reason = error.what
            continue
        if match.sites:
            member.match = match
        elif opened.pipeline is None:
            raise _nothing(opened, match.spec)
        else:
            member.reason = "no symmetry was proven for it"
    if all(member.match is None for member in opened.members):
        raise InputError(
            "no component of the pipeline can be locked",
            where=opened.root,
            got="; ".join(f"{member.name}: {member.reason}" for member in opened.members) or "no weights",
        )


def _is_for(spec: Spec, source: Checkpoint) -> bool:
    config = source.config or {}
    return spec.architecture in [*(config.get("architectures") or []), config.get("_class_name")]


def _nothing(opened: Opened, spec: Spec) -> InputError:
    reasons = "; ".join(f"{refusal.site}: {refusal.reason}" for refusal in spec.refused)
    return InputError(
        "no symmetry was proven for this architecture", where=opened.root, got=reasons or "no sites"
    )


def draw(
    member: Member,
    name: str,
    key: Any,
    salt: bytes,
    options: Mapping[str, Any],
    *,
    source: Source | None = None,
    base: Source | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> None:
    """Draw the elements of a member by the method called `name`.

    Args:
        source: the tensors that a data-dependent method may look at; None with `recorded` choices.
        base: the model that it may be compared with.

    Raises:
        ClaimError: a group too small to hide anything, or a site that the method should act on is left out.
    """
    assert member.match is not None
    context = Context(
        member.match,
        Labelled(key, member.name),
        salt,
        None if source is None else Weights(source),
        None if base is None else Weights(base),
        options,
        recorded,
    )
    member.drawn = method(name).draw(context)
    if not member.drawn.elements:
        sites = ", ".join(site.name for site in member.match.spec.sites)
        raise ClaimError(
            f"the method '{name}' acts on no site of this model", where=member.source.root, got=sites
        )
    if member.drawn.prune and source is not None:
        member.tensors = PrunedSource(source, member.drawn.prune, base)
    if name in ("exact", "gauge"):
        _check_all_acted(member.match, member.drawn)


def _check_all_acted(match: Match, drawn: Drawn) -> None:
    """`exact` and `gauge` act on every proven site of every layer; the rest is refused in the spec."""
    for number, matched in enumerate(match.sites):
        if matched.trivial:
            continue
        for instance in matched.instances:
            if (number, instance) not in drawn.elements:
                raise ClaimError("a site was left as it is", where=matched.label(instance))


def change_dtype(member: Member, dtype: str) -> None:
    """Lay the member's shards out anew with its floating-point tensors in `dtype` ("float32").

    The header, the sizes in the index and the dtype in config.json follow.

    Raises:
        UsageError: no such dtype. InputError: a tensor has more precision than that.
    """
    if dtype not in DTYPES:
        raise UsageError("cannot store weights in this dtype", expected=" | ".join(DTYPES), got=dtype)
    stored = DTYPES[dtype]
    old = {shard.file: shard.header for shard in member.shards}
    for name, info in member.source.tensors.items():
        if info.dtype == "F64":
            raise InputError(f"{dtype} would take precision away", where=name, got=info.dtype)
    member.shards = [
        build_shard(
            shard.file,
            [
                (info.name, stored if is_float(info.dtype) else info.dtype, info.shape)
                for info in shard.tensors
            ],
            shard.metadata,
        )
        for shard in member.shards
    ]
    member.headers = {s.file: old[s.file] for s in member.shards if s.header != old[s.file]}
    source = member.source
    if "config.json" in source.side_files:
        config = load_json(source.root / "config.json")
        if _set_dtype(config, dtype):
            member.files["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    for name in [*source.side_files, *source.generated]:
        if not name.endswith(".safetensors.index.json") or "/" in name:
            continue
        data = source.generated.get(name)
        index = load_json(source.root / name) if data is None else json.loads(data)
        if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
            total = sum(info.nbytes for shard in member.shards for info in shard.tensors)
            index["metadata"]["total_size"] = total
            member.files[name] = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
    for name in member.files:
        member.originals[name] = source.generated.get(name) or (source.root / name).read_bytes()


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    changed = False
    for name, value in config.items():
        if name in ("dtype", "torch_dtype") and isinstance(value, str) and value != dtype:
            config[name] = dtype
            changed = True
        elif isinstance(value, dict):
            changed |= _set_dtype(value, dtype)
    return changed
