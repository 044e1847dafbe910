"""Merges as checkpoints: the layout, dtypes and other files of one model, with merged tensors in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import (
    BITS,
    MANIFEST,
    SIDECAR,
    Checkpoint,
    ShardWriter,
    StagedFile,
    Staging,
    TensorInfo,
    check_destination,
    copy_side_files,
    open_checkpoint,
)
from ..checkpoint.problems import Problems
from ..errors import ClaimError, InputError, UsageError
from ..options import check_seed
from ..stock import quiet
from . import MergeResult, merge
from .check import BASE, Facts
from .kit import TABLE
from .names import as_stored, leftovers, once, ties, today
from .tensors import distance, load_state, read_tensor, rename_like
from .vectors import is_adapter, load_model

if TYPE_CHECKING:
    from . import State

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
Progress = Callable[[int, int, str], None]
# Further than this from its base is no fine-tune of it, or one that is locked.
FAR = 0.7


@dataclass(frozen=True)
class MergeReport:
    """What was merged and written; `as_dict` is the JSON document.

    Attributes:
        models, base, method, options, seed: how to do it again.
        dst, template: what was written, and the model whose configuration and layout it has.
        distances: of every model to the base, ‖model − base‖ / ‖base‖.
        facts: whether it is a merge at all.
        notes: what the user should know.
    """

    models: tuple[str, ...]
    base: str | None
    method: str
    options: Mapping[str, Any]
    seed: int
    dst: str
    template: str
    distances: Mapping[str, float]
    facts: Facts
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "document": "unmergeable.merge-plain",
            "version": 1,
            "models": list(self.models),
            "base": self.base,
            "method": self.method,
            "options": _plain(self.options),
            "seed": self.seed,
            "dst": self.dst,
            "template": self.template,
            "distances": dict(self.distances),
            "facts": self.facts.as_dict(),
            "notes": list(self.notes),
        }


def merge_checkpoints(
    method: str,
    models: Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str] | None,
    dst: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    *,
    template: str | os.PathLike[str] | None = None,
    must_mix: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge checkpoints (or LoRA adapters of the base) into a checkpoint that stock loaders open.

    Args:
        method: one of `merging.METHODS`.
        models: folders or .safetensors files; they are called by the last part of their path in options.
        base: what they were fine-tuned from; without it, for methods that have none, the first model gives
            names and dtypes.
        dst: the new folder or file; it appears whole or not at all.
        options: the method's own.
        seed: of methods that draw.
        template: the model whose configuration, dtypes and private tensors (head) the result gets: one of
            the models, or the base, which it is by default.
        must_mix: refuse a result that is not a merge of the models; it is only noted otherwise.
        progress: called with steps done, steps in all, and a label: models read, the merge, the file.

    Raises:
        UsageError: no such method or option, a template that is none of them, a method that needs a base.
        InputError: models that do not fit together, a destination that exists.
        ClaimError: with `must_mix`, what is wrong with the result.
        RunError: the disk is full or fails. Nothing is left at DST in any of these cases.
    """
    if not models:
        raise UsageError("nothing to merge", hint="name at least one model")
    check_seed(seed)
    names = model_names(models)
    known = TABLE.get(method.removeprefix("mergekit:"))
    if base is None and (known is None or known.base not in ("none", "pair", "optional")):
        raise UsageError(f"{method} needs the base that the models were fine-tuned from", hint="give --base")
    if base is None and (adapters := [path for path in models if is_adapter(path)]):
        raise InputError("an adapter needs its base", where=adapters[0], hint="give --base")
    like = Path(template if template is not None else base if base is not None else models[0])
    if template is not None and is_adapter(like):
        raise UsageError(
            "an adapter has no files that a merge could be written as", where=like, hint="give its base"
        )
    if is_adapter(like) and base is not None:
        like = Path(base)
    with open_checkpoint(like) as checkpoint:
        check_destination(checkpoint.root, dst, checkpoint.nbytes)
        stored = list(checkpoint.tensors)
    for path in (*models, *([] if base is None else [base])):
        if os.path.exists(path):
            check_destination(path, dst, 0)
    chosen = next((name for name, path in names.items() if _same(path, like)), None)
    if chosen is None and not (base is not None and _same(base, like)):
        expected = ", ".join(map(str, [*models, *([] if base is None else [base])]))
        raise UsageError("the template is none of the models", where=like, expected=expected)
    tell, steps = progress or (lambda done, total, label: None), len(names) + 2
    tell(0, steps, str(base if base is not None else models[0]))
    reference = base if base is not None else models[0]
    origin: State = load_state(reference)
    read: dict[str, State] = {}
    if base is not None and chosen is not None:
        read[chosen] = load_model(names[chosen], origin, folder=base)
        origin = _widened(origin, read[chosen])
    # An adapter in a base of few bits would be rounded before it is merged.
    exact = _in_float32(origin) if any(map(is_adapter, models)) else origin
    states: dict[str, State] = {}
    for name, path in names.items():
        tell(len(states), steps, str(path))
        like_base = exact if is_adapter(path) else origin
        states[name] = read[name] if name in read else load_model(path, like_base, folder=base)
    origin, states = today(reference, origin, names, states)
    single, tied = once(
        ties(like, {*origin, *(name for one in states.values() for name in one)}), {"": origin, **states}
    )
    origin, states = single.pop(""), single
    settings = dict(options or {})
    if base is None and known is not None and known.base == "optional":
        settings.setdefault("with_base", False)
    tell(steps - 2, steps, method)
    result = merge(method, origin, states, seed=seed, **settings)
    if base is None:
        result = replace(result, facts=_from_first(result.facts, next(iter(names))))
    if must_mix and not result.facts.is_mix:
        raise ClaimError(
            "the result is not a merge of the models",
            where=method,
            got="; ".join(_problems(result.facts, base is None)),
            hint="nothing was written; --force writes it as it is",
        )
    distances = {} if base is None else {name: distance(origin, state) for name, state in states.items()}
    merged = dict(result.tensors) if chosen is None else result.for_task(chosen)
    merged, beside = as_stored(merged, tied, stored)
    tell(steps - 1, steps, str(dst))
    write_merged(dst, merged, like)
    tell(steps, steps, str(dst))
    return MergeReport(
        models=tuple(str(path) for path in models),
        base=None if base is None else str(base),
        method=method,
        options=settings,
        seed=seed,
        dst=str(dst),
        template=str(like),
        distances=distances,
        facts=result.facts,
        notes=(*_notes(result, names, distances, chosen), *beside),
    )


def _in_float32(state: State) -> State:
    return {name: one.float() if one.is_floating_point() else one for name, one in state.items()}


def _widened(origin: State, template: State) -> State:
    """The base in the template's dtypes where those hold more: a merge is in its base's, and is rounded once."""
    return {
        name: one.to(torch.promote_types(one.dtype, template[name].dtype))
        if name in template and one.is_floating_point() and template[name].is_floating_point()
        else one
        for name, one in origin.items()
    }


def write_merged(dst: str | os.PathLike[str], tensors: State, template: str | os.PathLike[str]) -> None:
    """Write tensors as a checkpoint with the files, shards, order and dtypes of another one.

    Names that differ from the template's by a leading component are followed; tensors that it does not have
    are refused, and so is one that is missing. A manifest of a lock is left behind: it is about other weights.

    Args:
        dst: the new folder or file.
        tensors: by name.
        template: the checkpoint that is followed.

    Raises:
        InputError: names or shapes that are not the template's, all at once; a destination that exists.
        RunError: the disk is full or fails. Nothing is left at DST.
    """
    target = Path(dst)
    with open_checkpoint(template) as like:
        check_destination(like.root, target, like.nbytes)
        found = _fitted(tensors, like)
        staging: AbstractContextManager[Staging] = StagedFile(target) if like.single_file else Staging(target)
        with staging as staged:
            if not like.single_file:
                side = [name for name in like.side_files if name != MANIFEST]
                copy_side_files(like.root, side, like.side_folders, like.generated, staged.path)
            for shard in like.shards:
                path = staged.path if like.single_file else staged.path / shard.file
                with ShardWriter(path, shard.header, shard.size) as writer:
                    for info in shard.tensors:
                        writer.write_at(info.start, to_bytes(found[info.name], info))
            staged.commit()


def saved_state(module: Any, folder: Path, like: Path) -> State:
    """A module's tensors by the names of files, which are not those in memory: as its class saves them, in `folder`.

    A class saves tensors that are tied once; those that the checkpoint `like` stores twice are here twice as well.
    """
    with quiet():
        module.save_pretrained(folder)
    saved, held = load_state(folder), module.state_dict()
    with open_checkpoint(like) as source:
        again = [name for name in source.tensors if name not in saved and name in held]
    return {**saved, **{name: held[name].detach().cpu() for name in again}}


def to_bytes(tensor: torch.Tensor, info: TensorInfo) -> memoryview:
    """A tensor as the bytes of a safetensors dtype, rounded once to nearest even.

    Raises:
        InputError: numbers that the dtype cannot hold.
    """
    plain = tensor.detach().to("cpu")
    dtype = FLOATS.get(info.dtype)
    if dtype is not None:
        rounded = plain.to(dtype)
        if bool(torch.isinf(rounded).any()) and not bool(torch.isinf(plain).any()):
            got = f"{float(plain.abs().max()):.3g}"
            hint = "use a template in a wider dtype"
            raise InputError(
                "numbers beyond the dtype", where=info.name, expected=info.dtype, got=got, hint=hint
            )
        plain = rounded
    elif plain.is_floating_point() or plain.element_size() * 8 != BITS[info.dtype]:
        got = str(plain.dtype)
        raise InputError("a tensor has another dtype", where=info.name, expected=info.dtype, got=got)
    return plain.contiguous().flatten().view(torch.uint8).numpy().data


def _fitted(tensors: State, like: Checkpoint) -> State:
    """The tensors under the template's names."""
    found, _ = rename_like(like.tensors, tensors)
    if missing := like.tensors.keys() - found.keys():
        # Buffers of earlier versions, which its class does not read: as they are.
        found |= {name: read_tensor(like, name) for name in missing & leftovers(like.root, like.tensors)}
    problems = Problems("the merge does not fit the template")
    for name in sorted(like.tensors.keys() - found.keys()):
        problems.add("a tensor is missing", where=name)
    for name in sorted(found.keys() - like.tensors.keys()):
        problems.add("the template has no such tensor", where=name)
    for name, info in like.tensors.items():
        if name in found and tuple(found[name].shape) != info.shape:
            problems.add(
                "a tensor has another shape",
                where=name,
                expected=list(info.shape),
                got=list(found[name].shape),
            )
    problems.raise_any()
    return found


def model_names(models: Sequence[str | os.PathLike[str]]) -> dict[str, str | os.PathLike[str]]:
    """Models by the last part of their paths; a second one of a name gets its number."""
    names: dict[str, str | os.PathLike[str]] = {}
    for path in models:
        stem = Path(os.path.abspath(path)).name.removesuffix(".safetensors")
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names[name] = path
    return names


def _same(one: str | os.PathLike[str], two: str | os.PathLike[str]) -> bool:
    return os.path.exists(one) and os.path.samefile(one, two)


def _from_first(facts: Facts, first: str) -> Facts:
    """The facts of a merge without a base, for which the first model stood in.

    Its difference to itself is zero: its share is what the others leave of one, and it is no part of the mean
    distance that `moved` is measured in.
    """
    rest = sum(share for name, share in facts.shares.items() if name != first)
    stands = {} if BASE in facts.shares else {BASE: first}
    copies = {stands.get(name, name): found for name, found in facts.copies.items()}
    moved = facts.moved * (1 - 1 / len(facts.shares))
    return replace(facts, shares={**facts.shares, first: 1 - rest}, copies=copies, moved=moved)


def _problems(facts: Facts, baseless: bool) -> list[str]:
    return ["the models do not differ"] if baseless and not facts.tensors else facts.problems


def _notes(
    result: MergeResult,
    names: Mapping[str, str | os.PathLike[str]],
    distances: Mapping[str, float],
    chosen: str | None,
) -> tuple[str, ...]:
    facts = result.facts
    notes = [f"not a merge: {problem}" for problem in _problems(facts, not distances)]
    if facts.near_base and facts.tensors:
        origin = "the base" if distances else "the first model"
        notes.append(f"the merge is near {origin}: it moved {facts.moved:.2f} of the mean distance from it")
    notes += [f"{name} takes no part in the merge" for name in facts.left_out if facts.tensors]
    locked = {name for name, path in names.items() if _locked(Path(path))}
    for name in names:
        if name in locked:
            notes.append(
                f"{name} is locked and was merged as it is: with its key, `merge -k` undoes the lock first"
            )
    for name, far in distances.items():
        if far > FAR and name not in locked:
            notes.append(f"{name} is {far:.2f} of the base's norm away from it: locked, or not its fine-tune")
    for name, private in result.private.items():
        if private and name != chosen:
            notes.append(f"{len(private)} tensors are private to {name} and were left out")
    return tuple(notes)


def _locked(path: Path) -> bool:
    """Whether the manifest of a lock lies beside a model."""
    return (path / MANIFEST if path.is_dir() else path.with_name(path.name + SIDECAR)).exists()


def _plain(value: object) -> Any:
    """An option as JSON: what is no number, word or list of them is named by its type."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, str | int | float) else type(value).__name__
