"""Layer patterns: ``4`` for every fourth layer, or an expression such as ``([1]*3+[0]*1)*2``."""

from __future__ import annotations

import ast

from megatron_dwm.config.flags import MAX_LAYERS
from megatron_dwm.errors import UserError


def parse_layers(flag: str, text: str, num_layers: int) -> int | list[int]:
    """Parse the value of a flag that selects layers.

    Args:
        flag: the flag whose value is ``text``.
        num_layers: number of layers of the model.

    Returns:
        the interval, or 0 or 1 for each layer.

    Raises:
        UserError: it is neither a positive number nor a pattern of as many zeros and ones as there are layers.
    """
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        value = None
    if isinstance(value, int) and value >= 1:
        return value
    if isinstance(value, list) and len(value) == num_layers and all(item in (0, 1) for item in value):
        return value
    raise UserError(
        f"{flag} {text}: neither a positive number nor a pattern of 0 and 1 for {num_layers} layers; give e.g. "
        f"2 or [1]*{num_layers}"
    )


def _evaluate(node: ast.expr) -> int | list[int]:
    """Return the value of an expression of integers, lists, + and *.

    Raises:
        ValueError: it holds something else, or is too long.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.List):
        items = [_evaluate(item) for item in node.elts]
        return [item for item in items if isinstance(item, int)]
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            if len(left) * right > MAX_LAYERS:
                raise ValueError("too long")
            return left * right
    raise ValueError("not a pattern")
