"""Which layers a flag means."""

from __future__ import annotations

import pytest

from megatron_dwm.config.layer_patterns import parse_layers
from megatron_dwm.errors import UserError


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("3", 3),
        ("[1,0,0,1]", [1, 0, 0, 1]),
        ("([1]*3+[0])*1", [1, 1, 1, 0]),
        ("([0]*1+[1]*1)*2", [0, 1, 0, 1]),
        (" [1]*4 ", [1, 1, 1, 1]),
    ],
)
def test_megatron_lms_expressions_are_read(text: str, layers: int | list[int]):
    assert parse_layers("--no-rope-freq", text, 4) == layers


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "-1",
        "[1]*5",
        "[2]*4",
        "[1]*10**9",
        "[1]*(10000000000)",
        "__import__('os')",
        "[1,",
        "",
        "[[1]]*4",
        "2*[1,0]",
    ],
)
def test_anything_else_is_refused(text: str):
    with pytest.raises(UserError, match=r"--no-rope-freq .*neither a positive number nor a pattern"):
        parse_layers("--no-rope-freq", text, 4)
