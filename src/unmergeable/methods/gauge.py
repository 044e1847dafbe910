"""`gauge`: the largest proven group at every site, with capped condition number.

The strongest lock that the architecture has. Dense elements round: the lock reports how much.
"""

from __future__ import annotations

from ..groups import Element, Stream, group
from ..match import MatchedSite
from .context import CONDITION, Context, Drawn, draw_sites


def draw(context: Context) -> Drawn:
    """Elements of every site's whole group; `options["condition"]` caps their condition number."""
    condition = float(context.options.get("condition", CONDITION))

    def one(matched: MatchedSite, stream: Stream, batch: int) -> Element:
        return group(matched.site.group).draw_dense(stream, batch, matched.acted, condition)

    return Drawn(draw_sites(context, "gauge", one))
