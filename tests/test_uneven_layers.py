"""Models whose layers differ in size, as Gemma 4's do: in the configuration, in the proof, in specs and in locks."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import transformers

import toy
from uneven_models import E2B, FULL, SLIDING
from unmergeable.config import canonical_config, class_defaults, structure
from unmergeable.errors import Contradiction, InputError
from unmergeable.match import match_spec
from unmergeable.prove.inventory import take_kinds, take_stock, take_uneven
from unmergeable.prove.shrink import shrink
from unmergeable.sealed import concrete_spec
from unmergeable.spec import Spec

pytestmark = pytest.mark.filterwarnings("ignore")

# --- configurations -----------------------------------------------------------------------------------------


def test_what_is_another_in_single_layers_counts_by_the_kinds_that_occur() -> None:
    def of(depth: int, period: int, **more: Any) -> dict[str, Any]:
        kinds = [FULL if layer % period == period - 1 else SLIDING for layer in range(depth)]
        others = {str(n).zfill(2): {"head_dim": 32, **more} for n in range(depth) if kinds[n] == FULL}
        return {"num_hidden_layers": depth, "layer_types": kinds, "per_layer_config": others}

    assert structure(of(6, 3)) == structure(of(30, 6)) == structure(of(6, 3, head_dim=512))
    other = of(6, 3)
    other["per_layer_config"]["00"] = {"head_dim": 32}
    assert structure(other) != structure(of(6, 3))
    assert structure(of(6, 3, hidden_act="relu")) != structure(of(6, 3))
    # Of layers that are not there nothing can be said: then all of it counts as it stands.
    other["per_layer_config"]["99"] = {"head_dim": 32}
    assert structure(other)["per_layer_config"].keys() == {"00", "02", "05", "99"}


def test_a_miniature_has_every_kind_of_layer_at_sizes_of_its_own() -> None:
    written = transformers.Gemma4TextConfig(
        **{**E2B, "num_hidden_layers": 12, "layer_types": E2B["layer_types"] * 2}
    )
    for given in (json.loads(written.to_json_string()), {**E2B, "num_hidden_layers": 6}):
        small = shrink(canonical_config(given, class_defaults(transformers.Gemma4TextConfig)), 0)
        kinds = small["layer_types"]
        assert small["num_hidden_layers"] == len(kinds) <= 8
        assert 0 < small["num_kv_shared_layers"] < len(kinds)
        # Those whose keys are other layers' come last, and each kind of them has a layer to take keys from.
        assert set(kinds[: -small["num_kv_shared_layers"]]) == set(kinds[-small["num_kv_shared_layers"] :])
        if "per_layer_config" in small:
            full = {str(layer) for layer, kind in enumerate(kinds) if kind == FULL}
            assert small["per_layer_config"] == {layer: {"head_dim": 2 * small["head_dim"]} for layer in full}
        else:
            assert small["global_head_dim"] == 2 * small["head_dim"]
        assert small["vocab_size_per_layer_input"] == small["vocab_size"] < 320


def test_parts_that_may_be_missing_are_missing() -> None:
    defaults = class_defaults(transformers.Gemma4Config)
    for given in ({}, {"audio_config": None}):
        found = canonical_config(given, defaults)
        assert found["audio_config"] is None
    assert canonical_config({"audio_config": {}}, defaults)["audio_config"]["conv_kernel_size"] == 5
    # Others have what their class has by default.
    whole = canonical_config({}, class_defaults(transformers.CLIPConfig))
    assert whole["vision_config"]["patch_size"] == 32


# --- specs --------------------------------------------------------------------------------------------------


def uneven_toy() -> tuple[Spec, dict[str, tuple[int, ...]]]:
    """The toy with one expert layer twice as wide, in tensors with the expert in their names."""
    data = copy.deepcopy(toy.spec_dict())
    named = next(site for site in data["sites"] if site["name"].endswith("named"))
    named["sizes"] = {**named["sizes"], "f": "*"}
    shapes = {name: array.shape for name, array in toy.tensors().items()}
    for name, shape in shapes.items():
        if name.startswith("l.1.x."):
            shapes[name] = tuple(24 if n == 12 else n for n in shape)
    return Spec.from_dict(data), shapes


def test_a_site_is_matched_once_for_every_size() -> None:
    spec, shapes = uneven_toy()
    match = match_spec(spec, shapes, toy.CONFIG)
    assert len(match.sites) == len(spec.sites) + 1
    small, large = (one for one in match.sites if one.site.name.endswith("named"))
    assert (small.acted, large.acted) == (12, 24)
    assert small.instances == tuple((0, e) for e in range(4))
    assert large.instances == tuple((1, e) for e in range(4))
    for name, parts in match.parts.items():
        for part in parts:
            matched = match.sites[part.site]
            assert tuple(part.dims[dim] for dim in matched.site.name_dims) in matched.instances, name
    # In the manifest the size stays open, all others are numbers, and it matches without a config.
    sealed = concrete_spec(match)
    sizes = next(dict(site.sizes) for site in sealed.sites if site.name.endswith("named"))
    assert sizes.keys() >= set("grace")
    assert sizes.pop("f") == "*"
    assert all(map(str.isdecimal, sizes.values()))
    assert [one.sizes for one in match_spec(sealed, shapes, {}).sites] == [one.sizes for one in match.sites]


def test_a_site_of_some_layers_has_the_sizes_of_those() -> None:
    spec, shapes = uneven_toy()
    data = spec.as_dict()
    next(site for site in data["sites"] if site["name"].endswith("named"))["only"] = {"l": "1"}
    data["untouched"] += [f"l.{{l}}.x.{{e}}.{name}" for name in ("gate", "up", "down")]
    match = match_spec(Spec.from_dict(data), shapes, toy.CONFIG)
    (found,) = (one for one in match.sites if one.site.name.endswith("named"))
    assert (found.acted, found.instances) == (24, tuple((1, e) for e in range(4)))


def test_layers_may_differ_and_the_tensors_of_one_may_not() -> None:
    spec, shapes = uneven_toy()
    shapes["l.1.x.2.down"] = (24, 12)
    with pytest.raises(Contradiction, match=r"l\.1\.x\.2\.down: axis 1 is 'f' = 24 by the config, got 12"):
        match_spec(spec, shapes, toy.CONFIG)
    _, shapes = uneven_toy()
    for name in [name for name in shapes if name.startswith("l.1.x.2.gate")]:
        del shapes[name]
    with pytest.raises(InputError, match=r"l\.1\.x\.2\."):
        match_spec(spec, shapes, toy.CONFIG)


def test_a_size_that_no_axis_has_to_itself_cannot_be_found() -> None:
    data = copy.deepcopy(toy.spec_dict())
    data["sites"][0]["sizes"] = {**data["sites"][0]["sizes"], "c": "*"}
    with pytest.raises(InputError, match="no axis has the size of 'c' by itself"):
        Spec.from_dict(data)


def test_a_site_of_some_layers_is_matched_there_alone() -> None:
    data = copy.deepcopy(toy.spec_dict())
    data["format"], data["sites"][1]["only"] = 2, {"l": "part.kinds=b"}
    spec = Spec.from_dict(data)
    assert (spec.as_dict()["format"], toy.spec().as_dict()["format"]) == (2, 1)
    assert Spec.from_dict(spec.as_dict()).digest == spec.digest != toy.spec().digest
    shapes = {name: array.shape for name, array in toy.tensors().items()}
    match = match_spec(spec, shapes, {**toy.CONFIG, "part": {"kinds": ["a", "b"]}})
    assert [one.instances for one in match.sites[:2]] == [((0,), (1,)), ((1,),)]
    sealed = concrete_spec(match)
    assert sealed.sites[1].only == {"l": "1"}
    assert [one.instances for one in match_spec(sealed, shapes, {}).sites] == [
        one.instances for one in match.sites
    ]
    for config in (toy.CONFIG, {**toy.CONFIG, "part": {"kinds": "b"}}):
        with pytest.raises(InputError, match="does not say which layers are of one kind"):
            match_spec(spec, shapes, config)
    # Where the site is, its tensors have the sizes that it has by the config, and all are there.
    gone = {name: shape for name, shape in shapes.items() if name != "l.1.v.bias"}
    with pytest.raises(InputError, match=r"missing l\.1\.v\.bias, which l\.\{l\}\.vo needs"):
        match_spec(spec, gone, {**toy.CONFIG, "part": {"kinds": ["a", "b"]}})


def shared_values(**more: Any) -> Spec:
    """Layers of which some take the values of others: one site of all of them."""
    data = copy.deepcopy(toy.spec_dict())
    slots = [
        {"tensor": "l.{l}.v", "index": {"0": "j"}, "power": 1},
        {"tensor": "l.{l}.o", "index": {"1": "j"}, "power": -1},
    ]
    data["sites"] = [{**data["sites"][1], "per": [], "sizes": {"j": "head_dim"}, "slots": slots, **more}]
    data["untouched"] = ["l.{l}.v", "l.{l}.o"]
    return Spec.from_dict({**data, "format": 3})


SHARED = {"num_hidden_layers": 5, "num_kv_shared_layers": 3, "head_dim": 8, "kinds": list("abaab")}


def test_layers_that_take_values_of_others_have_one_element() -> None:
    shapes = {**{f"l.{n}.o": (6, 8) for n in range(5)}, **{f"l.{n}.v": (8, 6) for n in range(2)}}
    for only, numbers in (({}, {}), ({"l": "kinds=a"}, {"l": "0 2 3"})):
        spec = shared_values(only=only)
        assert spec.as_dict()["format"] == (3 if only else 1)
        match = match_spec(spec, shapes, SHARED)
        assert [one.instances for one in match.sites] == [((),)]
        assert len(match.parts) == (4 if only else 7)
        sealed = concrete_spec(match)
        assert sealed.sites[0].only == numbers
        assert match_spec(sealed, shapes, {}).parts.keys() == match.parts.keys()
    # As many layers are without values of their own as the config says somewhere.
    shapes["l.2.v"] = (8, 6)
    with pytest.raises(
        Contradiction, match=r"2 layers without l\.\{l\}\.v, a number of layers that the config"
    ):
        match_spec(spec, shapes, SHARED)
    match_spec(spec, shapes, {**SHARED, "num_kv_shared_layers": 2})


def test_a_size_of_a_kind_of_layers_is_what_the_config_says_of_these() -> None:
    spec = shared_values(only={"l": "text.kinds=b"}, sizes={"j": "text.head_dim"})
    shapes = {f"l.{n}.{name}": (4, 4) for n in (1, 4) for name in "vo"}
    text = {**SHARED, "per_layer_config": {"01": {"head_dim": 4}, "4": {"head_dim": 4}}}
    assert match_spec(spec, shapes, {"text": text}, whole=False).sites[0].acted == 4
    # Layers of one kind that differ all the same have no size.
    text["per_layer_config"] = {"01": {"head_dim": 4}}
    with pytest.raises(Contradiction, match="axis 0 is 'j' = 8 by the config, got 4"):
        match_spec(spec, shapes, {"text": text}, whole=False)


@pytest.mark.parametrize(
    "only", [{"l": "kinds"}, {"l": ""}, {"l": "kinds=a b"}, {"g": "kinds=a"}, {"l": "1,2"}]
)
def test_what_is_no_choice_of_layers_is_refused(only: dict[str, str]) -> None:
    data = copy.deepcopy(toy.spec_dict())
    data["sites"][0]["only"] = only
    with pytest.raises(InputError, match="not a choice of layers"):
        Spec.from_dict(data)


# --- proofs -------------------------------------------------------------------------------------------------


def test_patterns_of_several_shapes_have_a_size_for_every_kind_of_layer() -> None:
    def shapes(*widths: int) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for layer, width in enumerate(widths):
            found |= {f"h.{layer}.up": (width, 7), f"h.{layer}.down": (7, width), f"h.{layer}.norm": (7,)}
        return {**found, "h.0.first": (3, 3)}

    every = [shapes(4, 4, 8), shapes(6, 10, 6)]
    assert {pattern.name for pattern in take_stock(every)} == {"h.{l}.norm", "h.{l}.first"}
    found = {pattern.name: pattern.axes for pattern in take_uneven(every)}
    assert found == {"h.{l}.up": ((4, 8, 6, 10), (7,) * 4), "h.{l}.down": ((7,) * 4, (4, 8, 6, 10))}
    # One that a layer lacks is not among them, and does not take the others with it.
    del every[0]["h.2.up"]
    assert {pattern.name for pattern in take_uneven(every)} == {"h.{l}.down"}


def test_kinds_of_layers_are_entries_of_lists_with_one_a_layer() -> None:
    def shapes(widths: dict[str, int], kinds: list[str]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"embed": (9, 7)}
        for layer, kind in enumerate(kinds):
            found |= {f"h.{layer}.up": (widths[kind], 7), f"h.{layer}.norm": (7,)}
        return found

    lists = [["a", "b", "a"], ["b", "a"]]
    every = [shapes({"a": 4, "b": 8}, lists[0]), shapes({"a": 6, "b": 10}, lists[1])]
    configs = [{"part": {"layer_types": kinds, "other": kinds}} for kinds in lists]
    found = take_kinds(every, configs, take_uneven(every))
    axes = {kind: {pattern.name: pattern.axes for pattern in patterns} for kind, patterns in found.items()}
    assert axes == {
        "part.layer_types=a": {"h.{l}.up": ((4, 6), (7, 7)), "h.{l}.norm": ((7, 7),)},
        "part.layer_types=b": {"h.{l}.up": ((8, 10), (7, 7)), "h.{l}.norm": ((7, 7),)},
    }
    # Of names that begin with a number, those that do not are of no layer.
    bare = [{name.removeprefix("h."): shape for name, shape in each.items()} for each in every]
    found = take_kinds(bare, configs, take_uneven(bare))
    assert {pattern.name for pattern in found["part.layer_types=a"]} == {"{l}.up", "{l}.norm"}
    # A list with more or fewer entries is of other layers.
    configs[0]["part"]["layer_types"].append("a")
    assert take_kinds(every, configs, take_uneven(every)) == {}
