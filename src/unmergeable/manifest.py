"""The manifest: the public record beside locked weights, and how it is read, signed and checked.

It names the key, the method and the salt, and the SHA-256 of everything that was written. Without the key
none of it helps to undo a lock: hashes are of the locked bytes only, never of the originals, and choices
that depend on the data travel sealed. docs/formats.md describes the format.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from .errors import InputError, RunError
from .keys import Key, read_bounded

FORMAT = 1
MANIFEST_NAME = "unmergeable.json"
MAX_MANIFEST = 256 * 2**20

_CONTEXT = "manifest"
_MAX_DEPTH = 32
_INFINITE = (float("inf"), float("-inf"))
_FIELDS = ("format", "tool", "key", "method", "options", "salt", "domain", "components", "sealed", "mac")
_COMPONENT_FIELDS = ("spec", "tensors", "shards", "files")
_HEX32 = re.compile(r"[0-9a-f]{64}\Z")
_KEY_ID = re.compile(r"um1-[0-9a-f]{16}\Z")
_WORD = re.compile(r"[a-z][a-z0-9_-]{0,63}\Z")
_VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,64}\Z")


@dataclass(frozen=True)
class Component:
    """One component of a checkpoint: a plain model has the one called ".", a pipeline one for each folder.

    Attributes:
        spec: SHA-256 of the spec that it was locked by; None if it was passed through.
        tensors: SHA-256 of the bytes of each tensor, by name.
        shards: SHA-256 of the header (length and JSON) of each weights file, by file name.
        files: SHA-256 of every other file, by path relative to the component.
    """

    spec: str | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    shards: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What was locked, how, and with which key. All hashes are 64 hexadecimal characters.

    Attributes:
        tool: version of the package that wrote it.
        key: public id of the key.
        method: name of the method.
        options: the method's options, JSON values.
        salt: the 32 bytes that the plan was derived with. A domain's salt stands here too: it is an HKDF
            output under the key, so it tells neither the domain's name nor anything about the plan.
        domain: whether the salt is a domain's; its name is never stored.
        components: by folder, "." for the checkpoint's own.
        sealed: a box of `Key.seal`, empty if there is nothing to keep.
        mac: HMAC-SHA256 over everything else; empty until signed.
    """

    tool: str
    key: str
    method: str
    salt: bytes
    components: Mapping[str, Component] = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    domain: bool = False
    sealed: bytes = b""
    mac: bytes = b""

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values, in the order in which it is written."""
        return {
            "format": FORMAT,
            "tool": self.tool,
            "key": self.key,
            "method": self.method,
            "options": dict(self.options),
            "salt": self.salt.hex(),
            "domain": self.domain,
            "components": {
                name: {
                    "spec": part.spec,
                    "tensors": dict(part.tensors),
                    "shards": dict(part.shards),
                    "files": dict(part.files),
                }
                for name, part in self.components.items()
            },
            "sealed": base64.b64encode(self.sealed).decode("ascii"),
            "mac": self.mac.hex(),
        }

    @classmethod
    def from_json(cls, document: object, *, where: object = None) -> Manifest:
        """The manifest that a JSON document describes.

        Raises: InputError for a newer format, and for a field that is missing, unknown or malformed.
        """
        top = _object(document, where, "the manifest")
        if "format" not in top:
            raise InputError("this is not a manifest of unmergeable, it has no format", where=where)
        version = top["format"]
        if type(version) is int and version > FORMAT:
            raise InputError(
                "locked with a newer format",
                where=where,
                expected=f"format {FORMAT}",
                got=f"format {version}",
                hint="upgrade unmergeable",
            )
        if type(version) is not int or version != FORMAT:
            _refuse("field format", where, str(FORMAT), version)
        _exactly(top, _FIELDS, where, "the manifest")
        if type(top["domain"]) is not bool:
            _refuse("field domain", where, "true or false", top["domain"])
        parts = _object(top["components"], where, "field components")
        if not parts:
            _refuse("field components", where, "at least one component", parts)
        mac = top["mac"]
        return cls(
            tool=_text(top["tool"], _VERSION, where, "field tool", "a version"),
            key=_text(top["key"], _KEY_ID, where, "field key", "um1- and 16 hexadecimal characters"),
            method=_text(top["method"], _WORD, where, "field method", "a method's name"),
            options=_plain(_object(top["options"], where, "field options"), where),
            salt=bytes.fromhex(_hash(top["salt"], where, "field salt")),
            domain=top["domain"],
            components={
                name if name == "." else _path(name, where): _component(name, part, where)
                for name, part in parts.items()
            },
            sealed=_base64(top["sealed"], where, "field sealed"),
            mac=b"" if mac == "" else bytes.fromhex(_hash(mac, where, "field mac")),
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read a manifest strictly; it is not trusted before `check`.

        Raises: InputError for a missing, special or oversize file, for anything but plain JSON (duplicate
            keys and NaN are refused too), for a newer format, and for unknown or malformed fields.
        """

        def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for name, value in items:
                if name in found:
                    raise InputError("the manifest names a key twice", where=path, got=_short(name))
                found[name] = value
            return found

        def constant(text: str) -> NoReturn:
            raise InputError("the manifest has a number that is not finite", where=path, got=text)

        content = read_bounded(path, MAX_MANIFEST, "manifest")
        try:
            text = content.decode("utf-8")
            document = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=_float)
        except (ValueError, RecursionError) as error:
            got = "too deep nesting" if isinstance(error, RecursionError) else error
            raise InputError("the manifest is not JSON", where=path, got=got) from None
        return cls.from_json(document, where=path)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest to a new file, mode 0666 & ~umask, and sync it.

        Raises: InputError if the manifest is not one that `read` accepts, or the file exists; RunError if
            it cannot be written.
        """
        document = self.to_json()
        Manifest.from_json(document, where=path)
        content = json.dumps(document, indent=1).encode("ascii") + b"\n"
        created = False
        try:
            with open(path, "xb") as file:
                created = True
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            raise InputError("the file exists, a manifest is never overwritten", where=path) from None
        except OSError as error:
            if created:
                os.unlink(path)
            raise RunError("the manifest cannot be written", where=path, got=error.strerror) from None

    def payload(self) -> bytes:
        """What the MAC covers: canonical JSON of all fields but `mac` (ASCII, sorted keys, no spaces).

        Raises: InputError if the options are not JSON values.
        """
        document = self.to_json()
        del document["mac"]
        _plain(document["options"], None)
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")

    def sign(self, key: Key) -> Manifest:
        """This manifest with the id and the MAC of `key`."""
        signed = replace(self, key=key.id)
        return replace(signed, mac=key.mac(signed.salt, signed.payload()))

    def check(self, key: Key, *, where: object = None) -> None:
        """Make sure that this manifest was signed with `key` and not altered since.

        Args:
            where: the manifest's file, for the error.

        Raises: InputError if it was locked with another key, is not signed, or was altered.
        """
        if self.key != key.id:
            raise InputError(
                "the model was locked with another key",
                where=where,
                expected=f"key {self.key}",
                got=f"key {key.id}",
                hint="give the key file that has this public id",
            )
        if not self.mac:
            raise InputError("the manifest is not signed", where=where)
        if not key.check_mac(self.salt, self.payload(), self.mac):
            raise InputError(
                "the manifest was altered after locking, its MAC differs",
                where=where,
                hint="restore the manifest that lock wrote",
            )

    def seal(self, key: Key, plaintext: bytes) -> Manifest:
        """This manifest, not signed, with `plaintext` in `sealed` where only `key` can read it."""
        box = key.seal(self.salt, plaintext, _CONTEXT) if plaintext else b""
        return replace(self, sealed=box, mac=b"")

    def unseal(self, key: Key) -> bytes:
        """What `seal` was given, empty if nothing was; raises InputError for another key or altered box."""
        return key.open(self.salt, self.sealed, _CONTEXT) if self.sealed else b""


def manifest_path(checkpoint: str | os.PathLike[str], *, single_file: bool) -> Path:
    """Where a checkpoint's manifest stands: `unmergeable.json` in its folder, or beside a single file
    `x.safetensors` as `x.safetensors.unmergeable.json`.
    """
    path = Path(checkpoint)
    if not single_file:
        return path / MANIFEST_NAME
    return path.with_name(f"{path.name}.{MANIFEST_NAME}")


def _component(name: str, value: object, where: object) -> Component:
    label = f"component {_short(name)}"
    part = _object(value, where, label)
    _exactly(part, _COMPONENT_FIELDS, where, label)
    hashes: dict[str, dict[str, str]] = {}
    for kind in ("tensors", "shards", "files"):
        entries = _object(part[kind], where, f"{label}, field {kind}")
        hashes[kind] = {
            key: _hash(entry, where, f"{label}, {kind}, {_short(key)}") for key, entry in entries.items()
        }
        for key in entries if kind != "tensors" else ():
            _path(key, where)
    spec = None if part["spec"] is None else _hash(part["spec"], where, f"{label}, field spec")
    return Component(spec, **hashes)


def _object(value: object, where: object, label: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(label, where, "an object", value)
    return value


def _exactly(value: dict[str, Any], names: tuple[str, ...], where: object, label: str) -> None:
    for name in names:
        if name not in value:
            raise InputError(f"{label} lacks a field", where=where, expected=name)
    for name in value:
        if name not in names:
            raise InputError(f"{label} has an unknown field", where=where, got=_short(name))


def _text(value: object, pattern: re.Pattern[str], where: object, label: str, expected: str) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        _refuse(label, where, expected, value)
    return value


def _hash(value: object, where: object, label: str) -> str:
    return _text(value, _HEX32, where, label, "64 hexadecimal characters")


def _base64(value: object, where: object, label: str) -> bytes:
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except (binascii.Error, ValueError):
        data = None
    if data is None or base64.b64encode(data).decode("ascii") != value:
        _refuse(label, where, "base64", value)
    return data


def _path(name: str, where: object) -> str:
    """A relative path that stays inside its folder."""
    # Windows has more ways to leave a folder; elsewhere these characters are part of a name.
    special = "\0\\:" if os.name == "nt" else "\0"
    if {"", ".", ".."} & set(name.split("/")) or set(special) & set(name):
        raise InputError("the manifest names a path outside of its folder", where=where, got=_short(name))
    return name


def _plain(value: Any, where: object, depth: int = 0) -> Any:
    """Options that mean the same after a round trip through JSON, so that their MAC does too."""
    if depth > _MAX_DEPTH:
        raise InputError(
            "the options are nested too deep", where=where, expected=f"at most {_MAX_DEPTH} levels"
        )
    if isinstance(value, dict):
        for name in value:
            if type(name) is not str:
                raise InputError("an option's name is not text", where=where, got=_short(name))
        for entry in value.values():
            _plain(entry, where, depth + 1)
    elif isinstance(value, list | tuple):
        for entry in value:
            _plain(entry, where, depth + 1)
    elif type(value) not in (str, bool, int, float, type(None)) or value != value or value in _INFINITE:
        raise InputError("an option is not a JSON value", where=where, got=_short(value))
    return value


def _float(text: str) -> float:
    value = float(text)
    if value in _INFINITE:
        raise ValueError(f"number {_short(text)} out of range")
    return value


def _refuse(label: str, where: object, expected: str, value: object) -> NoReturn:
    raise InputError(f"{label} is malformed", where=where, expected=expected, got=_short(value))


def _short(value: object) -> str:
    """A value as JSON, cut to a length that a message can bear."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
