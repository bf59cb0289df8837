"""Temporary changes of objects' attributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def temporary_attributes(target: Any, values: dict[str, Any]) -> Iterator[None]:
    """Set attributes of ``target`` inside the context, and restore them afterwards."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
