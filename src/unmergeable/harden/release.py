"""What `harden` leaves behind: the checkpoint with other numbers in it, and nothing of the training."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Staging
from ..errors import InputError
from ..merging.vectors import WEIGHTS
from ..merging.write import saved_state, write_merged
from ..stock import quiet

if TYPE_CHECKING:
    from ..keys import Key
    from .owner import Owner


def write(owner: Owner, source: Path, target: Path, work: Path, lock: Key | None) -> None:
    """The trained weights with the fine-tune's files, names and dtypes; locked, if there is a key."""
    from ..lock import lock as lock_checkpoint

    module: Any = owner.module
    with tempfile.TemporaryDirectory(dir=work) as folder:
        saved, hardened = Path(folder) / "saved", Path(folder) / "hardened"
        if owner.adapter:
            # peft asks the hub by itself whether an adapter's base has other embeddings: its files here say so.
            with quiet():
                module.save_pretrained(saved, save_embedding_layers=False)
            _adapter(saved, source, target)
        elif lock is None:
            write_merged(target, saved_state(module, saved, source), source)
        else:
            write_merged(hardened, saved_state(module, saved, source), source)
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
