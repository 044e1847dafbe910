"""Audits whose answers are known: no protection, an exact lock, a domain that everybody has.

On the tiny zoo, and on the embedded one, whose models are trained well enough for a lock to leave nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thief_cases
import toy
import unmergeable as um
from audit_cases import audit, audited, configuration, once, zoo
from unmergeable import zoo as embedded

pytestmark = pytest.mark.filterwarnings("ignore")
PROTECTED, OWN = thief_cases.PROTECTED, thief_cases.OWN
MERGES = ("task_arithmetic", "full_dose", "ties")


# --- the tiny zoo --------------------------------------------------------------------------------------------


def test_without_protection_everything_is_recovered(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder, _ = audited(tmp_path_factory)
    fields = configuration(
        zoo(tmp_path_factory), PROTECTED, attacks=["task_arithmetic", "full_dose", "quantise-4"]
    )
    result = audit(fields, tmp_path / "out", cache=folder / "cache", require={0: 0.01})
    for level in result.levels:
        assert level.reason is None
        assert (level.recovered, level.interval) == (1, (1, 1))
        assert level.gains["plain"] > 1
    assert not result.holds  # nothing is protected
    verdict = result.as_dict()["levels"][0]["verdict"]
    assert "a thief gets 100 % of what the unprotected model would give him" in verdict


def test_an_exact_lock_hinders_merges_and_not_an_alignment(tmp_path_factory: pytest.TempPathFactory) -> None:
    _, result = audited(tmp_path_factory)
    raw, aligned = result.levels
    assert (raw.reason, aligned.reason) == (None, None)
    assert raw.recovered < 0.8
    assert raw.interval[1] < aligned.interval[0]
    assert aligned.recovered >= 0.95
    assert aligned.interval[0] <= 1 <= aligned.interval[1] + 0.05
    best = {result.rows[floor.chosen["protected"].row].attack for floor in aligned.floors}  # type: ignore[index]
    assert all("anchor-coupled" in name for name in best)
    # Two salts are no help to an exact lock: the mean of two releases is worth less than an alignment.
    assert result.standalone["difference"] == 0
    assert result.standalone["same_answers"] == 1


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models of the tiny zoo, locked in one domain by an owner whose key nobody else has."""
    models = zoo(tmp_path_factory)

    def make(folder: Path) -> None:
        for name in ("base", PROTECTED, *OWN):
            um.lock(models / name, folder / name, key=toy.key(3), domain="house")
        for file in models.glob("*.npz"):
            (folder / file.name).symlink_to(file)
        (folder / "outside").symlink_to(models / PROTECTED)

    return once(tmp_path_factory, "audit-domain", make)


def test_a_domain_protects_nothing_within_it(domain: Path, tmp_path_factory: Any, tmp_path: Path) -> None:
    """Without the key, whoever has all models of a domain merges them as if none was locked."""
    folder, _ = audited(tmp_path_factory)
    fields = configuration(zoo(tmp_path_factory), PROTECTED, attacks=["task_arithmetic", "ties"], levels=[0])
    open_ = audit(fields, tmp_path / "open", cache=folder / "cache")
    inside = configuration(domain, PROTECTED, attacks=["task_arithmetic", "ties"], levels=[0])
    locked = audit(inside, tmp_path / "locked")
    assert locked.models["base"]["lock"] == locked.models["protected"]["lock"] == "exact"
    assert locked.models["protected"]["sha256"] != open_.models["protected"]["sha256"]
    assert locked.level(0).recovered == 1
    # Merges of locked models are the locks of merges: every look sees the same, up to rounding.
    for one, other in zip(open_.rows, locked.rows, strict=True):
        assert (one.attack, one.side) == (other.attack, other.side)
        seen = [[(look.protected, look.own) for look in row.looks] for row in (one, other)]
        assert np.allclose(*seen, atol=0.06)
        assert np.mean(np.isclose(*seen, atol=1e-9)) > 0.9
    assert locked.level(0).gains["plain"] == pytest.approx(open_.level(0).gains["plain"], abs=0.1)


def test_a_plain_model_outside_of_the_domain_is_no_control(domain: Path, tmp_path: Path) -> None:
    """Merges of it with the locked ones fail: that the protected model does no better shows nothing."""
    fields = configuration(domain, PROTECTED, attacks=["task_arithmetic", "ties"], levels=[0])
    fields["protected"]["plain"] = str(domain / "outside")
    result = audit(fields, tmp_path / "out")
    level = result.level(0)
    assert level.recovered > 1
    assert level.gains["protected"] > 1


# --- the embedded zoo ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded models and images, and an exact lock of each fine-tune."""

    def make(folder: Path) -> None:
        embedded.copy_to(folder)
        for task in embedded.tasks():
            images, labels = embedded.images(task)
            np.savez(folder / f"{task}.npz", images=images, labels=labels)
            um.lock(folder / task, folder / f"{task}-locked", key=toy.key())

    return once(tmp_path_factory, "audit-embedded", make)


def fields_of(models: Path, protected: str, own: Sequence[str], limit: int, **changes: Any) -> dict[str, Any]:
    tasks = {
        task: {
            "kind": "image-classification", "data": str(models / f"{task}.npz"), "limit": limit, "mean": 0.5,
            "std": 0.5, "batch": 100,
        }
        for task in (protected, *own)
    }  # fmt: skip
    return {
        "version": 1, "base": str(models / "base"), "others": {task: str(models / task) for task in own},
        "protected": {
            "model": str(models / f"{protected}-locked"), "plain": str(models / protected), "task": protected
        },
        "tasks": tasks,
    } | changes  # fmt: skip


def test_an_exact_lock_of_an_embedded_model_leaves_nothing_off_the_shelf(
    models: Path, tmp_path: Path
) -> None:
    fields = fields_of(models, "cyrillic", ("latin",), 240, attacks=["full_dose"], levels=[0])
    result = audit(fields, tmp_path / "out", require={0: 0.9})
    level = result.level(0)
    assert level.reason is None
    assert level.gains["plain"] > 1
    assert level.recovered < 0.05
    assert level.interval[1] < 0.1
    assert result.holds
    assert result.standalone["difference"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("protected", ["fashion", "latin"])
def test_an_exact_lock_of_the_embedded_models(protected: str, models: Path, tmp_path: Path) -> None:
    own = [task for task in embedded.tasks() if task != protected]
    fields = fields_of(models, protected, own, 240, attacks=[*MERGES, "anchor-coupled"])
    result = audit(fields, tmp_path / "out")
    raw, aligned = result.levels
    assert (raw.reason, aligned.reason) == (None, None)
    assert raw.interval[1] < 0.1
    assert aligned.recovered >= 0.95
    assert aligned.interval[1] >= 1


@pytest.mark.slow
@pytest.mark.parametrize(("method", "most"), [("gauge", 0.1), ("mergelock", 0.9)])
def test_dense_locks_come_off_as_well(method: Any, most: float, models: Path, tmp_path: Path) -> None:
    """What `mergelock` leaves, it leaves in the MLPs: it acts on attention alone."""
    um.lock(models / "latin", tmp_path / "locked", key=toy.key(), method=method)
    fields = fields_of(
        models, "latin", ("digits", "cyrillic"), 200, attacks=["full_dose", "anchor-coupled-other"]
    )
    fields["protected"]["model"] = str(tmp_path / "locked")
    result = audit(fields, tmp_path / "out")
    raw, aligned = result.levels
    assert raw.recovered < most
    if method == "gauge":
        assert raw.interval[1] < most
    assert aligned.recovered >= 0.9
