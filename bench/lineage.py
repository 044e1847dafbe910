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

from harden_cases import cases, paths
from unmergeable.audit.lineage import cosines
from unmergeable.merging.tensors import distance, load_state

if TYPE_CHECKING:
    from unmergeable.merging import State

HALF = 0.5  # of a sibling's way from the base


def families(work: Path, zoo_path: Path | None) -> Iterator[tuple[str, State, dict[str, State]]]:
    """By family: its base and fine-tunes."""
    for family in ("embedded",) if zoo_path is None else ("embedded", "text", "text2", "images"):
        base, models, _ = paths(next(cases((family,))), zoo_path or work, work)
        yield family, load_state(base), {task: load_state(model) for task, model in models.items()}


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
        for name, base, models in families(Path(work), args.zoo):
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
