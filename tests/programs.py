"""Run a program in a fork of the tests, which has already imported what would take it seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.paths import ROOT

Finished = subprocess.CompletedProcess[str]


class Fork:
    """A call in a fork of this process."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._output, self._errors = Path(self._folder.name, "output"), Path(self._folder.name, "errors")
        self.process: Any = multiprocessing.get_context("fork").Process(target=self._run, args=(work,))
        self.process.start()

    def _run(self, work: Callable[[], object]) -> None:
        for descriptor, file in ((1, self._output), (2, self._errors)):
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        work()

    def finish(self) -> Finished:
        """Wait for its end; return its exit code and all that it wrote, libraries in other languages included."""
        self.process.join()
        with self._folder:
            return Finished([], self.process.exitcode, self._output.read_text(), self._errors.read_text())


def start_program(path: str, *arguments: object) -> Fork:
    """Start a program of the repository as ``python path arguments`` would."""

    def work() -> None:
        sys.argv = [path, *map(str, arguments)]
        runpy.run_path(str(ROOT / path), run_name="__main__")

    return Fork(work)


def run_program(path: str, *arguments: object) -> Finished:
    """Run a program to its end."""
    return start_program(path, *arguments).finish()


def call_main(main: Callable[[Sequence[str]], None], *arguments: object) -> int:
    """Call a command in this process; return its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0
