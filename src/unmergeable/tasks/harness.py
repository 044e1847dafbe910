"""Tasks of lm-evaluation-harness, scored document by document with the model in memory. Nothing is downloaded.

Its definitions, prompts and metrics are used as they are. What it would draw anew for each run, examples in
prompts above all, is drawn by document, so that a score does not depend on which others are asked for.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint.problems import quoted
from ..errors import InputError, RunError, UnmergeableError
from .fields import Harness, parse_fields
from .isolation import offline, seeded, silent
from .pretrained import read_config, read_tokenizer, tokenizer_digest, without_cache
from .sources import first_line, locate, needed
from .task import Floats, Task, finite

INSTALL = "unmergeable[harness]"
SCREEN = 64
# What a definition says of where its data lie; the data themselves are in the digest.
_PLACES = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")


@dataclass(frozen=True)
class HarnessTask(Task):
    """A task of lm-evaluation-harness.

    Attributes:
        task: its object; its documents are fixed.
        column: the metric as lm-eval calls it; choice: the filter whose answers it is of.
        sign: 1, or -1 where lower is better.
        config, tokenizer: of the task's own fine-tune.
        batch: requests at a time.
    """

    name: str
    kind: str
    metric: str
    digest: str
    screen: int
    task: Any
    documents: int
    column: str
    choice: str
    sign: int
    config: Any
    tokenizer: Any
    batch: int

    def __len__(self) -> int:
        return self.documents

    def score(self, module: torch.nn.Module, index: Sequence[int]) -> Floats:
        wanted = [int(each) for each in index]
        outside = [each for each in wanted if not 0 <= each < self.documents]
        if outside:
            expected = f"0 to {self.documents - 1}"
            raise InputError("no such example", where=self.name, expected=expected, got=outside[0])
        if not wanted:
            return np.empty(0)  # lm-eval takes an empty choice for all of them
        # In order and once: it numbers what it gives back by position in this list.
        entries = self._run(module, sorted(set(wanted)))
        found = {
            int(entry["doc_id"]): self._number(entry) for entry in entries if entry["filter"] == self.choice
        }
        missing = [each for each in wanted if each not in found]
        if missing:
            raise RunError("lm-eval gave no score for a document", where=self.name, got=missing[0])
        return finite(self.sign * np.array([found[each] for each in wanted]), self.name)

    def _run(self, module: torch.nn.Module, documents: list[int]) -> list[dict[str, Any]]:
        """Its samples: a mapping for each document and filter."""
        evaluator = needed("lm_eval.evaluator", INSTALL)
        with silent(), offline(INSTALL), seeded(), _no_nan(module, self.name):
            try:
                label = self.task.task_name  # draws a random number, needed or not
                model = needed("lm_eval.models.huggingface", INSTALL).HFLM(
                    pretrained=_Served(module, self.config), tokenizer=self.tokenizer, batch_size=self.batch
                )
                # Not `simple_evaluate`: that reseeds everything and looks for git, compilers and drivers each time.
                found = evaluator.evaluate(
                    model, {"tasks": {label: self.task}}, samples={label: documents}, bootstrap_iters=0
                )
            except UnmergeableError:
                raise
            except Exception as error:
                raise RunError("lm-eval failed", where=self.name, got=first_line(error)) from error
        samples: list[dict[str, Any]] = found["samples"][label]
        return samples

    def _number(self, entry: Mapping[str, Any]) -> float:
        value = entry.get(self.column)
        if isinstance(value, (bool, int, float, np.integer, np.floating, np.bool_)):
            return float(value)
        got = f"{type(value).__name__}, metrics are {', '.join(entry['metrics'])}"
        what = "a metric that has no number for one document"
        raise InputError(what, where=f"{self.name}: {self.column}", expected="a number", got=got)


def read(name: str, fields: Mapping[str, Any], *, folder: Path, model: Path) -> HarnessTask:
    """Open a task of lm-evaluation-harness; see `tasks.open_task`.

    Raises:
        InputError: lm-eval is not installed, has no such task, or cannot open it without a network; a metric or
            filter that the task has not; a task that samples answers, runs what models write, or takes images.
    """
    where = f"task {name}"
    given = parse_fields(Harness, fields, where)
    needed("lm_eval", INSTALL)
    include = None if given.include is None else locate(folder, given.include, where)
    config, tokenizer = read_config(model), read_tokenizer(model)
    with silent(), offline(INSTALL), seeded():
        try:
            task = _open(given.task, include, where)
            _refuse(task, where)
            _shots(task, given.fewshot, where)
            column, choice, higher = _metric(task, given.metric, where)
            documents = _fix(task, given.limit)
            digest = _digest(task, [given.task, column, choice, given.batch, tokenizer_digest(model)])
        except UnmergeableError:
            raise
        except Exception as error:
            hint = "its data must be on this machine: nothing is downloaded"
            raise InputError(
                "lm-eval cannot open the task",
                where=f"{where}: {given.task}",
                got=first_line(error),
                hint=hint,
            ) from error
    return HarnessTask(
        name=name,
        kind=given.kind,
        metric=given.metric if higher else f"minus {given.metric}",
        digest=digest,
        screen=min(SCREEN, documents),
        task=task,
        documents=documents,
        column=column,
        choice=choice,
        sign=1 if higher else -1,
        config=config,
        tokenizer=tokenizer,
        batch=given.batch,
    )


# --- opening --------------------------------------------------------------------------------------------------


def _open(label: str, include: Path | None, where: str) -> Any:
    """A task by its name: of the included folder, or one that lm-eval comes with."""
    tasks = needed("lm_eval.tasks", INSTALL)
    known: list[str] = []
    for defaults in (True,) if include is None else (False, True):  # its own are thousands, and take seconds
        manager = tasks.TaskManager(
            include_path=None if include is None else str(include), include_defaults=defaults
        )
        if label in manager.all_subtasks:
            found = manager.load([label])["tasks"]
            if len(found) == 1:
                return next(iter(found.values()))
        if label in manager.all_tasks:
            advice = "give each of its tasks its own entry"
            raise InputError("a group of tasks", where=f"{where}: {label}", expected="one task", hint=advice)
        known = manager.all_subtasks
    near = get_close_matches(label, known, n=3)
    hint = "name the folder of your own definitions by include:" if include is None else None
    raise InputError("lm-eval has no such task", where=f"{where}: task", expected=" | ".join(near) or None,
                     got=quoted(label), hint=hint)  # fmt: skip


def _refuse(task: Any, where: str) -> None:
    """What cannot be scored alike twice, or safely."""
    place = f"{where}: {task.task_name}"
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError("a task that runs what a model writes", where=place)
    if getattr(task, "MULTIMODAL", False):
        raise InputError("a task that takes more than text", where=place)
    options = task.get_config("generation_kwargs") if task.OUTPUT_TYPE == "generate_until" else None
    if (options or {}).get("do_sample"):
        what = "a task that samples its answers"
        raise InputError(what, where=place, expected="do_sample: false", got=options)


def _shots(task: Any, fewshot: int | None, where: str) -> None:
    """Examples in prompts: how many, and for one document always the same."""
    own = task.get_config("num_fewshot")
    if own == 0 and fewshot:
        what = "a task that takes no examples in its prompts"
        raise InputError(what, where=f"{where}: fewshot", expected=0, got=fewshot)
    task.set_config(key="num_fewshot", value=own or 0 if fewshot is None else fewshot)
    prompt = task.fewshot_context

    def by_document(doc: Any, *arguments: Any, **options: Any) -> Any:
        # lm-eval draws from one stream for all documents: then a prompt depends on those before it.
        task.set_fewshot_seed(int.from_bytes(hashlib.sha256(_text(doc)).digest()[:4], "big"))
        return prompt(doc, *arguments, **options)

    task.fewshot_context = by_document


def _metric(task: Any, given: str, where: str) -> tuple[str, str, bool]:
    """The name of a metric and of a filter, and whether higher is better."""
    column, _, choice = given.partition(",")
    metrics, filters = list(task.higher_is_better()), [one.name for one in task._filters]
    if column not in metrics:
        expected = " | ".join(map(str, metrics))
        raise InputError(
            "the task has no such metric", where=f"{where}: metric", expected=expected, got=column
        )
    if choice and choice not in filters:
        expected = " | ".join(filters)
        raise InputError(
            "the task has no such filter", where=f"{where}: metric", expected=expected, got=choice
        )
    if not choice and len(filters) > 1:
        expected = " | ".join(f"{column},{one}" for one in filters)
        raise InputError(
            "the task filters answers in several ways", where=f"{where}: metric", expected=expected
        )
    higher = task.higher_is_better()[column]
    if higher is None:
        hint = "write higher_is_better: beside it in the task's metric_list"
        raise InputError(
            "nothing says whether more of the metric is better", where=f"{where}: {column}", hint=hint
        )
    return column, choice or filters[0], bool(higher)


def _fix(task: Any, limit: int | None) -> int:
    """Makes its documents the same from now on, as some tasks shuffle on every look; returns how many.

    Its figures over documents are left out: only scores of each are asked for, and over a part some do not exist.
    """
    task.aggregation = lambda: defaultdict(lambda: len)
    documents = task.eval_docs
    count = len(documents) if limit is None else min(limit, len(documents))
    kept = documents.select(range(count)) if hasattr(documents, "select") else list(documents)[:count]
    name = "test_docs" if task.has_test_docs() else "validation_docs"
    setattr(task, name, lambda: kept)
    return count


def _digest(task: Any, facts: list[Any]) -> str:
    """SHA-256 of documents, prompts, definition and versions: what scores depend on but the model."""
    found = hashlib.sha256(_text([version("lm_eval"), *facts]))
    definition = {
        key: value for key, value in task.config.to_dict(keep_callable=True).items() if key not in _PLACES
    }
    found.update(_text(definition))
    for doc in task.eval_docs:
        found.update(_text(doc))
    task.build_all_requests()
    for one in task.instances:
        found.update(_text([one.request_type, one.doc_id, one.idx, one.args]))
    return found.hexdigest()


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    """What JSON does not know: arrays by value, functions by the file that they are in."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if callable(value):
        file = inspect.getsourcefile(value) if inspect.isroutine(value) or inspect.isclass(value) else None
        content = Path(file).read_bytes() if file is not None and Path(file).is_file() else b""
        return [getattr(value, "__qualname__", type(value).__name__), hashlib.sha256(content).hexdigest()]
    text = str(value)
    return type(value).__name__ if " object at 0x" in text else text


# --- running --------------------------------------------------------------------------------------------------


class _Served(torch.nn.Module):
    """A module as lm-eval expects one: with a configuration and a device; its weights are left alone."""

    def __init__(self, module: torch.nn.Module, config: Any) -> None:
        super().__init__()
        self.module = module
        self.config = getattr(module, "config", config)
        self._options = without_cache(self.config)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.module.parameters()).device

    def tie_weights(self) -> None:
        """A merge is scored as it is."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **{**self._options, **options})

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As the module does it, with its cache."""
        module: Any = self.module
        return module.generate(*arguments, **options)


@contextmanager
def _no_nan(module: torch.nn.Module, name: str) -> Iterator[None]:
    """A model that answers NaN is refused: its best answer would be the first one."""

    def check(_: torch.nn.Module, __: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor) and bool(torch.isnan(logits).any()):
            raise InputError("scores are not finite", where=name, got="NaN among the logits")

    handle = module.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()
