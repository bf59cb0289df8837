"""Where checkpoints are, in Megatron-LM's folders.

``<save>/iter_0000100/`` is a checkpoint. ``<save>/latest_checkpointed_iteration.txt``, the tracker, names the newest or
says ``release``: then ``<save>/release/`` holds a model to start from. ``<save>/non_persistent/`` has its own tracker.
"""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
DWM_STATE = "dwm_state.pt"
"""The weighter's state, in a checkpoint's folder."""
RELEASE = "release"
NON_PERSISTENT = "non_persistent"


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Return the folder below ``folder`` of the checkpoint of ``iteration``."""
    return folder / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    """Return the iteration at which a run goes on from a checkpoint's folder."""
    return 0 if folder.name == RELEASE else int(folder.name.removeprefix("iter_"))


def loading_line(folder: Path) -> str:
    """Return Megatron-LM's line before a checkpoint is loaded."""
    if folder.name == RELEASE:
        return f" loading release distributed checkpoint from {folder.parent}"
    return f" loading distributed checkpoint from {folder.parent} at iteration {iteration_of(folder)}"


def non_persistent_folder(flags: CheckpointConfig, root: str) -> Path:
    """Return where the non-persistent checkpoints of a run that saves to ``root`` are."""
    return Path(flags.non_persistent_global_ckpt_dir or Path(root) / NON_PERSISTENT)


def latest_checkpoint(flags: CheckpointConfig) -> Path | None:
    """Return the checkpoint folder that ``--load`` (and ``--ckpt-step``) name; None to start anew.

    A non-persistent checkpoint is taken if it is as new as the persistent one, with ``--non-persistent-ckpt-type``.

    Raises:
        UserError: a checkpoint is asked for by name, or must exist, and does not.
    """
    if flags.load is None:
        return None
    root = Path(flags.load)
    folder = iteration_folder(root, flags.ckpt_step) if flags.ckpt_step else tracked(root)
    if flags.non_persistent_ckpt_type is not None:
        newest = tracked(non_persistent_folder(flags, flags.load))
        if newest is not None and (folder is None or iteration_of(newest) >= iteration_of(folder)):
            folder = newest
    if folder is None:
        if flags.exit_on_missing_checkpoint:
            raise UserError(
                f"--load {root}: no {TRACKER} there; check the path, or leave out --exit-on-missing-checkpoint"
            )
        return None
    if not (folder / "metadata.json").is_file():
        raise UserError(
            f"--load {folder.parent}: {folder.name} is not a whole torch_dist checkpoint; give --ckpt-step of another"
        )
    return folder


def tracked(root: Path) -> Path | None:
    """Return the checkpoint folder that the tracker in ``root`` names; None if there is no tracker.

    Raises:
        UserError: the tracker's content is not Megatron-LM's.
    """
    path = root / TRACKER
    if not path.is_file():
        return None
    text = path.read_text().strip()
    if text == RELEASE:
        return root / RELEASE
    if not text.isdigit():
        raise UserError(f"{path}: says {text!r} where an iteration belongs; write the number of a checkpoint there")
    return iteration_folder(root, int(text))
