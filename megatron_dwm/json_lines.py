"""Parsing of JSON lines."""

from __future__ import annotations

import json
from typing import Any


def parse_object(line: str | bytes) -> dict[str, Any]:
    """Return the JSON object in a line.

    Raises:
        ValueError: the line is not JSON, is nested too deeply, or holds something other than an object.
    """
    try:
        value = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value
