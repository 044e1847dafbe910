"""The protected model as a thief prepares it: through checkpoints, as `unmergeable attack` does it, or in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..attacks import attack
from ..attacks.prepare import COLLUDE, COLLUSIONS, OTHER, one_by_one, preparation
from ..errors import InputError
from ..merging.tensors import rename_like
from ..stock import load_module, module_state
from .config import RELEASE
from .rows import Side

if TYPE_CHECKING:
    from .bench import Bench

ALIGNMENT = "anchor-coupled"  # what releases are aligned by


def prepared(bench: Bench, side: Side, name: str) -> dict[str, torch.Tensor]:
    """The protected model of a side after a preparation, or after several; names as in the bench's.

    Args:
        name: of a preparation, or of several with `THEN` between them.

    Raises:
        InputError: the preparation does not apply.
    """
    model, names = bench.models[side], one_by_one(name)
    path: Path | None = bench.paths[side]
    for number, one in enumerate(names, 1):
        if one in COLLUSIONS:
            model, path = _colluded(bench, side, one), None
            continue
        chosen = preparation(one)
        if chosen.change is not None:
            model, path = chosen.change(model, bench.base, bench.seed), None
            continue
        assert path is not None  # attacks are on checkpoints: nothing that is done in memory comes before one
        anchor = bench.paths["base" if chosen.anchor != OTHER else bench.others[0]]
        path = _attacked(bench, path, anchor, chosen.steps, side, "+".join(names[:number]))
        model = _load(bench, side, path)
    return model


def _colluded(bench: Bench, side: Side, name: str) -> dict[str, torch.Tensor]:
    """The mean of all releases."""
    releases = [role for role in bench.models if role.startswith(RELEASE)]
    if name == COLLUDE:
        return _mean([bench.models[one] for one in (side, *releases)])
    return _mean(_aligned(bench, side, releases))


def _aligned(bench: Bench, side: Side, releases: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """All releases in one form: the first aligned to the base, for merges; the others to what came of it.

    They have what they were trained to in common with the first, not with the base: they come nearer to it.
    """
    steps = preparation(ALIGNMENT).steps
    first = _attacked(bench, bench.paths[side], bench.paths["base"], steps, side, ALIGNMENT)
    found = [_load(bench, side, first)]
    for number, role in enumerate(releases, 2):
        path = _attacked(bench, bench.paths[role], first, steps, side, f"release-{number}")
        found.append(_load(bench, side, path))
    return found


def _attacked(
    bench: Bench,
    source: Path,
    anchor: Path,
    steps: Sequence[tuple[str, Mapping[str, Any]]],
    side: Side,
    label: str,
) -> Path:
    """A checkpoint after attacks on it, one after another; each is made once."""
    for number, (step, options) in enumerate(steps, 1):
        done = "+".join(step for step, _ in steps[:number])
        target = bench.work / "prepared" / side / f"{done}-{label}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            once(target, _attacking(step, source, target, anchor, bench.seed, options))
        source = target
    return source


def _attacking(
    step: str, source: Path, target: Path, anchor: Path, seed: int, options: Mapping[str, Any]
) -> Callable[[], object]:
    return lambda: attack(step, source, target, base=anchor, seed=seed, **options)


def _load(bench: Bench, side: Side, path: Path) -> dict[str, torch.Tensor]:
    state = module_state(load_module(path, device=bench.device))
    renamed = rename_like(list(bench.models[side]), state)[0]
    return {name: tensor.clone() for name, tensor in renamed.items()}


def _mean(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }


def once(target: Path, make: Callable[[], object]) -> None:
    """Make a folder that appears whole or not at all, where another worker may be making it too."""
    try:
        make()
    except InputError:
        if not target.exists():
            raise
