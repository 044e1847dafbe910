"""What chains cost: with the preparation of the model, and with the search for what is repaired."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from audit_cases import row
from unmergeable.audit.costs import in_full
from unmergeable.audit.rows import Cost, Row


def priced(name: str, cost: Cost, side: Any = "protected", prepared: str | None = None, **facts: Any) -> Row:
    return replace(row(name, side, (0.5, 0.5), prepared=prepared), cost=cost, facts=facts)


RAW = priced("probe", Cost(forwards=10, seconds=2))
ALIGNED = priced("probe", Cost(forwards=10, seconds=9), prepared="anchor-coupled")
TIES = priced("ties", Cost(forwards=30, seconds=3), prepared="anchor-coupled")


def test_a_preparation_is_on_the_bill_of_all_who_use_it() -> None:
    found = in_full([RAW, ALIGNED, TIES])
    assert [one.cost.seconds for one in found] == [2, 9, pytest.approx(10)]
    assert [one.cost.forwards for one in found] == [10, 10, 30]
    # Of the other side's nothing is known, and a probe that took less cost nothing.
    assert in_full([RAW, TIES])[1] == TIES
    fast = replace(ALIGNED, cost=Cost(seconds=1))
    assert in_full([RAW, fast, TIES])[2] == TIES
    assert in_full([RAW, ALIGNED, replace(TIES, side="plain")])[2].cost == TIES.cost


def test_a_repair_pays_for_the_search_that_it_begins_with() -> None:
    starts = [
        {"attack": "ties", "prepared": "anchor-coupled", "options": {"weight": 0.4}},
        {"attack": "ties", "prepared": "anchor-coupled", "options": {"weight": 0.6}},
        {"attack": "task_arithmetic", "prepared": None, "options": {"others": 0.5}},
    ]
    repair = priced("repair-16", Cost(labelled=32, forwards=500, seconds=20), starts=starts)
    found = in_full([RAW, ALIGNED, TIES, repair])[3]
    assert found.cost == Cost(labelled=32, forwards=530, seconds=pytest.approx(30))
