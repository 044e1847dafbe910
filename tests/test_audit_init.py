"""`audit --init`: a commented configuration that is accepted once data are filled in, whatever models are called."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from unmergeable.audit.config import RELEASE, RESERVED, read_config
from unmergeable.audit.init import _names, _scalar, init
from unmergeable.audit.rows import LEVELS
from unmergeable.errors import InputError, UsageError

CLASSES = {
    "image-classification": ["ViTForImageClassification"],
    "text-classification": ["BertForSequenceClassification"],
    "language-modelling": ["LlamaForCausalLM"],
    "python": ["ViTModel"],
}


def model(folder: Path, *classes: str, **files: Any) -> Path:
    """As much of a model as is looked at."""
    folder.mkdir(parents=True)
    for name, data in ({"config": {"architectures": list(classes)}} | files).items():
        if data is not None:
            (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def filled(path: Path) -> str:
    """The text with the data that it asks for, as a reader would fill them in: comments of options taken away."""
    data = path.parent / "data"
    data.mkdir(exist_ok=True)
    (data / "file.py").write_text("")
    text = path.read_text(encoding="utf-8")
    assert "DATA" in text or "FILE.py" in text
    text = text.replace("# train:", "train:  ").replace("#   data:", "    data:")
    return text.replace("DATA", "data").replace("FILE.py", "data/file.py")


def accepted(path: Path) -> Any:
    path.write_text(filled(path), encoding="utf-8")
    return read_config(path)


@pytest.mark.parametrize("kind", CLASSES)
def test_it_is_accepted_once_data_are_filled_in(kind: str, tmp_path: Path) -> None:
    base, protected, other = (model(tmp_path / name, *CLASSES[kind]) for name in ("origin", "mine", "theirs"))
    path = init(base, [protected, other], tmp_path / "audit.yaml")
    with pytest.raises(InputError, match="no such file or folder"):
        read_config(path)
    config = accepted(path)
    assert dict(config.models()) == {
        "base": "origin", "protected": "mine", "plain": "mine", "theirs": "theirs"
    }  # fmt: skip
    assert config.tasks == ("mine", "theirs")
    assert {task.kind for task in config.fields.tasks.values()} == {kind}
    if kind != "python":
        assert all(task.train.data == "data" for task in config.fields.tasks.values())
    assert (config.levels, config.fields.private, config.fields.seed) == ((0, 1), "auto", 0)


@pytest.mark.parametrize("kind", ["image-classification", "text-classification", "language-modelling"])
def test_every_option_in_its_comments_is_one(kind: str, tmp_path: Path) -> None:
    base, *models = (model(tmp_path / name, *CLASSES[kind]) for name in ("origin", "mine", "theirs"))
    path = init(base, models, tmp_path / "audit.yaml")
    text = filled(path)
    for line in text.splitlines():
        name = line.removeprefix("    # ").partition(":")[0]
        if line.startswith("    # ") and name.isidentifier():
            text = text.replace(line, line.replace("    # ", "    ", 1))
    text = text.replace("# attacks", "attacks").replace("  # releases", "  releases")
    path.write_text(text)
    config = read_config(path)
    assert config.fields.attacks == ("task_arithmetic", "full_dose")
    assert len(config.fields.tasks["mine"].model_fields_set) > 4


def test_the_levels_are_named(tmp_path: Path) -> None:
    base, *models = (model(tmp_path / name, "ViTModel") for name in ("origin", "mine", "theirs"))
    text = init(base, models, tmp_path / "audit.yaml").read_text()
    for number, name in LEVELS.items():
        assert f"{number} {name}" in text


def test_a_locked_model_asks_for_the_one_before(tmp_path: Path) -> None:
    base, locked, plain, other = (
        model(tmp_path / name, "ViTForImageClassification")
        for name in ("origin", "mine-locked", "mine", "theirs")
    )
    (locked / "unmergeable.json").write_text("{}")
    path = init(base, [locked, other], tmp_path / "a.yaml")
    assert "It is locked: put the model from before the lock here." in path.read_text()
    assert accepted(path).fields.protected.plain == "mine-locked"
    path = init(base, [locked, other], tmp_path / "b.yaml", plain=plain)
    assert "It is locked" not in path.read_text()
    protected = accepted(path).fields.protected
    assert (protected.model, protected.plain, protected.task) == ("mine-locked", "mine", "mine")


def test_an_adapter_has_the_class_of_its_base(tmp_path: Path) -> None:
    base = model(tmp_path / "origin", "LlamaForCausalLM")
    models = [model(tmp_path / name, config=None, adapter_config={}) for name in ("mine", "theirs")]
    config = accepted(init(base, models, tmp_path / "audit.yaml"))
    assert {task.kind for task in config.fields.tasks.values()} == {"language-modelling"}


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("origin", "mine", "theirs"):
        model(tmp_path / "models" / name, "ViTModel")
    (tmp_path / "audits").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    path = init("origin", ["mine", tmp_path / "models" / "theirs"], Path("../audits/audit.yaml"))
    assert path == Path("../audits/audit.yaml")
    config = accepted(path)
    assert [written for _, written in config.models()] == [
        f"../models/{name}" for name in ("origin", "mine", "mine", "theirs")
    ]
    (tmp_path / "models" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "models" / "here")
    assert accepted(init("../origin", ["../mine", "../theirs"], "audit.yaml")).fields.base == "../origin"


# --- names ---------------------------------------------------------------------------------------------------

STRANGE = (
    "a b",
    "a: b",
    "# c",
    "no",
    "3",
    "- x",
    "'quoted'",
    'say "so"',
    "{a}",
    "null",
    "ü — é",
    "a\tb",
    "\u2028",
)


@pytest.mark.parametrize("name", STRANGE)
def test_folders_may_be_called_anything(name: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}{end}" / name for end in ("", "2", "3")]
    base, *models = [model(path, "ViTForImageClassification") for path in paths]
    config = accepted(init(base, models, tmp_path / "audit.yaml"))
    assert config.fields.protected.task == name
    assert list(config.fields.others) == [f"{name}-2"]
    assert all(config.path(written).is_dir() for _, written in config.models())


@pytest.mark.parametrize("name", [*filter(None, RESERVED), f"{RELEASE}2"])
def test_a_task_is_not_called_as_another_model(name: str, tmp_path: Path) -> None:
    base, *models = [model(tmp_path / path / name, "ViTModel") for path in "abc"]
    config = accepted(init(base, models, tmp_path / "audit.yaml"))
    assert config.tasks == (f"task-{name}", f"task-{name}-2")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_text_is_one_line_of_yaml(text: str) -> None:
    written = _scalar(text)
    assert written.isprintable()
    assert yaml.safe_load(f"one:\n  {written}: {written}    # why\n") == {"one": {text: text}}


@given(
    st.lists(st.sampled_from(("a/x", "b/x", "c/x-2", "d/base", "e/base", "f/x-2")), unique=True, min_size=1)
)
def test_names_differ(paths: list[str]) -> None:
    found = _names([Path(path) for path in paths])
    assert len(set(found.values())) == len(paths)
    assert not set(found.values()) & set(RESERVED)


# --- refusals ------------------------------------------------------------------------------------------------


def test_a_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    base, *models = (model(tmp_path / name, "ViTModel") for name in ("origin", "mine", "theirs"))
    path = tmp_path / "audit.yaml"
    path.write_text("mine")
    with pytest.raises(InputError, match="the file exists"):
        init(base, models, path)
    assert path.read_text() == "mine"
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(InputError, match="the file cannot be written"):
        init(base, models, path)
    with pytest.raises(InputError, match="the file cannot be written"):
        init(base, models, tmp_path / "no" / "audit.yaml")


def test_one_model_is_not_enough(tmp_path: Path) -> None:
    base, mine = (model(tmp_path / name, "ViTModel") for name in ("origin", "mine"))
    for models in ([], [mine]):
        with pytest.raises(
            UsageError, match="an audit needs the protected model and a fine-tune of a thief's"
        ):
            init(base, models, tmp_path / "audit.yaml")
    assert not (tmp_path / "audit.yaml").exists()


def test_a_model_twice_is_refused(tmp_path: Path) -> None:
    base, mine, theirs = (model(tmp_path / name, "ViTModel") for name in ("origin", "mine", "theirs"))
    for models, plain in (([mine, mine], None), ([mine, theirs, theirs], None), ([mine, theirs], theirs)):
        with pytest.raises(UsageError, match="a model is named twice"):
            init(base, models, tmp_path / "audit.yaml", plain=plain)


@pytest.mark.parametrize("which", range(4))
def test_what_is_no_model_is_refused(which: int, tmp_path: Path) -> None:
    paths = [model(tmp_path / name, "ViTModel") for name in ("origin", "mine", "theirs", "before")]
    shutil.rmtree(paths[which])
    if which % 2:
        os.mkdir(paths[which])
    base, mine, theirs, before = paths
    with pytest.raises(InputError, match=f"{paths[which].name}: no model is there"):
        init(base, [mine, theirs], tmp_path / "audit.yaml", plain=before)
    assert not (tmp_path / "audit.yaml").exists()


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    """Its own parent is not what `..` leads to."""
    for name in ("base", "tuned", "other"):
        model = tmp_path / "models" / name
        model.mkdir(parents=True)
        (model / "config.json").write_text(
            '{"model_type": "vit", "architectures": ["ViTForImageClassification"]}'
        )
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    base, *models = (tmp_path / "models" / name for name in ("base", "tuned", "other"))
    written = Path(init(base, models, tmp_path / "link" / "audit.yaml"))
    found = yaml.safe_load(written.read_text())
    for path in (found["base"], found["protected"]["model"], *found["others"].values()):
        assert (written.parent / path).is_dir()
