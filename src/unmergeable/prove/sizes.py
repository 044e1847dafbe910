"""Find which config field a size comes from, as an expression that holds in every miniature.

The miniatures have different, odd-looking sizes, so an expression that gives all of them is hardly a
coincidence; and the checkpoint's own shapes are checked against it at every lock.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..arithmetic import evaluate_size
from ..errors import InputError
from ..fields import OTHERS, SIZES, of_kind

Values = tuple[int, ...]

_HEADS = re.compile(r"(heads?|n_head|num_heads|query_groups|n_head_kv)(\[\d+\])?$")
_KV = re.compile(r"key_value|kv|group")
_WIDTH = re.compile(r"(hidden_sizes?|d_model|n_embd|n_embed|embed_dim|hidden_dim|dim|width)(\[\d+\])?$")
_OTHER = ("state", "linear")  # the beginnings of roles of what is no attention
_COUNT = re.compile(r"(layers|blocks|stages|depth)$")  # no factor of a width, whatever its number
_STAGE = re.compile(r"\[(\d+)\]")
_TOWERS = frozenset(["encoder", "decoder", "text", "vision", "audio", "image", "speech", "cross"])


class Sizes:
    """The integer fields of several miniature configs, and expressions over them.

    Args:
        configs: as they were given, what a checkpoint's `config.json` is like.
        written: as the models write them. A class may overrule what it was given: BLIP's text has the width of images
            for `encoder_hidden_size`, whatever is there. What holds in these too is preferred.
    """

    def __init__(
        self, configs: Sequence[Mapping[str, Any]], written: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.configs, self.written = tuple(configs), tuple(written)
        self.fields: dict[str, tuple[int | None, ...]] = {}
        self.fractions: dict[str, tuple[float, ...]] = {}
        self.ratios: dict[str, tuple[float, ...]] = {}
        for path, values in _every(self.configs):
            if all(isinstance(v, float) and 0 < v < 1 for v in values) and re.search("rotary|rope", path):
                self.fractions[path] = values
            if (
                all(isinstance(v, float) and v >= 1 for v in values)
                and SIZES.get(path.rpartition(".")[2]) == "ratio"
            ):
                self.ratios[path] = values
            whole = all(
                v is None or (isinstance(v, int) and not isinstance(v, bool) and v > 0) for v in values
            )
            if whole and any(v is not None for v in values) and not path.rpartition(".")[2].startswith("_"):
                self.fields[path] = values

    def of(self, kind: str) -> Sizes:
        """The same for layers of one kind, `layer_types=sliding_attention`."""
        return Sizes(*([of_kind(config, kind) for config in each] for each in (self.configs, self.written)))

    @staticmethod
    def _either(path: str) -> str:
        """A field; of one that is said of a kind of layers, or of single layers by another name, both names."""
        scope, _, leaf = path.rpartition(".")
        return f"{path} or {scope and scope + '.'}{OTHERS[leaf]}" if leaf in OTHERS else path

    def values(self, expression: str) -> Values | None:
        """What an expression gives in every miniature; None where it does not give a size in all."""
        return _evaluated(expression, self.configs)

    def heads(self, scope: str) -> list[str]:
        """Expressions that may count heads, the likeliest for tensors under `scope` first."""
        found = []
        for path, values in self.fields.items():
            leaf = path.rpartition(".")[2]
            if not _counts_heads(path) or re.search("dim|size", leaf) or not _of_stage(path, scope):
                continue
            if None not in values:
                found.append(self._either(path))
            else:
                found += [
                    f"{path} or {other}"
                    for other in self.fields
                    if other != path and _counts_heads(other) and self.values(f"{path} or {other}")
                ]
        found.sort(key=lambda text: (-self._nearness(text, scope), bool(_KV.search(text)), len(text)))
        return list({self.values(text): text for text in reversed(found)}.values())[::-1]

    def alike_heads(self) -> list[list[str]]:
        """Fields that count heads and agree in all miniatures: no proof can tell which of them an expression means."""
        found: dict[Any, list[str]] = {}
        for path, values in self.fields.items():
            if SIZES.get(_STAGE.sub("", path.rpartition(".")[2])) == "heads" and None not in values:
                found.setdefault(values, []).append(path)
        return [paths for paths in found.values() if len(paths) > 1]

    def find_field(self, leaf: str) -> set[tuple[int | None, ...]]:
        """The values of every field of this name, in the config and its parts."""
        return {values for path, values in self.fields.items() if path.rpartition(".")[2] == leaf}

    def find(self, values: Values, scope: str, hint: str = "") -> str | None:
        """The simplest expression that gives these sizes, from fields near `scope`; None if there is none.

        `hint` is a regular expression of field names to prefer.
        """
        best: tuple[tuple[bool, bool, int, bool, int, int], str] | None = None
        for text in self._expressions(values):
            if self.values(text) != values:
                continue
            rank = (
                bool(self.written) and _evaluated(text, self.written) != values,
                not _of_stage(text, scope),
                -self._nearness(text, scope),
                not (hint and re.search(hint, text)),
                len(re.findall(r"[a-z_.]+", text)),
                len(text),
            )
            if best is None or rank < best[0]:
                best = rank, text
        return best[1] if best else None

    def _nearness(self, text: str, scope: str) -> int:
        """How well the towers named in a field fit the towers named in a tensor."""
        mine = {word for word in re.split(r"[^a-z]+", re.sub("_", " ", text.lower())) if word in _TOWERS}
        theirs = set(re.split(r"[^a-z]+", re.sub("_", " ", scope.lower()))) & _TOWERS
        return len(mine & theirs) - len(mine - theirs)

    def _expressions(self, wanted: Values) -> Iterator[str]:
        names = list(self.fields)
        if len(set(wanted)) == 1:
            yield str(wanted[0])
        yield from (self._either(path) for path in names if self.fields[path] == wanted)
        widths = [path for path in names if _WIDTH.search(path)]
        heads = [path for path in names if _counts_heads(path)]
        rules = [f"{width} // {count}" for width in widths for count in heads if _beside(width, count)]
        rules += [f"{k} * {path}" for path in widths for k in (2, 3, 4, 8)]
        rules += [
            f"int({k} * {width} * {ratio})"
            for width in widths
            for ratio in self.ratios
            for k in (1, 2, 4, 8)
            if _beside(width, ratio)
        ]
        # DINOv2's gated MLP: two thirds of the plain one's width, up to a multiple of 8
        rules += [
            f"8 * int((int(int({width} * {ratio}) * 2 / 3) + 7) / 8)"
            for width in widths
            for ratio in (*self.ratios, *self.fields)
            if SIZES.get(ratio.rpartition(".")[2]) == "ratio" and _beside(width, ratio)
        ]
        rules += [f"{x} // ({y})" for x in heads for y in self.heads(x) if x != y and _beside(x, y)]
        yield from rules
        # a field that is null in one of them has a rule instead: `head_dim or hidden_size // num_heads`
        for path in names:
            values = self.fields[path]
            if None in values and all(v in (None, w) for v, w in zip(values, wanted, strict=True)):
                yield from (f"{path} or {rule}" for rule in (*rules, *names) if rule != path)
        factors = [path for path in names if not _COUNT.search(path)]
        for i, x in enumerate(factors):
            for y in factors[i + 1 :]:
                pairs = zip(self.fields[x], self.fields[y], wanted, strict=True)
                if all(a and b and a * b == c for a, b, c in pairs):
                    yield f"{x} * {y}"


def _evaluated(expression: str, configs: Sequence[Mapping[str, Any]]) -> Values | None:
    try:
        return tuple(evaluate_size(expression, config) for config in configs)
    except InputError:
        return None


def _counts_heads(path: str) -> bool:
    """Whether a field may count heads of attention: not one of state spaces or linear attention."""
    role = SIZES.get(_STAGE.sub("", path.rpartition(".")[2]), "heads")
    return _HEADS.search(path) is not None and role.endswith("heads") and not role.startswith(_OTHER)


def _beside(x: str, y: str) -> bool:
    """Whether two fields stand in one sub-config."""
    return x.rpartition(".")[0] == y.split(" or ")[0].rpartition(".")[0]


def _of_stage(text: str, scope: str) -> bool:
    """Whether an expression has no stage's own field but that of the stage that the scope is in."""
    return set(_STAGE.findall(text)) <= set(scope.split("."))


def _every(configs: Sequence[Mapping[str, Any]], path: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    keys = list(dict.fromkeys(key for config in configs for key in config))
    for key in keys:
        values = tuple(config.get(key) for config in configs)
        if not str(key).isidentifier():
            continue
        nested = [value for value in values if isinstance(value, Mapping)]
        if len(nested) == len(values):
            yield from _every(nested, f"{path}{key}.")
        elif key in SIZES and all(isinstance(value, list) for value in values):
            for stage, each in enumerate(zip(*values, strict=False)):
                yield f"{path}{key}[{stage}]", each
        else:
            yield f"{path}{key}", values
