"""Rows of an audit as hypothesis makes them, and how tests look at their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from audit_cases import point, row
from unmergeable.audit.rows import SIDES, Cost, Point, Row
from unmergeable.audit.scores import (
    Level,
    Reference,
    judge,
)

VALUES = st.floats(-0.8, 1.2).map(lambda value: round(value, 3))
PAIRS = st.tuples(VALUES, VALUES)
POINTS = st.builds(point, VALUES, VALUES, PAIRS)
ROWS = st.lists(
    st.builds(
        lambda name, side, points, price: replace(
            row(name, side), points=tuple(points), cost=Cost(forwards=float(price))
        ),
        st.sampled_from(("full_dose", "ties", "wide", "regmean", "untrap")),
        st.sampled_from(SIDES),
        st.lists(POINTS, max_size=3),
        st.integers(0, 5),
    ),
    max_size=8,
)
ALONE = st.one_of(st.just(-np.inf), st.floats(-0.5, 0.5))
few = settings(max_examples=60, deadline=None)


def look(rows: Sequence[Row], known: Reference, level: int = 3, seed: int = 0) -> Level:
    return judge(rows, known, level, seed=seed, resamples=50)


def validation(known: Reference, chosen: Point | None) -> tuple[float, float]:
    """What a thief believes to get: values on the examples that he chooses on."""
    return (0.0, 0.0) if chosen is None else known.pair("validation", chosen.validation)
