"""The package as it is installed: quick start, one version, names only where they belong."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import unmergeable as um
from unmergeable import _parser

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "unmergeable"
HEAVY = ("numpy", "scipy", "torch", "transformers", "cryptography", "safetensors", "matplotlib", "tqdm")


def loaded_by(*arguments: str) -> set[str]:
    """The heavy packages that `python …` has loaded when it ends."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True
    )
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "unmergeable" in modules
    return {module for module in modules if module.partition(".")[0] in HEAVY}


@pytest.mark.parametrize("arguments", [["--help"], ["lock", "--help"], ["--version"], ["completion", "bash"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_by("-m", "unmergeable", *arguments) == set()


def test_import_loads_nothing_heavy() -> None:
    assert loaded_by("-c", "import unmergeable; dir(unmergeable)") == set()


def test_help_takes_a_tenth_of_a_second() -> None:
    times = []
    for _ in range(7):
        before = os.times()
        subprocess.run([sys.executable, "-m", "unmergeable", "--help"], capture_output=True, check=True)
        after = os.times()
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert min(times) <= 0.1  # of a core, the best of several: what else runs here is not its fault


def test_one_version() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert um.__version__ == project["version"] == importlib.metadata.version("unmergeable")
    assert re.search(rf"^version: {re.escape(um.__version__)}$", citation, re.MULTILINE)
    assert f"## {um.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    done = subprocess.run([sys.executable, "-m", "unmergeable", "--version"], capture_output=True, text=True)
    assert done.stdout == f"unmergeable {um.__version__}\n"


def test_public_names_are_listed_and_exist() -> None:
    assert set(um.__all__) == {"__version__", *um._PUBLIC}
    assert set(um.__all__) <= set(dir(um))
    for name in um.__all__:
        assert getattr(um, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        um.nonsense  # noqa: B018


def test_a_verb_wins_over_its_module() -> None:
    code = (
        "import unmergeable.lock, unmergeable as um;"
        "from unmergeable.lock import lock; assert um.lock is lock;"
        "import unmergeable.verify; assert callable(um.verify); assert callable(um.unlock)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_parser_names_the_methods_that_exist() -> None:
    from unmergeable.methods import METHODS

    assert set(_parser.LOCK_METHODS) == set(METHODS)


def test_typed_and_licensed() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def repository() -> list[Path]:
    """Every text file that is in the repository or would be added to it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    binary = {".safetensors", ".npz", ".png", ".bin", ".gz"}
    return [ROOT / name for name in listed if Path(name).suffix not in binary and (ROOT / name).is_file()]


def test_no_path_of_a_machine_and_no_index_address() -> None:
    # Written so that this file does not match itself.
    patterns = re.compile(
        r"/(?:work|farm|root|home)/[a-z]|/tmp[/]um|index[-]url|https?://[^ ]*/simple\b|\.libra[r]y"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in repository()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if patterns.search(line)
    ]
    assert found == []


# "clip", "opt" and "phi" are words of numpy, of options and of mathematics: these count in capitals alone.
FAMILIES = (
    r"[Ll]lama|[Mm]i[sx]tral|[Qq]wen|[Gg]emma|GPT|gpt|neox|[Bb]loom|[Ff]alcon|[Tt]5|(?:[Rr]o|[Dd]e|[Dd]istil)?"
    r"[Bb]erta?|BERT|[Bb]art|[Vv]i[Tt]|CLIP|OPT|Phi|[Ss]iglip|[Dd]inov?2?|[Ww]hisper|[Dd]eep[Ss]eek|[Mm]amba|[Oo]lmo"
)


FIELD = re.compile(
    r"\bmamba_(?:(?:n|num)_heads|n_groups|(?:d_head|head_dim)|d_ssm|d_state|chunk_size|expand)\b"
)


def test_no_family_of_models_is_named_where_specs_decide() -> None:
    # As a word or a part of an identifier, with a version behind it or not.
    name = re.compile(rf"(?<![A-Za-z])(?:{FAMILIES})[0-9]*(?=[_\W]|[A-Z][a-z]|$)")
    # One table serves all: only the table itself and the embedded models have a family.
    named = {PACKAGE / "specs", PACKAGE / "zoo"}
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if not named & set(path.parents)]
    assert len(files) > 50
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        # Values and names of fields that configs have.
        if name.search(FIELD.sub("", line)) and not line.startswith("ROTARY_KINDS = ")
    ]
    assert found == []


def test_files_are_one_concept_long() -> None:
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}
