"""Index strings: parsing, sizes, and that the parts of an axis cover it once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmergeable.errors import InputError
from unmergeable.index import parse_index

SIZES = {"g": 3, "r": 2, "d": 4, "v": 5, "n": 2, "c": 2, "a": 2, "f": 7}


def positions(text: str) -> list[int]:
    return parse_index(text).view(SIZES).positions().reshape(-1).tolist()


def test_a_product_is_the_whole_axis_in_order() -> None:
    assert positions("g r d") == list(range(24))
    assert parse_index("g r d").view(SIZES).total == 24


@pytest.mark.parametrize(
    ("parts", "total"),
    [
        (["[g r d | g d | g d].0", "[g r d | g d | g d].1", "[g r d | g d | g d].2"], 48),
        (["g [r d | d | d].0", "g [r d | d | d].1", "g [r d | d | d].2"], 48),
        (["f [1 | 1].0", "f [1 | 1].1"], 14),
        (["g [d | v].0", "g [d | v].1"], 27),
        (["g d [1 | 1 | 1].0", "g d [1 | 1 | 1].1", "g d [1 | 1 | 1].2"], 36),
        (
            [f"g [[c a | n] | [c a | n]].{i}.{j}" for i in range(2) for j in range(2)],
            36,
        ),
    ],
)
def test_parts_cover_the_axis_once(parts: list[str], total: int) -> None:
    covered = sorted(position for part in parts for position in positions(part))
    assert covered == list(range(total))
    assert all(parse_index(part).view(SIZES).total == total for part in parts)


def test_interleaved_rows_alternate() -> None:
    assert positions("f [1 | 1].1") == [1, 3, 5, 7, 9, 11, 13]


def test_rotary_layouts_pair_what_they_should() -> None:
    half = parse_index("g c a").view(SIZES).positions(("g", "a", "c"))
    interleaved = parse_index("g a c").view(SIZES).positions(("g", "a", "c"))
    assert half[0].tolist() == [[0, 2], [1, 3]]
    assert interleaved[0].tolist() == [[0, 1], [2, 3]]


def test_positions_follow_the_order_asked_for() -> None:
    view = parse_index("g r d").view(SIZES)
    assert np.array_equal(view.positions(("r", "d", "g")), view.positions().transpose(1, 2, 0))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "[g | d",
        "g ]",
        "[g | d]",
        "[g | d].2",
        "[g | d].0.1",
        "g.0",
        "g g",
        "[a | b].0 [c | d]",
        "g + d",
        "[|].0",
    ],
)
def test_what_is_not_an_index_string_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_index(text)


def test_a_missing_size_names_the_dim() -> None:
    with pytest.raises(InputError, match="no size for q") as caught:
        parse_index("[q | g].1").view({"g": 2})
    assert "sizes of g, q" in str(caught.value)


@st.composite
def products(draw: st.DrawFn, depth: int = 0) -> tuple[str, list[str]]:
    """A random product, and the paths of all of its segments."""
    names = draw(st.lists(st.sampled_from("grdvncaf"), min_size=1, max_size=3, unique=True))
    if depth == 2 or draw(st.booleans()):
        return " ".join(names), [""]
    segments = draw(st.lists(products(depth + 1), min_size=2, max_size=3))
    text = f"u{depth} [{' | '.join(inner for inner, _ in segments)}]"
    return text, [f".{k}{path}" for k, (_, paths) in enumerate(segments) for path in paths]


@given(products())
def test_every_nesting_covers_its_axis_once(drawn: tuple[str, list[str]]) -> None:
    text, paths = drawn
    sizes = {**SIZES, "u0": 2, "u1": 3}
    views = [parse_index(text + path).view(sizes) for path in paths]
    covered = np.concatenate([view.positions().reshape(-1) for view in views])
    assert sorted(covered.tolist()) == list(range(views[0].total))
