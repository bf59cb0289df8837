"""How many inputs the fuzz tests try: few and always the same ones, or ``FUZZ_FACTOR`` times as many and new ones."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings, strategies

from megatron_dwm.errors import MAX_CHARACTERS, UserError, print_error

FACTOR = int(os.environ.get("FUZZ_FACTOR", "0"))


def fuzz_settings(examples: int) -> Callable[[Any], Any]:
    """Return the settings of a test that tries ``examples`` inputs, or by ``FUZZ_FACTOR`` a multiple of them."""
    return settings(
        max_examples=examples * max(1, FACTOR),
        derandomize=FACTOR == 0,
        database=None,  # no folder beside the sources
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explaining takes minutes
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def assert_short_line(error: UserError) -> str:
    """Check that an error is printed as one line of bounded length; return the line."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        print_error(error)
    line = printed.getvalue()
    assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
    assert len(line) < MAX_CHARACTERS + 20, line
    return line


def damaged(content: bytes) -> strategies.SearchStrategy[bytes]:
    """Return a strategy for damaged files: bytes are changed, zeroed, lost, or added at any place."""
    places = strategies.integers(0, max(0, len(content) - 1))

    def changed(place: int, added: bytes, lost: int) -> bytes:
        return content[:place] + added + content[place + lost :]

    flipped = strategies.builds(
        lambda place, bit: changed(place, bytes([content[place] ^ (1 << bit)]), 1), places, strategies.integers(0, 7)
    )
    edited = strategies.builds(changed, places, strategies.binary(max_size=16), strategies.integers(0, 16))
    cut = strategies.builds(lambda place: content[:place], places)
    zeroed = strategies.builds(
        lambda place, size: content[:place] + bytes(len(content[place : place + size])) + content[place + size :],
        places,
        strategies.integers(1, 64),
    )
    return strategies.one_of(flipped, edited, cut, zeroed, strategies.binary(max_size=200))
