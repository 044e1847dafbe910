"""What `test_attacks_proof` runs in the prover's child: known cases of preparations on a tiny model of a family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZE = 0.02  # of what fine-tuning changes; weights of the miniatures are of size 0.1 and more


def solved(config: dict[str, Any], folder: str) -> dict[str, dict[str, Any] | str]:
    """By preparation, how it did on its known case, or why it does not apply."""
    from merging_models import nudged
    from unmergeable.attacks.prepare import OTHER, PREPARATIONS
    from unmergeable.attacks.proof import prove
    from unmergeable.errors import InputError
    from unmergeable.prove.miniature import build_miniature

    base = build_miniature(config, shape=0).model
    paths = {name: Path(folder) / name for name in ("base", "plain", "other")}
    for number, path in enumerate(paths.values()):
        (nudged(base, number, SIZE) if number else base).save_pretrained(path)
    found: dict[str, dict[str, Any] | str] = {}
    for one in PREPARATIONS:
        if one.solves is not None:
            anchor = paths["other" if one.anchor == OTHER else "base"]
            try:
                found[one.name] = prove(one, paths["plain"], anchor, 0).as_dict()
            except InputError as error:
                found[one.name] = str(error)
    return found
