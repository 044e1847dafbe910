"""Specs as data: JSON there and back, what is refused, sizes, and matching against tensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toy
from unmergeable.arithmetic import evaluate_size
from unmergeable.errors import InputError
from unmergeable.match import match_spec
from unmergeable.spec import Spec, fill, name_regex

FIXTURES = Path(__file__).parent / "fixtures"


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in toy.tensors().items()}


def test_json_there_and_back() -> None:
    spec = Spec.from_dict(toy.spec_dict())
    again = Spec.from_dict(spec.as_dict())
    assert again.as_dict() == spec.as_dict()
    assert again.digest == spec.digest


@pytest.mark.parametrize(
    ("number", "digest"),
    [
        (1, "766924c7d8896a85d8a63bfdfda7122b4d48da25d612a2f95db7e89ddec7a647"),
        (2, "129f8cb480f0ee5b0d16024e12c30fa343981a7b3856a4fb1be49b76f0349339"),
        (3, "9c2097026ab313cc0ed966d25495eed3d4a5a2fca41cb41ec1e28d9c7acea914"),
    ],
)
def test_every_format_is_read_for_ever(number: int, digest: str) -> None:
    spec = Spec.from_dict(json.loads((FIXTURES / f"spec-{number}.json").read_text()))
    assert spec.digest == digest
    assert spec.as_dict()["format"] == number


def test_the_digest_ignores_evidence_alone() -> None:
    data = toy.spec_dict()
    digest = Spec.from_dict(data).digest
    data["sites"][0]["evidence"] = {"error": 1.0}
    data["evidence"] = {"torch": "0"}
    assert Spec.from_dict(data).digest == digest
    data["sites"][0]["group"] = "rotation"
    assert Spec.from_dict(data).digest != digest


def without(path: list[Any]) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for part in path[:-1]:
            data = data[part]
        del data[path[-1]]

    return change


def with_(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for part in path[:-1]:
            data = data[part]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(["format"]), "not a spec"),
        (with_(["format"], 4), "newer format"),
        (without(["sites"]), "missing or malformed"),
        (without(["sites", 0, "slots", 0, "tensor"]), "missing or malformed"),
        (with_(["sites", 0, "group"], "spin"), "no such group"),
        (with_(["sites", 0, "kind"], "glue"), "unknown kind"),
        (with_(["sites", 0, "slots"], []), "without tensors"),
        (with_(["sites", 0, "acts"], "z"), "neither on an axis nor in the name"),
        (with_(["sites", 0, "per"], ["l", "q"]), "not on an axis"),
        (with_(["sites", 3, "name"], "l.{l}.named"), "the dim 'e' of the site is not in its name"),
        (with_(["sites", 0, "slots", 0, "tensor"], "q.weight"), "not in the tensor's name"),
        (with_(["sites", 0, "slots", 0, "index"], {"0": "g r c a", "1": "g"}), "on two axes"),
        (with_(["sites", 0, "slots", 0, "index"], {"0": "g r c a b"}), "no size for b"),
        (with_(["sites", 0, "slots", 0, "index"], {"0": "g [r c a"}), "not an index string"),
        (with_(["sites"], 7), "missing or malformed"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = copy.deepcopy(toy.spec_dict())
    change(data)
    with pytest.raises(InputError, match=message):
        Spec.from_dict(data)


CONFIG = {
    "heads": 6,
    "kv": 2,
    "hidden": 48,
    "none": None,
    "text": {"dim": 5},
    "part": 0.25,
    "name": "x",
    "flag": True,
}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12", 12),
        ("heads", 6),
        ("heads // kv", 3),
        ("none or hidden // heads", 8),
        ("kv or heads", 2),
        ("missing or none or kv", 2),
        ("text.dim * 2 + 1", 11),
        ("int((none or hidden // heads) * part) // 2", 1),
        ("heads - kv", 4),
        ("8 * int((int(hidden * 2 / 3) + 7) / 8)", 32),
        ("int(hidden / heads / 3)", 2),
    ],
)
def test_sizes(expression: str, value: int) -> None:
    assert evaluate_size(expression, CONFIG) == value


@pytest.mark.parametrize(
    "expression",
    ["missing", "none", "name", "flag", "hidden // 7", "kv - kv", "heads +", "__import__('os')", "heads ** 2",
     "name * 2", "heads // none", "[1]", "part", "heads // (kv - kv)",
     "heads / kv", "int(heads / (kv - kv))"],
)  # fmt: skip
def test_what_gives_no_size_is_refused(expression: str) -> None:
    with pytest.raises(InputError):
        evaluate_size(expression, CONFIG)


def test_name_patterns() -> None:
    regex = name_regex("m.{l}.x.{e}.w")
    assert regex.fullmatch("m.10.x.0.w")
    for name in ("m.01.x.0.w", "m..x.0.w", "mX1.x.0.w", "m.1.x.0.w2", "m.-1.x.0.w"):
        assert not regex.fullmatch(name)
    assert fill("m.{l}.x.{e}.w", {"l": 3, "e": 4}) == "m.3.x.4.w"


def test_a_match_names_every_instance() -> None:
    match = match_spec(Spec.from_dict(toy.spec_dict()), shapes(), toy.CONFIG)
    qk = match.sites[0]
    assert (qk.instances, qk.batch, qk.acted) == (((0,), (1,)), (3, 4), 2)
    assert [qk.label(instance) for instance in qk.instances] == ["l.0.qk", "l.1.qk"]
    named = match.sites[3]
    assert len(named.instances) == 2 * 4
    assert {part.site for part in match.parts["l.0.q.weight"]} == {0, 4, 5}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("l.0.q.weight", (40, 24), r"l\.0\.q\.weight: axis 0 is 'g r c a' = 48 by the config, got 40"),
        ("l.0.q.weight", None, r"missing l\.0\.q\.weight, which l\.\{l\}\.qk needs"),
        ("l.1.x.2.up", None, r"missing l\.1\.x\.2\.up"),
        ("l.0.q.weight_scale", (1,), r"unexpected l\.0\.q\.weight_scale of shape \[1\]"),
        ("l.0.gu", (4, 24), r"got None"),
        ("l.0.x.4.up", (12, 24), r"x\.4"),
    ],
)
def test_a_checkpoint_that_is_not_what_its_config_says(
    name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    tensors = shapes()
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = shape
    with pytest.raises(InputError, match=message) as caught:
        match_spec(Spec.from_dict(toy.spec_dict()), tensors, toy.CONFIG)
    assert "hint:" in str(caught.value)


def test_every_miss_is_named_at_once() -> None:
    tensors = shapes()
    for name in ("l.0.k.weight", "l.1.o.weight"):
        del tensors[name]
    with pytest.raises(InputError) as caught:
        match_spec(Spec.from_dict(toy.spec_dict()), tensors, toy.CONFIG)
    assert "l.0.k.weight" in str(caught.value)
    assert "l.1.o.weight" in str(caught.value)


def test_a_config_that_contradicts_the_shapes() -> None:
    with pytest.raises(InputError, match="by the config"):
        match_spec(Spec.from_dict(toy.spec_dict()), shapes(), {**toy.CONFIG, "kv": 6})


def test_a_bare_base_model_is_read_without_its_prefix() -> None:
    data = toy.spec_dict()
    data["prefix"] = "l."
    bare = {name.removeprefix("l."): shape for name, shape in shapes().items()}
    match = match_spec(Spec.from_dict(data), bare, toy.CONFIG)
    assert "0.q.weight" in match.parts
    assert match.name("l.{l}.q.weight", {"l": 1}) == "1.q.weight"


def test_leftovers_that_loaders_drop_and_old_norm_names_are_known() -> None:
    data = toy.spec_dict()
    data["untouched"] = [*data["untouched"], "l.{l}.norm.weight", "l.{l}.norm.bias"]
    data["ignored"] = [r"\.inv_freq$"]
    more = {"l.0.inv_freq": (4,), "l.0.norm.gamma": (24,), "l.0.norm.beta": (24,)}
    match_spec(Spec.from_dict(data), shapes() | more, toy.CONFIG)
