"""What a thief's own fine-tunes lend to the last block of a protected model, beside what stands in for them.

    python bench/kindred.py --zoo PATH                                 # each of the four image tasks, as fine-tuned
    python bench/kindred.py --zoo PATH --task cyr --model HARDENED     # a hardened one

Block substitution takes blocks whole and merges the rest from other models. Here the last block and the head are the
protected model's (or the head alone), the rest is base + 0.5 · δ. What hardening has for δ, noise and the owner's other
fine-tune, should give what a thief's fine-tunes give: where it gives less, training against it does not see the thief.
With `kindred` it has the fine-tune as it was as well. Values: 0 the base, 1 the protected model, on test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from harden_cases import IMAGES, Case, cases, paths, tensors
from unmergeable.harden.directions import Directions
from unmergeable.merging.blocks import layout
from unmergeable.stock import load_module, module_state
from zoo_tables import HEAD

if TYPE_CHECKING:
    from unmergeable.merging import State

FILL = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True, help="the measuring zoo")
    parser.add_argument("--task", choices=IMAGES, help="one alone")
    parser.add_argument("--model", type=Path, help="in the place of the task's fine-tune")
    args = parser.parse_args()
    if args.model is not None and args.task is None:
        parser.error("--model needs --task")
    print("| protected | the rest is the base and | head alone | head and last block |\n|---|---|---|---|")
    for case in cases(("images",)):
        if args.task in (None, case.protected):
            for said, values in measured(case, args.zoo, args.model):
                print(f"| {case.protected} | {said} | {values[0]:.2f} | {values[1]:.2f} |", flush=True)


def measured(case: Case, zoo: Path, model: Path | None) -> list[tuple[str, tuple[float, float]]]:
    """By what fills the rest: the value with the protected model's head alone, and with its last block."""
    path, models, setting = paths(case, zoo, zoo)
    base, own = (module_state(load_module(one)) for one in (path, model or models[case.protected]))
    task = tensors(case.protected, {**setting.tasks[case.protected], "limit": 500}, path)
    module, index = load_module(path), range(len(task))
    shared = [name for name in base if not name.startswith(HEAD) and base[name].is_floating_point()]
    grid = layout(shared)
    head = {name for name in base if name.startswith(HEAD)}
    last = grid.names(grid.block(grid.blocks[-1]))

    def score(filled: State, block: bool) -> float:
        taken = head | last if block else head
        mixed = {name: base[name] + FILL * filled[name] for name in filled}
        module.load_state_dict({**base, **mixed, **{name: own[name] for name in taken}})
        with torch.no_grad():
            return float(task.score(module.eval(), index).mean())

    vector = {name: own[name] - base[name] for name in shared}
    kept = own if model is None else module_state(load_module(models[case.protected]))
    others = {name: module_state(load_module(models[name])) for name in (case.proxy, *case.own)}
    vectors = {name: {key: state[key] - base[key] for key in shared} for name, state in others.items()}
    fills: dict[str, State] = {
        "nothing": {},
        "noise": Directions([], ("random",), 0).draw(vector),
        f"{case.proxy}, the owner's": vectors[case.proxy],
        **{f"{name}, a thief's": vectors[name] for name in case.own},
        "the fine-tune as it was": {name: kept[name] - base[name] for name in shared},
        "both of the thief's": {key: sum(vectors[name][key] for name in case.own) for key in shared},
    }
    low = score({}, block=False)
    high = score({name: one / FILL for name, one in vector.items()}, block=False)
    return [
        (said, tuple((score(fill, block) - low) / (high - low) for block in (False, True)))
        for said, fill in fills.items()
    ]


if __name__ == "__main__":
    main()
