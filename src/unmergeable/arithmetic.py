"""Sizes as arithmetic over config fields: `num_attention_heads // num_key_value_heads`."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from .errors import InputError


def evaluate_size(expression: str, config: Mapping[str, Any], where: str = "size") -> int:
    """A size such as `num_attention_heads // num_key_value_heads`, from a canonical config.

    Names are fields (dotted for nested configs), `num_heads[2]` is an entry of a list, `a or b` takes b where a is
    missing or null, `*`, `//`, `+` and `-` are arithmetic and `//` must leave no rest. `int(a * b)` and `int(a / b)`
    round down, for fractions such as a partial rotary factor, and for sizes that are multiples of a power of two.

    Raises:
        InputError: a field is missing or not a number, or a division leaves a rest.
    """
    tree = _size_tree(expression)
    value = _value(tree.body, config, expression, where)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(
            f"the config gives no size for '{expression}'",
            where=where,
            expected="a positive integer",
            got=value,
        )
    return value


@lru_cache(maxsize=1024)
def _size_tree(expression: str) -> ast.Expression:
    try:
        return ast.parse(expression, mode="eval")
    except SyntaxError:
        raise InputError("not a size expression", where=f"'{expression}'") from None


def lookup(config: Mapping[str, Any], path: str) -> Any:
    """A field of a nested config by its dotted path; None where it is missing."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _value(node: ast.expr, config: Mapping[str, Any], text: str, where: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name | ast.Attribute):
        return lookup(config, ast.unparse(node))
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        entries, place = lookup(config, ast.unparse(node.value)), node.slice.value
        inside = isinstance(entries, list) and isinstance(place, int) and 0 <= place < len(entries)
        return entries[place] if inside else None
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        values = (_value(part, config, text, where) for part in node.values)
        return next((value for value in values if value is not None), None)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "int" and len(node.args) == 1:
        value = _value(node.args[0], config, text, where)
        return None if value is None else int(value)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, config, text, where), _value(node.right, config, text, where)
        if left is None or right is None:
            return None
        if not all(isinstance(side, int | float) and not isinstance(side, bool) for side in (left, right)):
            raise InputError(f"'{text}' is not made of numbers", where=where, got=f"{left!r}, {right!r}")
        match node.op:
            case ast.Mult():
                return left * right
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Div() if right:
                return left / right
            case ast.FloorDiv():
                if right == 0 or left % right:
                    raise InputError(f"'{text}' leaves a rest", where=where, got=f"{left} // {right}")
                return left // right
    raise InputError("not a size expression", where=f"{where}: '{text}'")
