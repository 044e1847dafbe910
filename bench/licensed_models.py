"""The models that `licensed.py` measures: how to load, score and train each, in the measuring or embedded zoo.

Scores are taken on test slices only, training batches come from training slices only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
from transformers.utils import logging

from unmergeable.derive import Key

logging.disable_progress_bar()

WINDOWS, WINDOW = 16, 256  # the test slice of a text task
IMAGES = 500  # the test slice of an image task

Batch = dict[str, torch.Tensor]


def make_key(seed: int) -> Key:
    """The owner's key of a run."""
    return Key(hashlib.sha256(f"bench/licensed|key|{seed}".encode()).digest())


def make_salt(*parts: object) -> bytes:
    """A salt that is the same in every run with the same seed."""
    return hashlib.sha256("|".join(map(str, ("bench/licensed", *parts))).encode()).digest()


@dataclass
class Text:
    """A causal language model; its score is the cross-entropy in nats a token: less is better."""

    zoo: Path
    name: str = "llama-c"
    own: str = "c"
    new: str = "python"  # what a licensed user trains it further on
    learnt: str = "python read backwards"  # by adapters: a base that saw all languages learns little of one
    metric: str = "cross-entropy"
    rate: float = 3e-4
    adapter_rate: float = 2e-3
    batch: int = 4
    adapter_batch: int = 8
    length: int = 128

    @property
    def slice(self) -> str:
        return f"the first {WINDOWS} windows of {WINDOW} test tokens a task"

    @property
    def data(self) -> str:
        return f"batches of {self.batch} × {self.length} training tokens, {self.adapter_batch} × for adapters"

    def folder(self, kind: str, task: str) -> Path:
        """The folder of the "base" or of a task's "expert"."""
        return self.zoo / (f"llama-{task}" if kind == "expert" else "llama-base")

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def fit_head(self, model: Any, task: str) -> Any:
        """All tasks share one vocabulary."""
        return model

    @cached_property
    def _test(self) -> dict[str, torch.Tensor]:
        with np.load(self.zoo / "text-test.npz") as file:
            size = WINDOWS * WINDOW
            found = {
                t: torch.from_numpy(file[t][:size].astype(np.int64)).view(-1, WINDOW) for t in file.files
            }
        return found | {f"{task} read backwards": rows.flip(1) for task, rows in found.items()}

    @cached_property
    def _train(self) -> dict[str, np.ndarray]:
        with np.load(self.zoo / "text-train.npz") as file:
            found = {task: file[task] for task in {self.own, self.new}}
        return found | {f"{task} read backwards": tokens[::-1] for task, tokens in found.items()}

    @torch.inference_mode()
    def outputs(self, model: Any, task: str | None = None, *, hidden: bool = False) -> Any:
        """Logits [tokens, vocabulary] in float32; with `hidden` also the states after every block."""
        logits, states = [], []
        for rows in self._test[task or self.own].split(4):
            found = model(input_ids=rows, output_hidden_states=hidden)
            logits.append(found.logits.float().flatten(0, 1))
            states.append([state.float() for state in found.hidden_states] if hidden else [])
        return (torch.cat(logits), states) if hidden else torch.cat(logits)

    def score(self, model: Any, task: str) -> float:
        logits = self.outputs(model, task).view(-1, WINDOW, model.config.vocab_size)
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), self._test[task][:, 1:].flatten()))

    def batches(self, task: str, steps: int, seed: int, size: int) -> Iterator[Batch]:
        tokens, rng = self._train[task], np.random.default_rng(seed)
        for _ in range(steps):
            starts = rng.integers(0, len(tokens) - self.length, size)
            rows = np.stack([tokens[s : s + self.length] for s in starts]).astype(np.int64)
            yield {"input_ids": torch.from_numpy(rows), "labels": torch.from_numpy(rows)}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return model(**batch).loss

    def trained(self, model: Any) -> list[torch.nn.Parameter]:
        return list(model.parameters())


@dataclass
class Images:
    """An image classifier; its score is the accuracy. Every task has a frozen head of its own."""

    zoo: Path | None  # None: the embedded zoo
    name: str = "vit-fmnist"
    own: str = "fmnist"
    new: str = "latin"
    learnt: str = "latin"
    metric: str = "accuracy"
    rate: float = 3e-4
    adapter_rate: float = 2e-3
    batch: int = 16
    adapter_batch: int = 32
    sets: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.zoo is None:
            self.name, self.own, self.new = "fashion (embedded)", "fashion", "latin"

    @property
    def slice(self) -> str:
        return f"the first {IMAGES} test images a task"

    @property
    def data(self) -> str:
        size = f"{self.batch} training images ({self.adapter_batch} for adapters)"
        return f"batches of {size} under the task's own head, which is not trained"

    def folder(self, kind: str, task: str) -> Path:
        if self.zoo is None:
            from unmergeable.zoo import BASE, model_path

            return model_path(task if kind == "expert" else BASE)
        return self.zoo / (f"vit-{task}" if kind == "expert" else f"vit-base-{task}-head")

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForImageClassification.from_pretrained(folder, dtype=dtype).eval()

    def fit_head(self, model: Any, task: str) -> Any:
        """The model with the task's head in place of its own; the number of classes may change."""
        head = self.load(self.folder("expert", task)).classifier
        model.classifier = head.to(next(model.parameters()).dtype)
        model.config.num_labels = model.num_labels = head.out_features
        return model

    def _set(self, task: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        if (task, split) not in self.sets:
            if self.zoo is None:
                from unmergeable.zoo import images

                pixels, labels = images(task, "test" if split == "test" else "few")
            else:
                with np.load(self.zoo / f"vit-{split}.npz") as file:
                    pixels, labels = file[f"{task}_images"], file[f"{task}_labels"]
            self.sets[task, split] = torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))
        return self.sets[task, split]

    @torch.inference_mode()
    def outputs(self, model: Any, task: str | None = None, *, hidden: bool = False) -> Any:
        """Logits [images, classes] in float32; with `hidden` also the states after every block."""
        logits, states = [], []
        for rows in self._set(task or self.own, "test")[0][:IMAGES].split(100):
            found = model(_pixels(rows).to(model.dtype), output_hidden_states=hidden)
            logits.append(found.logits.float())
            states.append([state.float() for state in found.hidden_states] if hidden else [])
        return (torch.cat(logits), states) if hidden else torch.cat(logits)

    def score(self, model: Any, task: str) -> float:
        """Accuracy; `fit_head` comes first where the model has another task's head."""
        right = self.outputs(model, task).argmax(1) == self._set(task, "test")[1][:IMAGES]
        return float(right.float().mean())

    def batches(self, task: str, steps: int, seed: int, size: int) -> Iterator[Batch]:
        (pixels, labels), rng = self._set(task, "train"), np.random.default_rng(seed)
        for _ in range(steps):
            rows = torch.from_numpy(rng.integers(0, len(labels), size))
            yield {"pixel_values": _pixels(pixels[rows]), "labels": labels[rows]}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])

    def trained(self, model: Any) -> list[torch.nn.Parameter]:
        return [value for name, value in model.named_parameters() if "classifier." not in name]


Subject = Text | Images


def _pixels(rows: torch.Tensor) -> torch.Tensor:
    """Grey images [n, 28, 28] of bytes as [n, 1, 28, 28] from −1 to 1."""
    return (rows[:, None].float() / 255 - 0.5) / 0.5


def train(
    subject: Subject, model: Any, task: str, steps: int, seed: int, *, adapter: bool = False
) -> list[float]:
    """AdamW with a warm-up over a tenth of the steps. Returns the loss of every step."""
    values = [value for value in subject.trained(model) if value.requires_grad]
    rate, size = (subject.adapter_rate, subject.adapter_batch) if adapter else (subject.rate, subject.batch)
    optimizer = torch.optim.AdamW(values, lr=rate, weight_decay=0.01)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    losses = []
    for batch in subject.batches(task, steps, seed, size):
        loss = subject.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses
