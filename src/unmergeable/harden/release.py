"""What `harden` leaves behind: the checkpoint with other numbers in it, and nothing of the training."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Staging
from ..errors import InputError
from ..merging.tensors import load_state
from ..merging.vectors import WEIGHTS
from ..merging.write import write_merged
from ..stock import quiet

if TYPE_CHECKING:
    from ..keys import Key
    from .owner import Owner


def write(owner: Owner, source: Path, target: Path, work: Path, lock: Key | None) -> None:
    """The trained weights with the fine-tune's files, names and dtypes; locked, if there is a key."""
    from ..lock import lock as lock_checkpoint

    module: Any = owner.module
    # peft asks the hub by itself whether an adapter's base has other embeddings: its files here say so.
    more = {"save_embedding_layers": False} if owner.adapter else {}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        saved, hardened = Path(folder) / "saved", Path(folder) / "hardened"
        with quiet():
            module.save_pretrained(saved, **more)
        if owner.adapter:
            _adapter(saved, source, target)
        elif lock is None:
            write_merged(target, load_state(saved), source)
        else:
            write_merged(hardened, load_state(saved), source)
            lock_checkpoint(hardened, target, key=lock)


def _adapter(saved: Path, source: Path, target: Path) -> None:
    """The adapter's files, with the trained matrices in its dtypes."""
    from safetensors.torch import load_file, save_file

    trained, before = (load_file(folder / WEIGHTS) for folder in (saved, source))
    unlike = sorted(trained.keys() ^ before.keys())
    if unlike:
        raise InputError("the adapter was saved with other tensors", where=source, got=", ".join(unlike[:3]))
    with Staging(target) as staged:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name != WEIGHTS:
                shutil.copyfile(path, staged.path / path.name)
        found = {name: tensor.to(before[name].dtype).contiguous() for name, tensor in trained.items()}
        save_file(found, staged.path / WEIGHTS, metadata={"format": "pt"})
        staged.commit()


def clear(folder: Path) -> None:
    """Remove a training's checkpoints, and nothing else that may lie beside them."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not there, or not empty
        folder.parent.rmdir()
