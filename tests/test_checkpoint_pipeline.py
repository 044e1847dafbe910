"""Pipeline folders: which components there are, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from checkpoint_files import arrays, folder
from unmergeable.checkpoint import Component, components, is_pipeline, open_checkpoint, open_pipeline
from unmergeable.errors import InputError

INDEX: dict[str, Any] = {
    "_class_name": "SomePipeline",
    "unet": ["diffusers", "UNet"],
    "text_encoder": ["transformers", "Text"],
    "scheduler": ["diffusers", "Scheduler"],
    "safety_checker": [None, None],
    "requires_safety_checker": True,
}


def pipeline(root: Path, **changes: Any) -> Path:
    folder(root / "unet", shards=2)
    folder(root / "text_encoder")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text("{}")
    (root / "README.md").write_text("x")
    (root / "model_index.json").write_text(json.dumps(INDEX | changes))
    return root


def test_components(tmp_path: Path) -> None:
    root = pipeline(tmp_path / "p")
    assert is_pipeline(root)
    assert not is_pipeline(root / "unet")
    found = open_pipeline(root)
    assert components(root) == found.components
    assert found.components == [
        Component("unet", True),
        Component("text_encoder", True),
        Component("scheduler", False),
    ]
    assert found.side_files == ["README.md", "model_index.json", "scheduler/scheduler_config.json"]
    assert found.side_folders == ["scheduler"]
    assert found.side_bytes == sum((root / name).stat().st_size for name in found.side_files)
    for component in found.components[:2]:
        with open_checkpoint(root / component.name) as checkpoint:
            assert set(checkpoint.tensors) == set(arrays())


def test_is_not_opened_as_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pipeline of several models"):
        open_checkpoint(pipeline(tmp_path / "p"))


@pytest.mark.parametrize("name", ["../unet", "a/b", "..", "a\\b"])
def test_refuses_components_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="names a component that it may not"):
        open_pipeline(pipeline(tmp_path / "p", **{name: ["diffusers", "X"]}))


def test_refuses_missing_components_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 problems") as caught:
        open_pipeline(pipeline(tmp_path / "p", vae=["diffusers", "X"], other=["diffusers", "Y"]))
    assert "vae" in str(caught.value)


def test_refuses_weights_outside_of_the_components(tmp_path: Path) -> None:
    root = pipeline(tmp_path / "p")
    save_file(arrays(), root / "v1-5-pruned.safetensors")
    (root / "vae_old").mkdir()
    (root / "vae_old" / "x.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match="2 problems"):
        open_pipeline(root)


def test_refuses_an_index_that_is_not_one(tmp_path: Path) -> None:
    root = pipeline(tmp_path / "p")
    for text, message in (
        ("[]", "not a JSON object"),
        ("{}", "names no components"),
        ("{", "not valid JSON"),
    ):
        (root / "model_index.json").write_text(text)
        with pytest.raises(InputError, match=message):
            open_pipeline(root)
    (root / "model_index.json").unlink()
    (root / "model_index.json").symlink_to("nowhere")
    assert is_pipeline(root)
    with pytest.raises(InputError, match="leads nowhere"):
        open_pipeline(root)
