"""Verify checkpoints completely: checksums, every tensor and object, the weighter's state.

``--load`` is a run's ``--save`` folder; all its checkpoints and exported weighters are verified.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import build, flag, read, require_given
from megatron_dwm.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckCheckpointConfig:
    """Checkpoints to verify."""

    load: str = flag("", "Folder of checkpoints: a run's --save.")
    ckpt_step: int | None = flag(None, "Iteration of the only checkpoint to verify; by default all.")

    def __post_init__(self) -> None:
        require_given(self, "load", "give the folder that a run saved to")


def main(argv: Sequence[str] | None = None) -> None:
    """Verify checkpoints; the exit code is 2 if one is damaged."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config = build(CheckCheckpointConfig, read(argv, [CheckCheckpointConfig], description=__doc__))
    folders = checkpoints_to_verify(config)
    size = sum(map(_size, folders))
    faults, deleted = [], 0
    # Each byte is read twice: for its checksum, and as part of a tensor.
    with tqdm(total=2 * size, unit="B", unit_scale=True, disable=not os.isatty(2)) as bar:
        for folder in folders:
            try:
                logger.info(f"{folder}: {verify(folder, bar.update)}")
            except UserError as error:
                if not folder.is_dir():
                    deleted += 1
                    logger.info(f"{folder}: was deleted by its run meanwhile")
                    continue
                faults.append(error)
                logger.error(error)
    if faults:
        raise UserError(f"--load {config.load}: {len(faults)} of {len(folders)} are damaged; remove them")
    logger.info(f"{config.load}: all {len(folders) - deleted} are whole, {size / 1e6:,.1f} MB")


def _size(folder: Path) -> int:
    """Return the bytes of a folder's files, as far as they are still there."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def checkpoints_to_verify(config: CheckCheckpointConfig) -> list[Path]:
    """Return the folders of checkpoints, and of weighters' exports, that the flags name.

    Raises:
        UserError: there are none.
    """
    from megatron_dwm.training.checkpoint_folders import NON_PERSISTENT, RELEASE, checkpoints_in, iteration_folder

    root = Path(config.load)
    if config.ckpt_step is not None:
        found = [iteration_folder(root, config.ckpt_step)]
    else:
        release = [root / RELEASE] if (root / RELEASE).is_dir() else []
        exports = sorted(path for path in (root / "weighter").glob("iter_*") if path.is_dir())
        found = [*release, *checkpoints_in(root), *checkpoints_in(root / NON_PERSISTENT), *exports]
    if not found or not found[0].is_dir():
        raise UserError(f"--load {root}: no such checkpoint there; give the folder that a run saved to")
    return found


def verify(folder: Path, on_read: Callable[[int], object]) -> str:
    """Verify one folder; return a line that describes its content.

    Raises:
        UserError: it is damaged.
    """
    from megatron_dwm.training.checkpoint_folders import has_torch_format
    from megatron_dwm.weighting.export_manifest import MANIFEST, verify_export

    if has_torch_format(folder):
        return _verify_torch_checkpoint(folder, on_read)
    if (folder / MANIFEST).exists():
        verify_export("--load", folder)
        return "an exported weighter, whole"
    return _verify_checkpoint(folder, on_read)


def _verify_checkpoint(folder: Path, on_read: Callable[[int], object]) -> str:
    from megatron_dwm.training.checkpoint_checksums import CHECKSUMS
    from megatron_dwm.training.saved_checkpoint import DamagedCheckpointError, reported_damage, verify_checkpoint
    from megatron_dwm.weighting.saved_state import check_weighter_state

    with reported_damage(folder):
        saved = verify_checkpoint(folder, on_read)
    tensors = not_finite = 0
    for key in saved.shapes:  # one at a time: a checkpoint may be larger than memory
        (tensor,) = saved.read_tensors([key]).values()
        # Padding between parameters in the distributed optimizer's buckets is uninitialized memory.
        not_finite += not _is_finite(tensor) and not key.startswith("optimizer.distributed.")
        tensors += 1
        on_read(tensor.numel() * tensor.element_size())
    objects = [key for key in saved.metadata.state_dict_metadata if key not in saved.shapes]
    for key in objects:
        saved.read_object(key)
    state = saved.read_dwm_state()
    with reported_damage(folder):
        check_weighter_state(state)
    not_finite += sum(not _is_finite(value) for value in _tensors_in(state))
    if not_finite:
        with reported_damage(folder):
            raise DamagedCheckpointError(f"{not_finite} tensors hold values that are not finite")
    verified = "checksums verified" if (folder / CHECKSUMS).exists() else "without checksums"
    weighter = ", a weighter" if state.get("weighter") else ""
    return f"whole, {verified}: {tensors} tensors, {len(objects)} objects{weighter}"


def _verify_torch_checkpoint(folder: Path, on_read: Callable[[int], object]) -> str:
    from megatron_dwm.training.saved_checkpoint import DamagedCheckpointError, reported_damage, verify_torch_checkpoint

    tensors = not_finite = 0
    with reported_damage(folder):
        for state in verify_torch_checkpoint(folder, on_read):
            found = _tensors_in(state)
            tensors += len(found)
            not_finite += sum(not _is_finite(tensor) for tensor in found)
            on_read(sum(tensor.numel() * tensor.element_size() for tensor in found))
        if not_finite:
            raise DamagedCheckpointError(f"{not_finite} tensors hold values that are not finite")
    ranks = len(list(folder.glob("mp_rank_*")))
    return f"whole, in the format torch: {tensors} tensors of {ranks} ranks"


def _is_finite(tensor: Any) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tensors_in(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [tensor for entry in value.values() for tensor in _tensors_in(entry)]
    if isinstance(value, list):
        return [tensor for entry in value for tensor in _tensors_in(entry)]
    return [value] if hasattr(value, "is_floating_point") else []


if __name__ == "__main__":
    main()
