"""The configuration of an audit: one YAML file, read and checked before any work, with every error at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from ..checkpoint.files import open_regular
from ..checkpoint.problems import Problems, quoted
from ..errors import InputError
from ..options import SEEDS
from ..tasks.fields import Fields, Function, TaskFields
from ..tasks.parsing import try_fields
from .rows import LEVELS

ROLES = ("base", "protected", "plain")  # of models; others are called by their task
RELEASE = "release "  # what further releases of the protected model are called, before their number
# What tasks cannot be called: models that are no task's go by these names, here or among an attack's models.
RESERVED = (*ROLES, "partner", "")
MOST_BYTES = 1 << 20
TAUGHT = 2  # levels from here on are of thieves with data


class ProtectedFields(Fields):
    """The model that is audited.

    model: as it is released, locked or hardened. plain: the same fine-tune without protection; for a hardened
    one, a control that was trained as long. task: what it is for. releases: further releases of it, which
    thieves may bring together.
    """

    model: str
    plain: str
    task: str
    releases: tuple[str, ...] = ()


class AuditFields(Fields):
    """An audit.

    base: the model that all were fine-tuned from. others: the thief's own fine-tunes by their task. private:
    beginnings of the names of tensors that belong to a task alone and are never merged; `auto`: the heads of
    classifiers. levels: of access. attacks: only these of the suite. seed: of everything random. device: "cpu",
    "cuda" or "auto".
    """

    version: Literal[1]
    base: str
    protected: ProtectedFields
    others: Annotated[dict[str, str], Field(min_length=1)]
    tasks: dict[str, TaskFields]
    private: Literal["auto"] | tuple[str, ...] = "auto"
    levels: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1)
    attacks: tuple[str, ...] | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = 0
    device: str = "auto"


class Config:
    """A configuration that was read: its fields, and the folder that its paths are relative to."""

    def __init__(self, fields: AuditFields, folder: Path, where: Path) -> None:
        self.fields, self.folder, self.where = fields, folder, where

    def path(self, written: str) -> Path:
        """A path as it is written in the file."""
        return self.folder / os.path.expanduser(written)

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks that models are scored on, the protected one first."""
        return (self.fields.protected.task, *self.fields.others)

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of access, each once, from the lowest."""
        return tuple(sorted(set(self.fields.levels)))

    @property
    def top(self) -> int:
        """The highest level of access."""
        return self.levels[-1]

    def models(self) -> Iterator[tuple[str, str]]:
        """What every model is for, and its path as written: "base", "protected", "plain", then the others."""
        fields = self.fields
        yield "base", fields.base
        yield "protected", fields.protected.model
        yield "plain", fields.protected.plain
        yield from fields.others.items()
        for number, release in enumerate(fields.protected.releases, 2):
            yield f"{RELEASE}{number}", release


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read a configuration.

    Raises:
        InputError: not YAML, or anything in it that cannot be, all at once.
    """
    where = Path(path)
    return make_config(_load(where), where.parent, where)


def make_config(data: Any, folder: Path, where: Path) -> Config:
    """A configuration from what a YAML file holds.

    Raises:
        InputError: as `read_config`.
    """
    if not isinstance(data, dict):
        raise InputError("the configuration is no mapping", where=where, got=type(data).__name__)
    problems = Problems(where)
    fields = try_fields(AuditFields, data, str(where), problems)
    _check_models(data, folder, problems)
    if fields is not None:
        config = Config(fields, folder, where)
        _check_names(config, problems)
        _check_attacks(config, problems)
        _check_data(config, problems)
    problems.raise_any()
    return config


def _load(where: Path) -> Any:
    fd = open_regular(where)
    with os.fdopen(fd, "rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise InputError("too large for a configuration", where=where, expected=f"at most {MOST_BYTES} bytes")
    try:
        return yaml.load(text, _Loader)
    except Exception as error:
        # PyYAML lets some of what its constructors meet through: KeyError, TypeError, …
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError("the configuration is not YAML", where=where, got=said) from None


class _Loader(yaml.SafeLoader):
    """YAML as it is defined: of two entries of one name, the first would go unnoticed."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the name {quoted(key.value)} stands here twice"
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check_names(config: Config, problems: Problems) -> None:
    fields = config.fields
    for level in sorted(set(fields.levels)):
        if level not in LEVELS:
            expected = ", ".join(f"{number} ({text})" for number, text in LEVELS.items())
            problems.add("no such level of access", where="levels", expected=expected, got=level)
    wanted = {"protected.task": fields.protected.task, **{f"others.{task}": task for task in fields.others}}
    for place, task in wanted.items():
        if task not in fields.tasks:
            expected = ", ".join(fields.tasks) or "tasks: with an entry for it"
            problems.add("no such task", where=place, expected=expected, got=task)
    if fields.protected.task in fields.others:
        problems.add(
            "the protected task is also one of the thief's own", where=f"others.{fields.protected.task}"
        )
    for task in config.tasks:
        if task in RESERVED or task.startswith(RELEASE):  # models go by their task: these are others' names
            expected = f"a name that is none of {', '.join(filter(None, RESERVED))}"
            problems.add("a task cannot be called so", where=f"tasks.{task}", expected=expected, got=task)
    for task in fields.tasks:
        if task not in config.tasks:
            problems.add("a task without a model", where=f"tasks.{task}", hint="give its fine-tune in others")


def _check_attacks(config: Config, problems: Problems) -> None:
    """Names that the suite lacks, a device that is not there, levels whose thieves have nothing to learn from."""
    from ..attacks.prepare import COLLUSIONS
    from .bench import pick_device
    from .suite import access, names

    known, releases = names(), config.fields.protected.releases
    if config.fields.attacks is not None and not config.fields.attacks:
        problems.add("no attacks are named", where="attacks", hint="leave it out for the whole suite")
    if not releases and (alone := [name for name in config.fields.attacks or () if name in COLLUSIONS]):
        hint = "name them in protected.releases, or leave it out"
        problems.add(
            "an attack by two releases of the protected model", where="attacks", got=alone[0], hint=hint
        )
    if beyond := [
        name for name in config.fields.attacks or () if name in known and access(name) > max(config.levels)
    ]:
        expected = f"levels: [{access(beyond[0])}] or above"
        problems.add(
            "an attack of a level that is not audited", where="attacks", expected=expected, got=beyond[0]
        )
    if unknown := [name for name in config.fields.attacks or () if name not in known]:
        expected, got = ", ".join(known), ", ".join(unknown)
        problems.add("the suite has no such attacks", where="attacks", expected=expected, got=got)
    with problems.collect():
        pick_device(config.fields.device)
    taught = ", ".join(str(level) for level in config.levels if level in LEVELS and level >= TAUGHT)
    for name, task in config.fields.tasks.items():
        if taught and name in config.tasks and getattr(task, "train", task) is None:
            problems.add(
                "no examples for a thief to learn from",
                where=f"tasks.{name}.train",
                expected=f"data that is not scored on, for thieves of level {taught}",
                hint="give the task `train:`, or leave these levels out",
            )


def _check_models(data: Mapping[str, Any], folder: Path, problems: Problems) -> None:
    """Models that are not there, as far as the fields can be read, whatever else is wrong."""
    protected = data.get("protected")
    others = data.get("others")
    written = {"base": data.get("base")}
    if isinstance(protected, dict):
        written |= {f"protected.{name}": protected.get(name) for name in ("model", "plain")}
        releases = protected.get("releases")
        if isinstance(releases, list | tuple):
            written |= {f"protected.releases[{number}]": one for number, one in enumerate(releases)}
    if isinstance(others, dict):
        written |= {f"others.{task}": path for task, path in others.items()}
    for place, path in written.items():
        if isinstance(path, str) and not _there(folder / os.path.expanduser(path)):
            problems.add("no such model", where=place, got=path)


def _there(path: Path) -> bool:
    """Whether there is such a file or folder; one that cannot be asked for, of a name too long perhaps, is not."""
    try:
        return path.exists()
    except OSError:
        return False


def _check_data(config: Config, problems: Problems) -> None:
    for name, task in config.fields.tasks.items():
        train = getattr(task, "train", None)
        written = {"data": getattr(task, "data", None), "train.data": getattr(train, "data", None)}
        if isinstance(task, Function) and ".py:" in task.function:
            written["function"] = task.function.rpartition(":")[0]
        for place, path in written.items():
            if path is not None and not _there(config.path(path)):
                problems.add("no such file or folder", where=f"tasks.{name}.{place}", got=path)
