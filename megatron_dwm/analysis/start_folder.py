"""The folder that a run was started from, to which relative paths in its arguments refer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_dwm.training.run_status import read_run_status


def find_start_folder(save: Path, saved_as: str | None, named: Sequence[str]) -> Path:
    """Return the folder in which most of the paths in a run's arguments exist.

    That is the current folder, the one that the run's status names, the one from which ``--save`` leads to the run
    (a whole project may have been moved), or one above the run; the first of these where several are as good.

    Args:
        save: where the run saved to, as it is found now.
        saved_as: the value of its ``--save``.
        named: paths in its other arguments, relative or not.
    """
    run = save.resolve()
    candidates = [Path.cwd()]
    if isinstance(folder := read_run_status(save).get("folder"), str):
        candidates.append(Path(folder))
    if saved_as is not None and not os.path.isabs(saved_as):
        parts = Path(os.path.normpath(saved_as)).parts
        if run.parts[-len(parts) :] == parts:
            candidates.append(Path(*run.parts[: -len(parts)]))
    candidates += [run, *run.parents]
    return max(candidates, key=lambda folder: sum((folder / path).exists() for path in named))


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Work in another folder while the block runs.

    A run's arguments hold paths in many places, which libraries open; all of them are relative to that folder.
    """
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
