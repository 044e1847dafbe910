"""Make a configuration small without changing its structure: only fields named as sizes are replaced.

The numbers are chosen so that no two kinds of width coincide (towers, query width, residual width, inner
width), because equal numbers let a wrong pairing of tensors look right. Two shapes differ in every size:
what holds in both is not a coincidence of one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unmergeable.fields import SIZES, STATE_EXPANSION, STATE_GROUPS
from unmergeable.prove import layers, rotary, stages, towers

Config = dict[str, Any]

#: Token ids below this are kept, random input ids are drawn from here on.
FIRST_FREE_TOKEN = 16
#: The highest ids of the vocabulary are kept for special tokens.
SPECIAL_TOKENS = 12
LABELS = 2

# They choose among outputs by the names or numbers of layers, of which a miniature has fewer.
_STAGES = ("out_features", "out_indices", "stage_names")
# Fields that cut activations off at a number, and what they get.
_CLAMP, _CLAMPED = re.compile(r"clip|clamp|(^|_)limit$"), 0.5
# Fields that say how many keys or blocks of keys are chosen, and what they get: a short text has more.
_CHOSEN = {"index_topk": 8, "keep_window_size": 8, "index_block_size": 4, "index_topk_blocks": 3}
_HEAD_DIMS = ((8, 16), (12, 10), (10, 14), (14, 12), (16, 8))
_GROUPS = ((4, 3), (3, 5), (5, 4), (3, 2), (2, 3))
_INNER = ((52, 44, 76, 68, 92, 58, 86, 106), (84, 116, 92, 62, 74, 110, 132, 148))
_RANKS = ((20, 26, 22, 28), (28, 18, 34, 38))


@dataclass(frozen=True)
class Style:
    """How freely sizes may be chosen; a stricter style is tried when a class rejects a freer one.

    Args:
        free_width: choose the residual width apart from heads times head size where `head_dim` is a field.
        distinct_towers: give towers of equal real width different widths.
        any_heads: heads of any number; else four or eight, grouped in pairs, as classes want them that split heads.
    """

    free_width: bool = True
    distinct_towers: bool = True
    any_heads: bool = True


STYLES = (
    Style(), Style(True, False), Style(False, True), Style(False, False),
    Style(any_heads=False), Style(False, False, any_heads=False),
)  # fmt: skip


@dataclass
class _State:
    shape: int
    style: Style
    towers: int = 0
    widths: dict[int, int] = field(default_factory=dict)
    mapped: dict[tuple[str, int], int] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    tokens: dict[int, int] = field(default_factory=dict)

    def choose(self, role: str, real: int, candidates: tuple[int, ...]) -> int:
        """The same small number for the same role and real number, a new one otherwise."""
        key = (role, real)
        if key not in self.mapped:
            free = [number for number in candidates if number not in self.used]
            self.mapped[key] = free[0] if free else candidates[-1] + 10 * len(self.mapped)
            self.used.add(self.mapped[key])
        return self.mapped[key]


def shrink(config: Mapping[str, Any], shape: int, style: Style = STYLES[0]) -> Config:
    """A small configuration of the same structure.

    Args:
        config: a canonical configuration with the lists that the class derives (see `miniature`).
        shape: 0 or 1, two sets of sizes.
        style: how freely they may be chosen.
    """
    state = _State(shape, style)
    return _node(copy.deepcopy(dict(config)), state)


def vocabulary(shape: int) -> int:
    """The vocabulary size of a miniature."""
    return 96 + 16 * shape


def _node(node: Config, state: _State) -> Config:
    real, alike = dict(node), towers.alike(node)
    by_role: dict[str, list[str]] = {}
    for name, value in real.items():
        if name in SIZES and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            by_role.setdefault(SIZES[name], []).append(name)
    _attention(node, real, by_role, state)
    for role, names in by_role.items():
        for name in names:
            node[name] = _size(role, name, real[name], node, real, state)
    _experts(node, real, by_role, state)
    _states(node, by_role, state.shape)
    _linear(node, real, by_role, state.shape)
    if not stages.shrink(node, real, state.shape):
        layers.shrink(node, real, by_role, state.shape)
    _image(node, real, state)
    _boxes(node)
    _tokens(node, state)
    for name, value in list(node.items()):
        if isinstance(value, float) and "drop" in name:
            node[name] = 0.0
        elif isinstance(value, dict) and name != "rope_parameters" and not _has_sizes(value):
            _clamp(value)
        elif isinstance(value, dict) and name != "rope_parameters" and _has_sizes(value):
            node[name] = _node(value, state)
    towers.couple(node, alike)
    _clamp(node)
    labelled = node.keys() & {"id2label", "label2id", "num_labels"}
    for name in (*_STAGES, *(("id2label", "label2id", "problem_type") if labelled else ())):
        node.pop(name, None)
    if labelled:
        node["num_labels"] = LABELS
    return node


def _clamp(node: Config) -> None:
    """Bounds so low that the small numbers of a miniature reach them: what they forbid must be seen."""
    for name, value in node.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            node[name] = min(value, _CHOSEN.get(name, _CLAMPED if _CLAMP.search(name) else value))


def _has_sizes(value: Mapping[str, Any]) -> bool:
    return any(name in SIZES for name in value)


# ---- attention: groups, heads, head sizes, the residual width


def _attention(node: Config, real: Config, by_role: dict[str, list[str]], state: _State) -> None:
    heads = by_role.get("heads", [])
    if not heads:
        return
    tower = state.towers if state.style.distinct_towers else 0
    state.towers += 1
    shape = state.shape
    n_query = real[heads[0]]
    n_kv = next((real[name] for name in by_role.get("kv_heads", [])), n_query)
    slot = tower % len(_GROUPS)
    if n_kv == 1 and n_query > 1:
        groups, repeat = 1, (7, 6)[shape]  # as no other tower has
    elif 0 < n_kv < n_query:
        groups, repeat = ((2, 3), (3, 2))[shape] if tower % 2 == 0 else ((2, 2), (2, 3))[shape]
    else:
        groups, repeat = _GROUPS[slot][shape], 1
    if not state.style.any_heads and n_kv > 1:
        groups, repeat = ((2, 2), (4, 2))[shape] if n_kv < n_query else ((4, 1), (8, 1))[shape]
    head_dim = rotary.head_dim(_HEAD_DIMS[slot], real.get("rope_parameters"), shape)
    count = groups * repeat
    for name in heads:
        # numbers that differ stay apart: a proof has to tell which of them a site means
        node[name] = count if real[name] == n_query else 2 * count
    for name in by_role.get("kv_heads", []):
        node[name] = groups
    for name in by_role.get("head_dim", []):
        node[name] = head_dim
    for name in by_role.get("head_scale", []):
        node[name] = head_dim
    for role, own in (("other_head_dim", "head_dim"), ("other_kv_heads", "num_key_value_heads")):
        for name in by_role.get(role, []):
            node[name] = layers.other(own, real[name], node, real)
    latent = by_role.get("nope_dim") and by_role.get("rope_dim")
    for name in by_role.get("rope_dim", []):
        node[name] = (8, 12)[shape] if latent else _even(min(head_dim, max(4, head_dim // 2)))
    for name in by_role.get("nope_dim", []):
        node[name] = (12, 10)[shape]
    for name in by_role.get("value_dim", []):
        node[name] = (10, 14)[shape]
    for name in by_role.get("qk_dim", []):
        node[name] = (20, 22)[shape]
    if latent:
        for name in by_role.get("head_dim", []):
            node[name] = (8, 12)[shape] if real[name] == real[by_role["rope_dim"][0]] else (20, 22)[shape]
    free = any(SIZES.get(name) == "head_dim" for name in real)
    if state.style.free_width and (free or latent):
        for name, value in real.items():
            if SIZES.get(name) == "head_dim" and value is None:
                node[name] = head_dim
        width = count * (head_dim // 2 + 2 + (head_dim // 2) % 2)
    else:
        width = count * head_dim
        if not latent:
            for name in by_role.get("head_dim", []):
                node[name] = head_dim
    for name in by_role.get("width", [])[:1]:
        known = state.widths.get(real[name])
        if known is not None and not state.style.distinct_towers:
            width = known
        state.widths.setdefault(real[name], width)
        node[name] = width
        state.used |= {width, count * head_dim, groups * head_dim}
    rotary.resize(node.get("rope_parameters"), _real_head_dim(real, by_role), head_dim)


def _real_head_dim(real: Config, by_role: dict[str, list[str]]) -> int | None:
    for name in by_role.get("head_dim", []):
        return int(real[name])
    if by_role.get("width") and by_role.get("heads"):
        return int(real[by_role["width"][0]]) // int(real[by_role["heads"][0]])
    return None


def _even(number: int) -> int:
    return number - number % 2


# ---- everything that is one number


def _size(role: str, name: str, value: Any, node: Config, real: Config, state: _State) -> Any:
    shape = state.shape
    match role:
        case "width":
            if node[name] != value or isinstance(value, float):
                return node[name]
            if value in state.widths:
                return state.widths[value]
            state.widths[value] = state.choose(role, value, (48, 64, 80) if shape == 0 else (72, 96, 120))
            return state.widths[value]
        case "inner":
            return state.choose(role, value, _INNER[shape])
        case "linked":
            own = [key for key in real if SIZES.get(key) == "width" and real[key] == value]
            if own:
                return _size("width", own[0], real[own[0]], node, real, state)
            return state.widths[value] if value in state.widths else state.choose(role, value, _INNER[shape])
        case "rank":
            return state.choose(role, value, _RANKS[shape])
        case "vocabulary":
            return vocabulary(shape)
        case "positions":
            return 64 + 8 * shape
        case "source_positions":
            return 30 - 4 * shape
        case "window":
            return min(value, 8)
        case "top_k":
            # with routing groups there are many experts: more of them have to be chosen for all to take part
            return min(value, 4 if (real.get("n_group") or 1) > 1 else 2)
        case "count":
            return min(value, 2)
        case "queries":
            return min(value, 3 + shape)
        case "ratio":
            return type(value)((5, 3)[shape])  # another product with each width; some classes want a float
        case "mels":
            return (16, 20)[shape]
        case _:
            return node[name]


def _experts(node: Config, real: Config, by_role: dict[str, list[str]], state: _State) -> None:
    names = by_role.get("experts", [])
    if not names:
        return
    top_k = max([node[name] for name in by_role.get("top_k", [])], default=1)
    routed_groups = real.get("n_group") or 1
    each = 2 + state.shape if routed_groups > 1 else top_k + 2 + 2 * state.shape
    for name in names:
        node[name] = routed_groups * each if real[name] > 1 else real[name]


def _states(node: Config, by_role: dict[str, list[str]], shape: int) -> None:
    """Heads of a state space model, in groups; together a multiple of the residual width, where the class wants it."""
    heads, sizes = by_role.get("state_heads"), by_role.get("state_head_dim", [])
    groups = next((node[name] for name in STATE_GROUPS if isinstance(node.get(name), int)), None)
    if not heads or groups is None:
        return
    for name in by_role.get("state_dim", []):
        node[name] = (10, 14)[shape]
    for name in by_role.get("state_chunk", []):
        node[name] = (8, 16)[shape]  # a short text has several
    own = by_role.get("state_width", [])
    count, width = groups * (2, 3)[shape], groups * 12
    if STATE_EXPANSION in node and not own:
        width = node[STATE_EXPANSION] * node["hidden_size"]
        count = next((groups * k for k in (4, 3, 2) if width % (groups * k) == 0), groups)
    node[heads[0]] = count
    for name in sizes:
        node[name] = width // count
    for name in own:
        node[name] = width


def _linear(node: Config, real: Config, by_role: dict[str, list[str]], shape: int) -> None:
    """Heads of linear attention: values in groups of one key, or one for one."""
    roles = ("linear_key_heads", "linear_value_heads", "linear_key_dim", "linear_value_dim")
    if not all(role in by_role for role in roles):
        return
    keys, values, key, value = (by_role[role][0] for role in roles)
    groups, repeat = ((5, 2), (4, 3))[shape]
    node[keys] = groups
    node[values] = groups * repeat if real[values] > real[keys] else groups
    node[key], node[value] = ((10, 18), (14, 12))[shape]


# ---- images and tokens


def _image(node: Config, real: Config, state: _State) -> None:
    patch = (4, 6)[state.shape]

    def like(value: Any, number: int) -> Any:
        if isinstance(value, list):
            return [number] * len(value)
        if isinstance(value, dict):
            return dict.fromkeys(value, number)
        return number

    size = real.get("patch_size")
    if size is not None:
        node["patch_size"] = like(size, patch)
        for name in ("image_size", "input_size"):
            if real.get(name) is not None:
                node[name] = like(real[name], stages.patches(node, 5) * patch)


def _boxes(node: Config) -> None:
    """Six parts of the residual width, of coordinates and sizes of a box, where the class lines them up."""
    width = node.get("hidden_size")
    if isinstance(width, int) and {"coordinate_size", "shape_size"} <= node.keys():
        node["coordinate_size"] = -(-width // 6)
        node["shape_size"] = (width - 4 * node["coordinate_size"]) // 2


def _tokens(node: Config, state: _State) -> None:
    def small(token: int) -> int:
        if token < FIRST_FREE_TOKEN:
            return token
        if token not in state.tokens:
            state.tokens[token] = vocabulary(state.shape) - 1 - len(state.tokens) % SPECIAL_TOKENS
        return state.tokens[token]

    for name, value in node.items():
        if not name.endswith(("_token_id", "_token_index", "_token_ids", "suppress_tokens")):
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            node[name] = small(value)
        elif isinstance(value, list) and all(isinstance(token, int) for token in value):
            node[name] = [small(token) for token in value]
