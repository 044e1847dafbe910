'''A task that a function of the user's own scores: whatever a model makes, it says how good it is.

The function is called as name(model, indices, **options) and gives one number for each index, higher is better.
It must give the same numbers for the same model every time, so what it draws is seeded by the index. Similarity
of text and image, for a pipeline that is reached from the module at hand:

    # hook.py, in a configuration: {kind: python, function: "hook.py:similarity", examples: 200}
    import torch

    PROMPTS = open("prompts.txt").read().splitlines()

    def similarity(model, indices, judge="a-text-image-model"):
        """Cosine of each prompt and the image that the model draws for it."""
        scores = []
        for index in indices:
            noise = torch.Generator().manual_seed(index)
            image = draw(model, PROMPTS[index], noise)
            scores.append(float(cosine(judge, PROMPTS[index], image)))
        return scores
'''

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..checkpoint.files import require_regular
from ..errors import InputError, RunError, UnmergeableError
from .fields import Function, parse_fields
from .sources import first_line
from .task import Floats, Task, finite

SCREEN = 64


@dataclass(frozen=True)
class FunctionTask(Task):
    """A task that a function scores.

    Attributes:
        function: called as function(model, indices, **options).
        source: what the configuration calls it, for messages.
        examples: how many there are.
    """

    complete: ClassVar[bool] = False

    name: str
    kind: str
    metric: str
    digest: str
    screen: int
    function: Callable[..., Any]
    source: str
    examples: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.examples

    def score(self, module: torch.nn.Module, index: Sequence[int]) -> Floats:
        wanted = [int(each) for each in index]
        outside = [each for each in wanted if not 0 <= each < self.examples]
        if outside:
            raise InputError(
                "no such example", where=self.name, expected=f"0 to {self.examples - 1}", got=outside[0]
            )
        if not wanted:
            return np.empty(0)
        try:
            with torch.no_grad():
                found = self.function(module, list(wanted), **self.options)
        except UnmergeableError:
            raise
        except Exception as error:
            raise RunError("the function failed", where=self.source, got=first_line(error)) from error
        return finite(self._numbers(found, len(wanted)), self.name)

    def _numbers(self, found: Any, count: int) -> Floats:
        """What came back as (n,) float64."""
        expected = f"{count} numbers, one for each index"
        if isinstance(found, torch.Tensor):
            found = found.detach().cpu().double().numpy()
        try:
            scores = np.asarray(list(found) if not isinstance(found, np.ndarray) else found)
        except (TypeError, ValueError, RuntimeError) as error:
            got = type(found).__name__
            raise RunError(
                "the function gives no numbers", where=self.source, expected=expected, got=got
            ) from error
        if scores.dtype.kind not in "fiub" or scores.shape != (count,):
            got = f"{scores.dtype} of shape {scores.shape}"
            raise RunError("the function gives something else", where=self.source, expected=expected, got=got)
        return scores.astype(np.float64)


def read(name: str, fields: Mapping[str, Any], *, folder: Path, model: Path) -> FunctionTask:
    """Open a task that a function scores; see `tasks.open_task`.

    A file is run as it lies there, by itself: it can import what is installed. Its digest covers the file or the
    module that the function is in, its options and the number of examples, and nothing that it reads or imports:
    an audit sees by the scores of its models whether that is another than before.
    """
    where = f"task {name}"
    given = parse_fields(Function, fields, where)
    place, _, attribute = given.function.rpartition(":")
    module, content = _from_file(folder / place) if place.endswith(".py") else _from_module(place, where)
    function = getattr(module, attribute, None)
    if not callable(function):
        some = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        got = "nothing" if function is None else type(function).__name__
        expected = f"a function {attribute}" + (f", there are {', '.join(some[:6])}" if some else "")
        raise InputError("no such function", where=f"{where}: {given.function}", expected=expected, got=got)
    text = json.dumps([given.function, given.examples, given.metric, given.options], sort_keys=True)
    return FunctionTask(
        name=name,
        kind=given.kind,
        metric=given.metric,
        digest=hashlib.sha256(text.encode() + b"|" + content).hexdigest(),
        screen=min(SCREEN, given.examples),
        function=function,
        source=given.function,
        examples=given.examples,
        options=dict(given.options),
    )


def _from_file(path: Path) -> tuple[Any, bytes]:
    """Runs a file as a module; returns it and the bytes that were run."""
    require_regular(path)
    content = path.read_bytes()
    resolved = path.resolve()
    # A name for each file and content: an older one that is still in use is left alone.
    label = hashlib.sha256(str(resolved).encode() + b"|" + content).hexdigest()[:16]
    name = f"unmergeable_function_{label}"
    if name in sys.modules:
        return sys.modules[name], content
    loader = SourceFileLoader(name, str(resolved))
    spec = importlib.util.spec_from_file_location(name, resolved, loader=loader)
    if spec is None:
        raise InputError("not a file that Python can run", where=path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses, and pickles of its objects, look it up
    try:
        # From the bytes at hand: no stale bytecode is read, and none is left beside the file.
        exec(loader.source_to_code(content, str(resolved)), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, (Exception, SystemExit)):
            raise
        raise InputError("the file of the function fails", where=path, got=first_line(error)) from error
    return module, content


def _from_module(name: str, where: str) -> tuple[Any, bytes]:
    """An importable module, and the bytes of its file if it has one."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        hint = 'a file is written as "file.py:name"'
        raise InputError(
            "the module of the function cannot be imported",
            where=f"{where}: {name}",
            got=first_line(error),
            hint=hint if isinstance(error, ImportError) else None,
        ) from error
    file = getattr(module, "__file__", None)
    return module, Path(file).read_bytes() if file is not None and Path(file).is_file() else b""
