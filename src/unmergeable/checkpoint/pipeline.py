"""A diffusers pipeline: a folder with model_index.json and one subfolder a component."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from . import formats
from .files import load_json, safe_name, walk
from .problems import Problems, quoted

INDEX = "model_index.json"


@dataclass(frozen=True)
class Component:
    """One subfolder of a pipeline; with weights it is a checkpoint, without it is copied as it is."""

    name: str
    has_weights: bool


@dataclass(frozen=True)
class Pipeline:
    """A pipeline folder: its components in index order, and every file outside of those with weights.

    side_files, side_folders: relative, sorted; they include the components without weights.
    """

    root: Path
    components: list[Component]
    side_files: list[str]
    side_folders: list[str]
    side_bytes: int
    manifest_path: Path | None


def is_pipeline(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has a model_index.json."""
    return os.path.lexists(Path(path) / INDEX)


def components(path: str | os.PathLike[str]) -> list[Component]:
    """The components of a pipeline folder. Raises as `open_pipeline`."""
    return open_pipeline(path).components


def open_pipeline(path: str | os.PathLike[str]) -> Pipeline:
    """Reads the index of a pipeline folder and looks for the weights of each component.

    Raises:
        InputError: an index that is not valid or names a component outside the folder, missing components,
            weights outside of the components, and whatever `walk` refuses.
    """
    root = Path(path)
    tree = walk(root)
    names = _names(root)
    problems = Problems(root)
    found = []
    for name in names:
        if name not in tree.folders:
            problems.add("a component is missing", where=root / name, hint="download the pipeline again")
        inside = [file for file in tree.files if file.startswith(f"{name}/")]
        found.append(Component(name, any(file.endswith((".safetensors", ".bin")) for file in inside)))
    problems.raise_any()
    with_weights = tuple(f"{component.name}/" for component in found if component.has_weights)
    used = {file for file in tree.files if file.startswith(with_weights)} if with_weights else set()
    formats.refuse_strays(root, tree, used)
    side = [file for file in tree.files if file not in used and file != formats.MANIFEST]
    folders = [f for f in tree.folders if not (with_weights and f"{f}/".startswith(with_weights))]
    manifest = root / formats.MANIFEST if formats.MANIFEST in tree.files else None
    return Pipeline(root, found, side, folders, sum(tree.files[file] for file in side), manifest)


def _names(root: Path) -> list[str]:
    """The components in the index: `"vae": ["diffusers", "AutoencoderKL"]`, nulls for an absent one."""
    names = []
    for name, value in load_json(root / INDEX).items():
        if name.startswith("_") or not isinstance(value, list) or not any(value):
            continue
        if not safe_name(name):
            raise InputError(
                "the index names a component that it may not", where=root / INDEX, got=quoted(name)
            )
        names.append(name)
    if not names:
        raise InputError("the index names no components", where=root / INDEX)
    return names
