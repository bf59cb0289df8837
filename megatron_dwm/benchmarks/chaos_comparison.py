"""Bit-for-bit comparison of a disturbed run with an undisturbed one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.analysis.records import Record, read_run
from megatron_dwm.errors import UserError
from megatron_dwm.training.checkpoint_folders import iteration_folder
from megatron_dwm.training.folder_lock import LOCK
from megatron_dwm.training.saved_checkpoint import open_checkpoint

_TIMES = ("seconds", "elapsed", "throughput")
"""Parts of the names of metrics that depend on the machine."""


def differences(expected: Path, found: Path, iterations: int) -> list[str]:
    """Return the differences of a run's folder from another's, and the leftovers in it."""
    try:
        return [
            *_different_records(expected, found),
            *_different_checkpoints(iteration_folder(expected, iterations), iteration_folder(found, iterations)),
            *_different_exports(expected / "weighter", found / "weighter"),
            *(f"left over: {path.relative_to(found)}" for path in _leftovers(found)),
        ]
    except UserError as error:
        return [str(error)]


def _different_records(expected: Path, found: Path) -> Iterator[str]:
    one, other = read_run(expected), read_run(found)
    yield from _different_lists("steps", one.steps, other.steps)
    yield from _different_lists("updates", one.updates, other.updates)
    yield from _different_lists("evaluations", one.evaluations, other.evaluations)


def _different_lists(kind: str, expected: Sequence[Record], found: Sequence[Record]) -> Iterator[str]:
    if len(expected) != len(found):
        yield f"{len(found)} records of {kind}, not {len(expected)}"
    for one, other in zip(expected, found, strict=False):
        for name in one.keys() | other.keys():
            if not any(word in name for word in _TIMES) and one.get(name) != other.get(name):
                yield f"{kind}, iteration {one['iteration']}: {name} differs"
                return


def _different_checkpoints(expected: Path, found: Path) -> Iterator[str]:
    one, other = open_checkpoint(expected), open_checkpoint(found)
    if one.shapes != other.shapes:
        yield f"{found.name}: other tensors"
        return
    for key in one.shapes:
        if not torch.equal(*(saved.read_tensors([key])[key] for saved in (one, other))):
            yield f"{found.name}: {key} differs"
    if not _are_same(one.read_dwm_state(), other.read_dwm_state()):
        yield f"{found.name}: the weighting's state differs"


def _different_exports(expected: Path, found: Path) -> Iterator[str]:
    # A run that was asked to stop has exported there, too.
    for folder in sorted(expected.iterdir()):
        weights = [root / folder.name / "model.safetensors" for root in (expected, found)]
        if not weights[1].is_file():
            yield f"no export {folder.name}"
        elif weights[0].read_bytes() != weights[1].read_bytes():
            yield f"export {folder.name} differs"


def _leftovers(save: Path) -> list[Path]:
    return [path for folder in (save, save / "weighter") for path in folder.glob(".*") if path.name != LOCK]


def _are_same(one: Any, other: Any) -> bool:
    """Return whether two values are the same, tensors in them bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_are_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_are_same, one, other))
    return bool(one == other)
