"""Which files of a folder are the weights, and whether they agree with their index."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .files import Tree, load_json, safe_name
from .header import Shard
from .problems import Problems, quoted

_STEM = r"(model|diffusion_pytorch_model)"
_ONE = re.compile(_STEM + r"(\.[\w-]+)?\.safetensors")
_INDEX = re.compile(_STEM + r"\.safetensors\.index(\.[\w-]+)?\.json")
_PICKLE = re.compile(r"(pytorch_model|diffusion_pytorch_model)(\.[\w-]+)?\.bin")
_PICKLE_INDEX = re.compile(r"(pytorch_model|diffusion_pytorch_model)\.bin\.index(\.[\w-]+)?\.json")


@dataclass(frozen=True)
class Layout:
    """The weights of a folder.

    files: names of the shards, sorted. index: name of the index file, if sharded. weight_map: what it says,
    tensor to file. pickled: the shards are torch pickles.
    """

    files: list[str]
    index: str | None
    weight_map: dict[str, str] | None
    pickled: bool


def find_weights(root: Path, tree: Tree) -> Layout:
    """Decides as a stock loader does which files are the weights: safetensors before pickle.

    Raises:
        InputError: no weights, more than one set of them, an index that is not valid or names a file outside
        the
            folder, missing shards (all at once).
    """
    for one, many, pickled in ((_ONE, _INDEX, False), (_PICKLE, _PICKLE_INDEX, True)):
        indexes = [name for name in tree.top if many.fullmatch(name)]
        if pickled:  # an index left behind from another format is not a checkpoint
            indexes = [name for name in indexes if any(file.endswith(".bin") for file in tree.top)]
        singles = [
            name for name in tree.top if one.fullmatch(name) and not re.search(r"-\d{5}-of-\d{5}", name)
        ]
        if len(indexes) > 1 or (not indexes and len(singles) > 1):
            hint = "keep one of them and move the others out of the folder"
            raise InputError(
                "more than one set of weights", where=root, got=", ".join(indexes or singles), hint=hint
            )
        if indexes:
            return _sharded(root, tree, indexes[0], ".bin" if pickled else ".safetensors", pickled)
        if singles:
            return Layout(singles, None, None, pickled)
    raise _no_weights(root, tree)


def _sharded(root: Path, tree: Tree, index: str, suffix: str, pickled: bool) -> Layout:
    weight_map = load_json(root / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("the index has no weight_map", where=root / index)
    problems = Problems(root / index)
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        if not safe_name(file) or not file.endswith(suffix):
            hint = f"an index names {suffix} files of its own folder"
            problems.add("the index names a file that it may not", got=quoted(file), hint=hint)
        elif file not in tree.files:
            problems.add("a shard is missing", where=root / file, hint="download the checkpoint again")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            problems.add(
                "the index names something that is not a file", got=f"{quoted(name)}: {type(file).__name__}"
            )
    problems.raise_any()
    return Layout(files, index, weight_map, pickled)


def _no_weights(root: Path, tree: Tree) -> InputError:
    if any(name.endswith(".gguf") for name in tree.files):
        hint = "lock the safetensors checkpoint that it was made from, then convert the locked one to GGUF"
        return InputError("GGUF files cannot be locked", where=root, hint=hint)
    others = [name for name in tree.files if name.endswith((".safetensors", ".bin"))]
    if any(re.search(r"-\d{5}-of-\d{5}\.", name) and "/" not in name for name in others):
        hint = "the checkpoint is sharded and model.safetensors.index.json is missing; download it again"
        return InputError("shards without their index", where=root, got=", ".join(others[:3]), hint=hint)
    if others:
        got = ", ".join(others[:3])
        hint = (
            "a loader wants model.safetensors or its index; pass the file or subfolder if that is the model"
        )
        return InputError("no weights under a name that a loader looks for", where=root, got=got, hint=hint)
    hint = "pass a folder that save_pretrained wrote, or a .safetensors file"
    return InputError("no weights here", where=root, expected="model.safetensors or its index", hint=hint)


def check_index(root: Path, layout: Layout, shards: Iterable[Shard]) -> None:
    """Checks that the headers hold exactly what the index says, each tensor once.

    Raises:
        InputError: all missing, unexpected, misplaced and duplicate tensors at once.
    """
    problems = Problems(root / layout.index if layout.index else root)
    home: dict[str, str] = {}
    for shard in shards:
        for info in shard.tensors:
            if info.name in home:
                problems.add(
                    f"tensor {quoted(info.name)} is in two shards", got=f"{home[info.name]}, {shard.file}"
                )
            home[info.name] = shard.file
    if layout.weight_map is not None:
        for name, file in layout.weight_map.items():
            if name not in home:
                problems.add(f"tensor {quoted(name)} of the index is missing", where=root / file)
            elif home[name] != file:
                problems.add(f"tensor {quoted(name)} is in another shard", expected=file, got=home[name])
        for name in sorted(home.keys() - layout.weight_map.keys()):
            problems.add(f"tensor {quoted(name)} is not in the index", got=home[name])
    problems.raise_any()
