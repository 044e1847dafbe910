"""What a thief's own fine-tunes lend to the last block of a protected model, beside what stands in for them.

    python bench/kindred.py --zoo PATH                                 # each of the four image tasks, as fine-tuned
    python bench/kindred.py --zoo PATH --task cyr --model HARDENED     # a hardened one

Block substitution takes blocks whole and merges the rest from other models. Here the last block and the head are the
protected model's (or the head alone), the rest is base + 0.5 · δ. What hardening has for δ, noise and the owner's other
fine-tune, should give what a thief's fine-tunes give: where it gives less, training against it does not see the thief.
Values: 0 the base, 1 the protected model, on test images.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from harden_cases import Case, cases, paths, tensors
from unmergeable.harden.directions import Directions
from unmergeable.stock import load_module, module_state

FILL = 0.5
HEAD = "classifier."
State = Mapping[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True, help="the measuring zoo")
    parser.add_argument("--task", help="one alone")
    parser.add_argument("--model", type=Path, help="in the place of the task's fine-tune")
    args = parser.parse_args()
    if args.model is not None and args.task is None:
        parser.error("--model needs --task")
    print("| protected | the rest is the base and | head alone | head and last block |\n|---|---|---|---|")
    for case in cases(("images",)):
        if args.task in (None, case.protected):
            for said, values in measured(case, args.zoo, args.model):
                print(f"| {case.protected} | {said} | {values[0]:.2f} | {values[1]:.2f} |", flush=True)


def loaded(model: Path) -> State:
    """Its tensors, by the names of its class."""
    return {name: one.clone() for name, one in module_state(load_module(model)).items()}


def measured(case: Case, zoo: Path, model: Path | None) -> list[tuple[str, tuple[float, float]]]:
    """By what fills the rest: the value with the protected model's head alone, and with its last block."""
    path, models, setting = paths(case, zoo, zoo)
    base, own = loaded(path), loaded(model or models[case.protected])
    task = tensors(case.protected, {**setting.tasks[case.protected], "limit": 500}, path)
    module, index = load_module(path), range(len(task))
    shared = [name for name in base if not name.startswith(HEAD) and base[name].is_floating_point()]
    blocks = {int(part) for name in shared for part in name.split(".") if part.isdecimal()}
    last = f".{max(blocks)}."

    def score(filled: State, block: bool) -> float:
        taken = {name for name in base if name.startswith(HEAD) or (block and last in name)}
        mixed = {name: base[name] + FILL * filled[name] for name in filled}
        module.load_state_dict({**base, **mixed, **{name: own[name] for name in taken}})
        with torch.no_grad():
            return float(task.score(module.eval(), index).mean())

    vector = {name: own[name] - base[name] for name in shared}
    others = {name: loaded(models[name]) for name in (case.proxy, *case.own)}
    vectors = {name: {key: state[key] - base[key] for key in shared} for name, state in others.items()}
    fills: dict[str, State] = {
        "nothing": {},
        "noise": Directions([], ("random",), 0).draw(vector),
        f"{case.proxy}, the owner's": vectors[case.proxy],
        **{f"{name}, a thief's": vectors[name] for name in case.own},
        "both of the thief's": {key: sum(vectors[name][key] for name in case.own) for key in shared},
    }
    low = score({}, block=False)
    high = score({name: 2 * one for name, one in vector.items()}, block=False)
    return [
        (said, tuple((score(fill, block) - low) / (high - low) for block in (False, True)))
        for said, fill in fills.items()
    ]


if __name__ == "__main__":
    main()
