"""How far fine-tunes are from their base, and how alike their ways are, from the real base and from others of its line.

    python bench/lineage.py --zoo PATH

Figures behind the warnings of `unmergeable audit` and `merge`: distances (`merging.tensors.distance`), and cosines of
task vectors (`audit.lineage.cosines`). Other models of the line: a sibling, and the middle of the way to one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from unmergeable import zoo
from unmergeable.audit.lineage import cosines
from unmergeable.merging.tensors import distance, load_state

if TYPE_CHECKING:
    from unmergeable.merging import State

HALF = 0.5  # of a sibling's way from the base


def lines(folder: Path, zoo_path: Path | None) -> Iterator[tuple[str, State, dict[str, State]]]:
    """By zoo and family: its base and fine-tunes."""
    zoo.copy_to(folder)
    tasks = {task: load_state(folder / task) for task in zoo.tasks()}
    yield "embedded zoo, ViT", load_state(folder / "base"), tasks
    if zoo_path is None:
        return
    for family in ("llama", "gpt2"):
        models = {task: load_state(zoo_path / f"{family}-{task}") for task in ("c", "python", "js")}
        yield f"measuring zoo, {family}", load_state(zoo_path / f"{family}-base"), models
    models = {task: load_state(zoo_path / f"vit-{task}") for task in ("fmnist", "mnist", "latin", "cyr")}
    yield "measuring zoo, ViT", load_state(zoo_path / "vit-base-fmnist-head"), models


def between(base: State, model: State, part: float) -> State:
    """So far on the way from the base to the model; where they differ in shape, the base's."""
    fits = {name: name in model and model[name].shape == one.shape for name, one in base.items()}
    return {
        name: one + part * (model[name] - one) if fits[name] and one.is_floating_point() else one
        for name, one in base.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, help="the measuring zoo; the embedded one alone, if not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unmergeable-lineage-") as work:
        for name, base, models in lines(Path(work) / "zoo", args.zoo):
            print(name)
            far = [distance(base, model) for model in models.values()]
            print(f"  distances from the base: {min(far):.3f} to {max(far):.3f}")
            for pair, cosine in cosines(base, models).items():
                print(f"  cosine of {' and '.join(pair)}: {cosine:.3f}")
            for sibling, state in models.items():
                rest = {other: model for other, model in models.items() if other != sibling}
                for said, wrong in ((sibling, state), (f"half of {sibling}", between(base, state, HALF))):
                    found = cosines(wrong, rest).values()
                    print(f"  from {said}: cosines of the rest {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()
