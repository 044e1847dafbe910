"""Whether fine-tunes began where the given base is: what they share of their way away from it says so.

Measured on four families of pictures and text (bench/lineage.py): task vectors of fine-tunes from their own base have
cosines of 0.03 to 0.17, of two tasks that are much alike up to 0.36. Seen from a sibling, all of them have the way to
the real base in common: the least cosine of three is 0.35 or more, and of two 0.41. From the middle of the way to a
sibling it is 0.11 or more, which is not told from the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..merging import State

# The least cosine of all pairs of task vectors beyond which the base is in doubt; one pair may be two tasks alike.
ALIKE, ALIKE_PAIR = 0.3, 0.4


def cosines(base: State, models: Mapping[str, State]) -> dict[tuple[str, str], float]:
    """The cosine of each two models' differences to the base, over what all of them share with it, in float64.

    A model that is the base has a cosine of 0 with every other one.
    """
    names = list(models)
    gram = torch.zeros(len(names), len(names), dtype=torch.float64)
    for name, origin in base.items():
        tensors = [model.get(name) for model in models.values()]
        if origin.is_floating_point() and all(t is not None and t.shape == origin.shape for t in tensors):
            start = origin.double().flatten()
            rows = torch.stack(
                [t.to(origin.device).double().flatten() - start for t in tensors if t is not None]
            )
            gram += (rows @ rows.T).cpu()
    lengths = gram.diagonal().sqrt().clamp(min=1e-300)
    found = gram / lengths / lengths[:, None]
    return {(names[i], names[j]): float(found[i, j]) for i, j in combinations(range(len(names)), 2)}


def doubtful_base(base: State, models: Mapping[str, State]) -> str | None:
    """A note if all fine-tunes moved away from the base in one direction; None if they did not."""
    found = cosines(base, models)
    if not found:
        return None
    least = min(found.values())
    if not least > (ALIKE_PAIR if len(found) == 1 else ALIKE):
        return None
    return (
        f"the changes of {', '.join(models)} against the base are alike, with cosines of {least:.2f} and more, where "
        "fine-tunes of one base have about 0.1: is this the model that they were fine-tuned from? With another one "
        "of its line, merges lose what they should keep, protected or not"
    )
