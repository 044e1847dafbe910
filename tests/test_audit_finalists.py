"""Which merges are scored in full: what thieves would choose, what is well above the floors, what none beats."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unmergeable.audit.finalists import MARGINS, MOST, finalists, promising
from unmergeable.audit.rows import Look
from unmergeable.audit.scores import FLOORS

VALUES = st.floats(-1, 1.5, allow_nan=False)
PAIRS = st.lists(st.tuples(VALUES, VALUES), max_size=12)


def looks_at(*pairs: tuple[float, float]) -> list[Look]:
    return [Look({}, *pair) for pair in pairs]


@given(PAIRS, st.lists(VALUES, max_size=4), st.integers(1, 5))
def test_finalists(pairs: list[tuple[float, float]], floors: list[float], least: int) -> None:
    looks = looks_at(*pairs)
    found = finalists(looks, floors, least)
    assert len(set(found)) == len(found) >= min(least, len(looks))
    assert len(found) <= max(least, 1 + len(floors))
    if looks:
        assert looks[found[0]].joint == max(look.joint for look in looks)
    for floor in floors:
        within = [(look.protected, look.protected + look.own) for look in looks if look.own >= floor]
        best = [looks[number] for number in found if looks[number].own >= floor]
        if within:
            assert max(within) in [(look.protected, look.protected + look.own) for look in best]


@given(PAIRS, st.lists(VALUES, max_size=4))
def test_what_is_promising_is_the_finalists_and_no_more_than_so_many_others(
    pairs: list[tuple[float, float]], floors: list[float]
) -> None:
    looks = looks_at(*pairs)
    first, found = finalists(looks, floors), promising(looks, floors)
    assert found[: len(first)] == first
    assert len(set(found)) == len(found) <= max(len(first), min(MOST, 2 * len(first)))
    # What is added keeps a margin above a floor better than all others, or is beaten by none in both values.
    for number in found[len(first) :]:
        look = looks[number]
        best = [
            max((one.protected for one in looks if one.own >= floor + margin), default=np.inf)
            for floor in floors
            for margin in MARGINS
            if look.own >= floor + margin
        ]
        beaten = any(one.protected >= look.protected and one.own >= look.own and one != look for one in looks)
        assert look.protected in best or not beaten


def test_a_merge_above_the_floor_is_taken_beside_the_one_that_is_at_it_by_chance() -> None:
    """On few examples the best with a floor of 0.25 is just above it; on all of them it may be below."""
    looks = looks_at((0.9, 0.26), (0.7, 0.37), (0.6, 0.46), (0.5, 0.52), (0.1, 0.8), (0.3, 0.3))
    first = finalists(looks, FLOORS)
    assert {0, 3, 4} == set(first)
    assert {1, 2} <= set(promising(looks, FLOORS)) - set(first)
    assert 5 not in promising(looks, FLOORS)  # beaten in both


def test_what_no_other_merge_beats_is_taken() -> None:
    """A little below the floor on few examples, it may be above it on all of them."""
    looks = looks_at((0.5, 0.6), (0.95, 0.24), (0.6, 0.3), (0.4, 0.2), (0.3, 0.55))
    assert 1 not in finalists(looks, (0.25, 0.5))
    assert 1 in promising(looks, (0.25, 0.5))
