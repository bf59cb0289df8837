"""An export that cannot be written is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

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


def test_a_mistake_of_the_programs_is_not_taken_for_one():
    with pytest.raises(KeyError), _reported_failure(Path("runs"), 8):
        raise KeyError("x")
