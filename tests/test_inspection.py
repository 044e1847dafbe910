"""`inspect`: sites, groups, evidence, what is left alone and why, and what a manifest says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import toy
import unmergeable as um
from unmergeable.errors import InputError
from unmergeable.keys import generate_key
from unmergeable.modelcard import model_card


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return toy.write(tmp_path / "model", toy.tensors(), shards=2)


def test_sites_with_their_groups_and_sizes(model: Path) -> None:
    found = um.inspect(model, spec=toy.spec())
    (part,) = found.components
    sites = {site.name: site for site in part.sites}
    assert list(sites) == [site["name"] for site in toy.spec_dict()["sites"]]
    qk = sites["l.{l}.qk"]
    # two layers; a 2 x 2 element for each of 3 groups of heads and 4 frequencies; q, its bias and k
    assert (qk.kind, qk.group, qk.size, qk.instances, qk.elements, qk.tensors) == (
        "qk",
        "complex",
        2,
        2,
        12,
        6,
    )
    assert sites["l.{l}.x.{e}.named"].instances == toy.LAYERS * toy.CONFIG["experts"]
    assert qk.evidence == {"error": 1e-12}
    assert found.files == 2
    assert found.nbytes == sum(file.stat().st_size for file in model.glob("*.safetensors"))


def test_every_tensor_is_acted_on_or_named_untouched(model: Path) -> None:
    (part,) = um.inspect(model, spec=toy.spec()).components
    sizes = {name: array.size for name, array in toy.tensors().items()}
    assert set(part.untouched) == {"embed", "l.0.norm", "l.1.norm"}
    assert part.parameters == sum(sizes.values())
    assert part.acted_on == part.parameters - sum(sizes[name] for name in part.untouched)
    assert part.refused == (("l.{l}.norm", "a norm has no symmetry of its own"),)
    assert dict(part.dtypes or {}) == {"BF16": len(sizes)}


def test_nothing_is_read_but_headers(model: Path) -> None:
    before = toy.tree(model)
    um.inspect(model, spec=toy.spec())
    assert toy.tree(model) == before
    for file in model.glob("*.safetensors"):  # the data gone, the headers whole
        size = file.stat().st_size
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        with open(file, "r+b") as stream:
            stream.truncate(header)
            stream.truncate(size)
    assert um.inspect(model, spec=toy.spec()).components[0].parameters > 0


def test_a_locked_model_tells_its_public_facts(model: Path, tmp_path: Path) -> None:
    key = generate_key(tmp_path / "owner.key")
    assert um.inspect(model, spec=toy.spec()).locked is None
    um.lock(model, tmp_path / "locked", key=key, spec=toy.spec(), scales=True)
    locked = um.inspect(tmp_path / "locked", spec=toy.spec()).locked
    assert locked is not None
    assert (locked.method, locked.key, locked.domain) == ("exact", key.id, False)
    assert locked.options == {"scales": True}
    assert locked.components == {".": True}


def test_a_single_file_needs_its_config(model: Path, tmp_path: Path) -> None:
    file = toy.write_file(tmp_path / "one.safetensors", toy.tensors())
    with pytest.raises(InputError, match="config"):
        um.inspect(file, spec=toy.spec())
    from_file = um.inspect(file, config=model / "config.json", spec=toy.spec())
    from_fields = um.inspect(file, config=toy.CONFIG, spec=toy.spec())
    assert from_file.as_dict() == from_fields.as_dict()


def test_the_document_is_json(model: Path) -> None:
    document = json.loads(json.dumps(um.inspect(model, spec=toy.spec()).as_dict()))
    assert (document["document"], document["version"]) == ("unmergeable.inspect", 1)
    (part,) = document["components"]
    assert part["sites"][0]["name"] == "l.{l}.qk"
    assert part["refused"] == [{"site": "l.{l}.norm", "reason": "a norm has no symmetry of its own"}]


def test_parts_of_a_pipeline(model: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    toy.write(pipeline / "unet", toy.tensors())
    toy.write(
        pipeline / "other", toy.tensors(), config={"architectures": ["Unheard"], "model_type": "unheard"}
    )
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "config.json").write_text("{}")
    index = {name: ["library", "Class"] for name in ("unet", "other", "scheduler")}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    parts = {part.name: part for part in um.inspect(pipeline).components}
    assert parts["scheduler"].passed_through == "it has no weights"
    assert parts["other"].passed_through is not None
    assert parts["unet"].passed_through is not None  # the toy's class is in no library


def test_a_model_card_says_what_the_manifest_says(model: Path, tmp_path: Path) -> None:
    key = generate_key(tmp_path / "owner.key")
    for method, phrase in (("exact", "restores every bit"), ("gauge", "secret matrices")):
        um.lock(model, tmp_path / method, key=key, spec=toy.spec(), method=method)
        text = model_card(tmp_path / method)
        assert phrase in text
        assert key.id in text
        assert f"{len(toy.tensors()):,} tensors" in text
        assert "does not stop" in text
    file = toy.write_file(tmp_path / "one.safetensors", toy.tensors())
    um.lock(file, tmp_path / "locked.safetensors", key=key, config=toy.CONFIG, spec=toy.spec())
    text = model_card(tmp_path / "locked.safetensors")
    assert key.id in text
    assert "`locked.safetensors.unmergeable.json` beside the weights" in text
    assert "every other file" not in text
    um.lock(model, tmp_path / "scaled", key=key, spec=toy.spec(), scales=True)
    text = model_card(tmp_path / "scaled")
    assert "multiplied by powers of two" in text
    assert "hold the same numbers" not in text
    um.lock(model, tmp_path / "pruned", key=key, spec=toy.spec(), method="params", prune_rate=0.2)
    text = model_card(tmp_path / "pruned")
    assert "changes the outputs a little" in text
    assert "computes what it computed before" not in text
    with pytest.raises(InputError, match="no locked model here"):
        model_card(model)
