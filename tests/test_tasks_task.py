"""Tasks of tensors: scores by hand, NaN, batches, digests and the few examples of a thief."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unmergeable.errors import InputError, RunError, UsageError
from unmergeable.tasks.task import IGNORED, Examples, TensorTask


class Linear(torch.nn.Module):
    """Logits of x, and every call's keyword arguments."""

    def __init__(self, inputs: int = 5, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(classes, inputs))
        self.seen: list[dict] = []

    def forward(self, x: torch.Tensor, **others: object) -> SimpleNamespace:
        self.seen.append(others)
        return SimpleNamespace(logits=x @ self.weight.T)


def classification(count: int = 23, **changes: object) -> TensorTask:
    random = torch.Generator().manual_seed(1)
    some = Examples(
        {"x": torch.randn(count, 5, generator=random)}, torch.randint(0, 4, (count,), generator=random)
    )
    options = {"metric": "accuracy", "evaluation": some, "training": some, "batch": 7, **changes}
    return TensorTask(name="toy", kind="image-classification", **options)  # type: ignore[arg-type]


def test_accuracy_is_a_right_answer_or_none() -> None:
    task, module = classification(), Linear()
    logits = task.evaluation.inputs["x"].numpy() @ module.weight.detach().numpy().T
    right = (logits.argmax(1) == task.evaluation.labels.numpy()).astype(float)
    assert 0 < right.sum() < len(task) == 23
    assert np.array_equal(task.score(module, range(23)), right)
    chosen = [20, 3, 3, 7]
    assert np.array_equal(task.score(module, chosen), right[chosen])
    assert task.score(module, []).shape == (0,)


def test_cross_entropy_by_hand() -> None:
    task, module = classification(metric="cross-entropy"), Linear()
    logits = (task.evaluation.inputs["x"] @ module.weight.T).detach().double().numpy()
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.log(chances[np.arange(23), task.evaluation.labels.numpy()])
    np.testing.assert_allclose(task.score(module, range(23)), expected, rtol=1e-5)
    loss = task.loss(module, task.evaluation)
    assert float(loss.detach()) == pytest.approx(-expected.mean(), rel=1e-5)
    assert loss.requires_grad


def test_labels_that_count_for_nothing_are_left_out() -> None:
    random = torch.Generator().manual_seed(0)
    x, labels = torch.randn(2, 6, 5, generator=random), torch.randint(0, 4, (2, 6), generator=random)
    labels[0, 2:] = IGNORED
    module = Linear()
    task = classification(metric="cross-entropy", evaluation=Examples({"x": x}, labels), training=None)
    chances = (x @ module.weight.T).detach().double().log_softmax(-1)
    first = chances[0, [0, 1], labels[0, :2]].mean()
    second = chances[1, range(6), labels[1]].mean()
    np.testing.assert_allclose(task.score(module, [0, 1]), [first, second], rtol=1e-5)
    assert task.evaluation.tokens == 8


@pytest.mark.parametrize("metric", ["accuracy", "cross-entropy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(metric: str, value: float) -> None:
    task, module = classification(metric=metric), Linear()
    with torch.no_grad():
        module.weight[1, 2] = value
    with pytest.raises(InputError, match="scores are not finite") as caught:
        task.score(module, range(23))
    assert caught.value.where == "toy"
    assert metric == "cross-entropy" or "23 of 23 that are not" in str(caught.value)


def test_a_model_that_fails_is_named() -> None:
    with pytest.raises(RunError, match="the model fails on the task") as caught:
        classification().score(Linear(inputs=6), [0, 1])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.where == "toy"


def test_constants_reach_every_call() -> None:
    module = Linear()
    task = classification(constants={"use_cache": False})
    task.score(module, range(10))
    task.loss(module, task.evaluation)
    assert module.seen == [{"use_cache": False}] * 3


def test_the_digest_sees_every_part() -> None:
    task = classification()
    assert task.digest == classification().digest
    other = Examples(task.evaluation.inputs, (task.evaluation.labels + 1) % 4)
    digests = {
        task.digest,
        classification(22).digest,
        classification(metric="cross-entropy").digest,
        classification(batch=8).digest,
        classification(training=None).digest,
        classification(training=other).digest,
        classification(evaluation=other).digest,
        classification(evaluation=task.evaluation.to(torch.device("cpu"))[:]).digest,
    }
    assert len(digests) == 7  # the last is the first again


def test_a_thief_with_few_labels_gets_so_many_of_each() -> None:
    task = classification(60)
    few = task.few(3, seed=0)
    assert np.bincount(few.labels.numpy()).tolist() == [3, 3, 3, 3]
    assert few.digest() == task.few(3, seed=0).digest() != task.few(3, seed=1).digest()
    rows = {tuple(row) for row in task.evaluation.inputs["x"].tolist()}
    assert {tuple(row) for row in few.inputs["x"].tolist()} <= rows
    with pytest.raises(InputError, match="no training examples"):
        classification(training=None).few(3, 0)


def test_a_metric_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="no such metric"):
        classification(metric="f1")
