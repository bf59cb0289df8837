"""Which messages are printed, and where."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from megatron_dwm.runtime.logging import configure_logging, print_messages_of
from tests.programs import Fork


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


def run_python(code: str, stdout: int) -> tuple[int, str]:
    """Exit code and standard error of an interpreter, with its own end, whose output goes to a descriptor."""
    names = "import logging; from megatron_dwm.runtime.logging import *; from megatron_dwm.errors import run_cli; "
    done = subprocess.run([sys.executable, "-c", names + code], stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(stdout)
    return done.returncode, done.stderr


def pipe_without_a_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


LINES = "[logging.getLogger('megatron_dwm.a').info('an iteration') for _ in range(3)]"


def test_a_run_goes_on_without_its_log():
    run = f"configure_logging(may_lose=True); {LINES}; logging.getLogger('megatron_dwm').warning('the end')"
    assert run_python(run, pipe_without_a_reader()) == (0, "warning: the end\n")
    lost = "warning: the log cannot be written (Bad file descriptor): lines are lost, and the run goes on\n"
    assert run_python(run, os.open(__file__, os.O_RDONLY)) == (0, lost + "warning: the end\n")


def test_a_command_whose_output_nobody_reads_ends_quietly():
    command = f"configure_logging(); run_cli(lambda: {LINES}); raise AssertionError"
    assert run_python(command, pipe_without_a_reader()) == (141, "")


def test_a_closed_output_is_no_error():
    configure = "import sys, os; sys.stdout = sys.stderr = None; configure_logging(may_lose=True); "
    flush = f"{LINES}; logging.getLogger('megatron_dwm').warning('a warning'); sys.stdout.flush(); sys.stderr.flush()"
    assert run_python(configure + flush, os.open(os.devnull, os.O_RDONLY)) == (0, "")


def test_paths_that_are_no_text_are_printed():
    def command() -> None:
        configure_logging()
        logging.getLogger("megatron_dwm.training").info("saved to %s", os.fsdecode(b"r\xffn"))

    finished = Fork(command).finish()
    assert (finished.returncode, finished.stdout) == (0, "saved to r\\udcffn\n")
