"""An export that cannot be written is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_dwm.errors import UserError
from megatron_dwm.weighting.export import _reported_failure


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (SafetensorError("Error while serializing: I/O error: File too large"), "SafetensorError: Error while"),
    ],
)
def test_a_full_disk_is_one_line(error: Exception, reason: str):
    with (
        pytest.raises(UserError, match=rf"--save runs: the weighter of iteration 8 cannot be written \({reason}"),
        _reported_failure(Path("runs"), 8),
    ):
        raise error


def test_so_is_one_that_the_tokenizer_finds():
    """tokenizers raises a plain Exception."""
    with (
        pytest.raises(UserError, match=r"iteration 8 cannot be written \(No space left on device"),
        _reported_failure(Path("runs"), 8),
    ):
        Tokenizer(WordLevel({"a": 0}, "a")).save("/dev/full")


def test_a_mistake_of_the_programs_is_not_taken_for_one():
    with pytest.raises(KeyError), _reported_failure(Path("runs"), 8):
        raise KeyError("x")
