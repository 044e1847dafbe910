"""The manifest: written, read strictly, signed and checked; format 1 is read for ever."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import resource
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmergeable.errors import InputError, RunError, UsageError
from unmergeable.keys import Key, domain_salt, load_key
from unmergeable.manifest import Component, Manifest, manifest_path

FIXTURES = Path(__file__).parent / "fixtures"
KEY, OTHER = Key(bytes(range(32))), Key(bytes(32))
SALT = bytes(range(50, 82))
HASH = "0123456789abcdef" * 4
FIXTURE: dict[str, Any] = json.loads((FIXTURES / "manifest-1.json").read_text())


def example(**changes: Any) -> Manifest:
    part = Component(
        HASH, {"a.weight": HASH, "b": HASH[::-1]}, {"model.safetensors": HASH}, {"config.json": HASH}
    )
    fields: dict[str, Any] = {
        "tool": "0.1.0",
        "key": KEY.id,
        "method": "exact",
        "salt": SALT,
        "components": {".": part},
        "options": {"scales": False},
    }
    return Manifest(**{**fields, **changes})


@pytest.fixture
def fixture_key(tmp_path: Path) -> Key:
    path = tmp_path / "fixture key"
    path.write_bytes((FIXTURES / "key-1.txt").read_bytes())
    path.chmod(0o600)
    return load_key(path)


# --- format 1 --------------------------------------------------------------------------------------------


def test_a_manifest_of_format_1_is_read_checked_and_written_for_ever(
    tmp_path: Path, fixture_key: Key
) -> None:
    manifest = Manifest.read(FIXTURES / "manifest-1.json")
    manifest.check(fixture_key)
    assert manifest.unseal(fixture_key) == b"choices that depend on the data"
    assert manifest.options == {"scales": False, "rate": 0.1, "dtype": None, "blocks": [1, 2]}
    assert manifest.components["."].files["notes/ümlaut.txt"]
    assert manifest.components["text_encoder"].spec
    assert manifest.sign(fixture_key) == manifest
    manifest.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (FIXTURES / "manifest-1.json").read_bytes()


def test_the_signed_bytes_are_canonical_json() -> None:
    manifest = example(components={".": Component(files={"ü": HASH, "a": HASH})})
    assert manifest.payload() == (
        f'{{"components":{{".":{{"files":{{"a":"{HASH}","\\u00fc":"{HASH}"}},"shards":{{}},"spec":null,'
        f'"tensors":{{}}}}}},"domain":false,"format":1,"key":"{KEY.id}","method":"exact","options":'
        f'{{"scales":false}},"salt":"{SALT.hex()}","sealed":"","tool":"0.1.0"}}'
    ).encode("ascii")


def test_the_order_and_the_layout_of_the_file_do_not_matter(tmp_path: Path, fixture_key: Key) -> None:
    path = tmp_path / "m"
    path.write_text(json.dumps(dict(reversed(FIXTURE.items())), ensure_ascii=False), encoding="utf-8")
    manifest = Manifest.read(path)
    manifest.check(fixture_key)
    assert manifest == Manifest.read(FIXTURES / "manifest-1.json")


# --- round trips -----------------------------------------------------------------------------------------

names = st.text(min_size=1, max_size=12)
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
tables = st.dictionaries(names, hashes, max_size=4)
paths = st.dictionaries(
    names.filter(lambda n: not {"", ".", ".."} & set(n.split("/")) and "\0" not in n), hashes
)
options = st.dictionaries(
    names,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | names,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)
components = st.builds(Component, st.none() | hashes, tables, paths, paths)
manifests = st.builds(
    example,
    tool=st.from_regex(r"[0-9]\.[0-9]\.[0-9](\.dev[0-9]+)?", fullmatch=True),
    salt=st.binary(min_size=32, max_size=32),
    domain=st.booleans(),
    options=options,
    components=st.dictionaries(st.sampled_from([".", "unet", "text_encoder/2"]), components, min_size=1),
)


@settings(max_examples=60, deadline=None)
@given(manifests, st.binary(max_size=60))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest, choices: bytes) -> None:
    path = tmp_path_factory.mktemp("m") / "unmergeable.json"
    signed = manifest.seal(KEY, choices).sign(KEY)
    signed.write(path)
    again = Manifest.read(path)
    assert again == signed
    again.check(KEY)
    assert again.unseal(KEY) == choices


def test_an_unsigned_manifest_can_be_written_but_not_checked(tmp_path: Path) -> None:
    example().write(tmp_path / "m")
    with pytest.raises(InputError, match="not signed"):
        Manifest.read(tmp_path / "m").check(KEY)


def test_writing_respects_the_umask_and_never_overwrites(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        example().write(tmp_path / "m")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o640
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(InputError, match="never overwritten"):
        example(method="gauge").write(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before


def test_a_full_disk_leaves_no_manifest(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(RunError, match="cannot be written"):
            example().write(tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []
    with pytest.raises(RunError, match="cannot be written"):
        example().write(tmp_path / "missing" / "m")


@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"x": float("nan")}},
        {"options": {"x": float("inf")}},
        {"options": {"x": b"bytes"}},
        {"options": {"x": {"y": [object()]}}},
        {"options": {"x": {1: 2}}},
        {"options": {1: 2}},
    ],
)
def test_options_that_are_not_json_are_neither_signed_nor_written(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="option"):
        example(**changes).sign(KEY)
    with pytest.raises(InputError, match="option"):
        example(**changes).write(tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    changes: dict[str, Any]
    for changes in ({"components": {}}, {"tool": ""}, {"key": "x"}, {"salt": b"short"}, {"method": "Exact!"}):
        with pytest.raises(InputError, match="malformed"):
            example(**changes).write(tmp_path / "m")
    with pytest.raises(UsageError, match="salt"):
        example(salt=b"short").sign(KEY)
    assert os.listdir(tmp_path) == []


# --- the key ---------------------------------------------------------------------------------------------


def test_the_wrong_key_is_named_beside_the_right_one() -> None:
    with pytest.raises(InputError) as caught:
        example().sign(KEY).check(OTHER, where="m.json")
    assert KEY.id in str(caught.value)
    assert OTHER.id in str(caught.value)
    assert str(caught.value).startswith("m.json: the model was locked with another key")


def test_signing_puts_the_key_id() -> None:
    assert example(key=OTHER.id).sign(KEY).key == KEY.id


def test_a_forged_key_id_does_not_help() -> None:
    forged = dataclasses.replace(example().sign(OTHER), key=KEY.id)
    with pytest.raises(InputError, match="altered"):
        forged.check(KEY)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict) and value:
        return [leaf for key in value for leaf in leaves(value[key], (*path, key))]
    if isinstance(value, list) and value:
        return [leaf for i in range(len(value)) for leaf in leaves(value[i], (*path, i))]
    return [path]


def another(value: Any) -> Any:
    """A value of the same type and form that is not the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return ("0" if value[0] != "0" else "1") + value[1:]
    return {"more": HASH} if isinstance(value, dict) else 17


@pytest.mark.parametrize("path", [p for p in leaves(FIXTURE) if p not in [("format",), ("key",)]])
def test_any_altered_value_is_noticed(tmp_path: Path, fixture_key: Key, path: tuple[Any, ...]) -> None:
    document = copy.deepcopy(FIXTURE)
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = "gauge" if path == ("method",) else another(inner[path[-1]])
    with pytest.raises(InputError):
        check_document(tmp_path / "m", document, fixture_key)


def test_any_dropped_or_renamed_entry_is_noticed(tmp_path: Path, fixture_key: Key) -> None:
    count = 0
    for part in FIXTURE["components"]:
        for kind in ("tensors", "shards", "files"):
            for name in FIXTURE["components"][part][kind]:
                for renamed in ([], [name + "x"]):
                    document = copy.deepcopy(FIXTURE)
                    table = document["components"][part][kind]
                    value = table.pop(name)
                    table.update(dict.fromkeys(renamed, value))
                    with pytest.raises(InputError, match="altered"):
                        check_document(tmp_path / str(count), document, fixture_key)
                    count += 1
    assert count == 14


def check_document(path: Path, document: Any, key: Key) -> None:
    path.write_text(json.dumps(document))
    Manifest.read(path).check(key)


def test_sealed_choices_open_with_the_key_alone() -> None:
    manifest = example().seal(KEY, b"secret choices").sign(KEY)
    assert b"secret" not in manifest.payload()
    assert manifest.unseal(KEY) == b"secret choices"
    for other, key in ((manifest, OTHER), (dataclasses.replace(manifest, salt=bytes(32)), KEY)):
        with pytest.raises(InputError, match="cannot be opened"):
            other.unseal(key)
    assert example().seal(KEY, b"").sealed == b""
    assert example().unseal(KEY) == b""
    assert manifest.seal(KEY, b"later").mac == b""


def test_a_domains_manifest_has_neither_its_name_nor_a_guess_of_it() -> None:
    manifest = example(salt=domain_salt("house", KEY), domain=True).sign(KEY)
    assert b"house" not in manifest.payload()
    assert manifest.salt != domain_salt("house", OTHER)
    manifest.check(KEY)


def test_a_manifest_shows_no_key_material() -> None:
    manifest = example().seal(KEY, b"choices").sign(KEY)
    text = json.dumps(manifest.to_json()) + repr(manifest)
    assert KEY._master.hex() not in text
    assert repr(KEY._master)[2:-1] not in text


def test_where_a_manifest_stands() -> None:
    assert manifest_path("x/model", single_file=False) == Path("x/model/unmergeable.json")
    assert manifest_path("x/a.b.safetensors", single_file=True) == Path("x/a.b.safetensors.unmergeable.json")
