"""Find the proven spec of a checkpoint: shipped, cached, or proven now.

Shipped specs are data of the package, one file a family, written by `bench/make_specs.py`. Proven ones are kept
in the user's cache, keyed by what they depend on: the structure of the config, the class and its source, and
the versions that ran the proof. Looking one up imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import metadata, resources, util
from pathlib import Path
from typing import Any

from ..config import canonical_config, structure
from ..errors import Contradiction, InputError
from ..match import Shapes, match_spec
from ..spec import Spec
from .guards import check_agrees, check_own_code, note_unread, spare_named_heads

Found = tuple[Spec, dict[str, Any]]
ANY: Mapping[str, Any] = {}  # among the configurations of a spec that is for every one


def find_spec(
    config: Mapping[str, Any] | None,
    shapes: Shapes,
    *,
    spec_file: str | os.PathLike[str] | None = None,
    prove: bool = True,
    where: str = "checkpoint",
) -> Found:
    """The spec of a checkpoint, and its config in canonical form.

    A shipped or cached spec is taken only if every field of the config that is neither a size nor inert has the
    value that was proven, and every tensor has the name and shape that it expects. Else it is proven.

    Args:
        config: the content of config.json.
        shapes: every tensor of the checkpoint by name.
        spec_file: take this spec instead; its structure must fit all the same.
        prove: whether to prove a spec where none is known; this needs transformers.

    Raises:
        Contradiction: the tensors are not what the config says, or the config says two things of the model.
        InputError: no config, no class, nothing proven for it, or not for these names of tensors.
    """
    config = _checked(config, where)
    if spec_file is not None:
        return _from_file(Path(spec_file), config, shapes, where)
    check_own_code(config, where)
    misfits: list[InputError] = []
    for source in (shipped(architecture(config)), cached(architecture(config))):
        if found := _fitting(source, config, shapes, where, misfits):
            return found
    if prove and (found := _fitting(_prove(config, where, misfits), config, shapes, where, misfits)):
        return found
    if misfits:
        raise next((error for error in misfits if isinstance(error, Contradiction)), misfits[0])
    raise _unknown(config, where)


def spec_of(
    spec: Spec | str | os.PathLike[str] | None,
    config: Mapping[str, Any],
    shapes: Shapes,
    generation: Mapping[str, Any],
    where: str,
) -> Found:
    """The spec by which a model is locked, without heads that are called by number, and its canonical config.

    Args:
        spec: one's own, as an object or a file, or None for a shipped or proven one.
        config, shapes, where: as in `find_spec`.
        generation: the content of generation_config.json: heads may be called by their numbers there.

    Raises:
        Contradiction, InputError: as `find_spec` and `given`.
    """
    if isinstance(spec, Spec):
        found, canonical = given(spec, config, shapes, where)
    else:
        found, canonical = find_spec(config, shapes, spec_file=spec, where=where)
    return note_unread(spare_named_heads(found, config, generation), shapes), canonical


def architecture(config: Mapping[str, Any]) -> str:
    """The class that a config names."""
    return str(config["architectures"][0])


@lru_cache(maxsize=1)
def _index() -> dict[str, str]:
    """{class: file of its family}."""
    text = resources.files(__package__).joinpath("index.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def shipped(name: str) -> Iterator[Spec]:
    """The shipped specs of a class, or of all of them for the name ''."""
    files = sorted(set(_index().values())) if not name else filter(None, [_index().get(name)])
    for file in files:
        family = json.loads(resources.files(__package__).joinpath(file).read_text(encoding="utf-8"))
        for entry in family["specs"]:
            for each in (
                entry["architectures"] if not name else [name] if name in entry["architectures"] else []
            ):
                yield unpack(family, entry, each)


def unpack(family: Mapping[str, Any], entry: Mapping[str, Any], name: str) -> Spec:
    """One class's spec from a family file, where classes that differ in their head alone share an entry."""
    data = dict(entry)
    own = data.pop("architectures")[name]
    data |= {"architecture": name, "defaults": family["defaults"][data["defaults"]], **own}
    # one figure for all sites of a class: the worst error, the weakest guard
    data["sites"] = [{**site, "evidence": own["evidence"]["sites"]} for site in data["sites"]]
    return Spec.from_dict(data, f"shipped spec of {name}")


def cache_folder() -> Path:
    """Where proven specs are kept: UNMERGEABLE_CACHE, else the user's cache folder."""
    if own := os.environ.get("UNMERGEABLE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmergeable" / "specs"


def cached(name: str) -> Iterator[Spec]:
    """Specs of a class that were proven on this machine and still hold: same sources, same versions."""
    folder = cache_folder()
    for path in sorted(folder.glob(f"{name}-*.json")) if folder.is_dir() else []:
        try:
            spec = Spec.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
        except (OSError, ValueError, InputError):
            continue  # a damaged entry is proven again
        if _current(spec):
            yield spec


def _current(spec: Spec) -> bool:
    from ..prove.prove import VERSION

    evidence = spec.evidence
    try:
        versions = {name: metadata.version(name).split("+")[0] for name in ("torch", "transformers")}
    except metadata.PackageNotFoundError:
        return False
    return (
        evidence.get("prover") == VERSION
        and all(evidence.get(name) == version for name, version in versions.items())
        and evidence.get("source_sha256") == _source_digest(str(evidence.get("source")))
    )


def _source_digest(module: str) -> str | None:
    """SHA-256 of a transformers module's source, without importing it."""
    top, *path = module.split(".")
    found = util.find_spec(top)
    if found is None or not found.submodule_search_locations:
        return None
    file = Path(found.submodule_search_locations[0]).joinpath(*path).with_suffix(".py")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _keep(specs: Iterable[Spec]) -> None:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for spec in specs:
            path = folder / f"{spec.architecture}-{spec.digest[:24]}.json"
            staged = path.with_suffix(f".{os.getpid()}")
            staged.write_text(json.dumps(spec.as_dict(), indent=1), encoding="utf-8")
            staged.replace(path)
    except OSError:
        return  # the cache is a convenience: without it the proof is run again


def _prove(config: Mapping[str, Any], where: str, misfits: Sequence[InputError]) -> list[Spec]:
    missing = [name for name in ("torch", "transformers") if util.find_spec(name) is None]
    if missing and misfits:
        raise misfits[0]
    if missing:
        error = _unknown(config, where)
        error.hint = f"proving one needs {' and '.join(missing)}: pip install 'unmergeable[prove]'"
        raise error
    from ..prove.prove import prove_specs

    specs = prove_specs(config)
    _keep(specs)
    return specs


def _fitting(
    specs: Iterable[Spec], config: Mapping[str, Any], shapes: Shapes, where: str, misfits: list[InputError]
) -> Found | None:
    for spec in specs:
        canonical = canonical_config(config, spec.defaults)
        if structure(canonical) not in spec.configs:
            continue
        try:
            match_spec(spec, shapes, canonical, where)
        except InputError as error:
            misfits.append(error)
            continue
        check_agrees(spec, config, canonical, where)
        return spec, canonical
    return None


def _from_file(path: Path, config: Mapping[str, Any], shapes: Shapes, where: str) -> Found:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("cannot read the spec", where=path, got=error.strerror) from None
    except ValueError as error:
        raise InputError("the spec is not JSON", where=path, got=str(error)) from None
    return given(Spec.from_dict(data, str(path)), config, shapes, where)


def given(spec: Spec, config: Mapping[str, Any], shapes: Shapes, where: str) -> Found:
    """A spec of one's own, and the config in its spelling, where it is of this configuration.

    Raises:
        InputError: it was proven for another one. Contradiction: config and tensors, or config and class, disagree.
    """
    canonical = canonical_config(config, spec.defaults)
    mine, proven = structure(canonical), dict(spec.configs[0])
    if ANY not in spec.configs and mine not in spec.configs:
        names = sorted(key for key in {*mine, *proven} if mine.get(key) != proven.get(key))
        raise InputError(
            "the spec was proven for another configuration",
            where=where,
            expected=", ".join(f"{name} = {proven.get(name)!r}" for name in names),
            got=", ".join(f"{name} = {mine.get(name)!r}" for name in names),
        )
    match_spec(spec, shapes, canonical, where)
    check_agrees(spec, config, canonical, where)
    return spec, canonical


def _checked(config: Mapping[str, Any] | None, where: str) -> Mapping[str, Any]:
    if config is None:
        raise InputError(
            "there is no config.json, so the architecture is not known",
            where=where,
            hint="give one with --config",
        )
    names = config.get("architectures")
    # A class's name, and no path: specs are looked up by it.
    if (
        not isinstance(names, list)
        or not names
        or not isinstance(names[0], str)
        or not names[0].isidentifier()
    ):
        raise InputError(
            "config.json does not say which class the weights are of",
            where=where,
            expected='architectures, such as ["BertModel"], and model_type',
            got=f"architectures {names!r}, model_type {config.get('model_type')!r}",
            hint="give a full configuration with --config",
        )
    return config


def _unknown(config: Mapping[str, Any], where: str) -> InputError:
    return InputError(
        f"no proven spec for {architecture(config)} with this configuration",
        where=where,
        hint="classes of transformers can be proven; code that comes with a checkpoint is never run",
    )
