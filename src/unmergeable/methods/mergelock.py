"""`mergelock`: random invertible pairs on query-key and value-output, per head (MergeLock, arXiv 2509.01548).

The paper multiplies Q and K by A and A⁻ᵀ, V and O by B and B⁻¹, with A and B permutation × scale × random
matrix. Here each is drawn from what the site's group allows (under RoPE its commutant, under a query-key norm
signs of pairs), and the condition number is capped: the paper's unbounded matrix moves outputs by 1.6e-2.
"""

from __future__ import annotations

from ..groups import Element, Stream, group
from ..match import MatchedSite
from .context import CONDITION, Context, Drawn, draw_sites


def draw(context: Context) -> Drawn:
    """Elements of the whole group on attention sites; `options["condition"]` caps their condition number."""
    condition = float(context.options.get("condition", CONDITION))

    def one(matched: MatchedSite, stream: Stream, batch: int) -> Element | None:
        if matched.site.kind not in ("qk", "vo"):
            return None
        return group(matched.site.group).draw_dense(stream, batch, matched.acted, condition)

    return Drawn(draw_sites(context, "mergelock", one))
