"""Which messages are printed, and where."""

from __future__ import annotations

import logging

import pytest

from megatron_dwm.runtime.logging import print_messages_of


def test_messages_of_another_package_are_printed_from_a_level_on_by_the_first_rank(
    capsys: pytest.CaptureFixture[str],
):
    """``--logging-level`` does this with megatron-core's."""
    logger = logging.getLogger("another_package.module")
    for rank, level in ((0, logging.WARNING), (0, logging.DEBUG), (1, logging.DEBUG)):
        print_messages_of("another_package", rank, 2, level)
        logger.debug("a detail of rank %d", rank)
        logger.warning("a warning of rank %d", rank)
    printed = capsys.readouterr()
    assert printed.out == "a detail of rank 0\n"
    assert printed.err == "warning: a warning of rank 0\n" * 2
