"""The layout of checkpoint folders, which is Megatron-LM's.

``<save>/iter_0000100/`` is a checkpoint. ``<save>/latest_checkpointed_iteration.txt``, the tracker, names the newest or
says ``release``: then ``<save>/release/`` holds a model to start from. ``<save>/non_persistent/`` has its own tracker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dwm.atomic_write import atomic_write_text, delete_folder, remove
from megatron_dwm.config.checkpoint import TRACKER, CheckpointConfig
from megatron_dwm.config.checkpoint_args import first_rank_file, read_arguments
from megatron_dwm.errors import UserError
from megatron_dwm.training.checkpoint_checksums import CHECKSUMS

DWM_STATE = "dwm_state.pt"
"""The weighter's state, in a checkpoint's folder."""
RELEASE = "release"
NON_PERSISTENT = "non_persistent"


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Return the folder below ``folder`` of the checkpoint of ``iteration``."""
    return folder / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    """Return the iteration of the checkpoint in a folder."""
    return 0 if folder.name == RELEASE else int(folder.name.removeprefix("iter_"))


def is_iteration(text: str) -> bool:
    """Return whether text is the number of an iteration: ASCII digits, and not more than a checkpoint can hold."""
    return text.isascii() and text.isdigit() and len(text) < 20


def rank_file(folder: Path, tp_rank: int, pp_rank: int, pp_size: int) -> Path:
    """Return the file of a model-parallel rank in a checkpoint of the format ``torch``."""
    name = f"mp_rank_{tp_rank:02d}" if pp_size == 1 else f"mp_rank_{tp_rank:02d}_{pp_rank:03d}"
    return folder / name / "model_optim_rng.pt"


def has_torch_format(folder: Path) -> bool:
    """Return whether a checkpoint is in Megatron-LM's older format, ``torch``."""
    return first_rank_file(folder) is not None


def loading_line(folder: Path) -> str:
    """Return Megatron-LM's line before a checkpoint is loaded."""
    kind = "" if has_torch_format(folder) else "distributed "
    if folder.name == RELEASE:
        return f" loading release {kind}checkpoint from {folder.parent}"
    return f" loading {kind}checkpoint from {folder.parent} at iteration {iteration_of(folder)}"


def non_persistent_folder(flags: CheckpointConfig, root: str) -> Path:
    """Return where the non-persistent checkpoints of a run that saves to ``root`` are."""
    return Path(flags.non_persistent_global_ckpt_dir or Path(root) / NON_PERSISTENT)


def latest_checkpoint(flags: CheckpointConfig) -> Path | None:
    """Return the checkpoint folder that ``--load`` (and ``--ckpt-step``) name; None to start from scratch.

    A non-persistent checkpoint is taken if it is as new as the persistent one, with ``--non-persistent-ckpt-type``.

    Raises:
        UserError: there is no such checkpoint. Only a run whose ``--load`` is its ``--save`` folder may start without a
            checkpoint, so that the same command starts it and continues it.
    """
    if flags.load is None:
        return None
    root = Path(flags.load)
    folder = iteration_folder(root, flags.ckpt_step) if flags.ckpt_step is not None else tracked(root)
    if flags.non_persistent_ckpt_type is not None:
        newest = tracked(non_persistent_folder(flags, flags.load))
        if newest is not None and (folder is None or iteration_of(newest) >= iteration_of(folder)):
            folder = newest
    if folder is None:
        if is_first_start(flags):
            if flags.exit_on_missing_checkpoint:
                raise UserError(
                    f"--load {root}: no {TRACKER} there; check the path, or leave out --exit-on-missing-checkpoint"
                )
            return None
        raise UserError(f"--load {root}: {_what_is_there(root)}")
    if not (folder / "metadata.json").is_file() and not has_torch_format(folder):
        there = "does not exist" if not folder.exists() else "is not a whole checkpoint"
        raise UserError(f"--load {folder.parent}: {folder.name} {there}; {_other_steps(folder.parent)}")
    return folder


def saved_arguments(flags: CheckpointConfig) -> dict[str, Any]:
    """Return the arguments of the checkpoint that the flags name; none before a run's first checkpoint.

    Raises:
        UserError: the checkpoint is missing, or holds no arguments.
    """
    folder = latest_checkpoint(flags)
    return {} if folder is None else read_arguments(folder)


def is_first_start(flags: CheckpointConfig) -> bool:
    """Return whether ``--load`` is the ``--save`` folder of a run that has not saved anything yet."""
    if flags.load is None or flags.save is None or flags.finetune:
        return False
    root = Path(flags.load)
    is_same = root.resolve() == Path(flags.save).resolve()
    return is_same and (not root.exists() or (root.is_dir() and not _has_checkpoints(root)))


def older_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of earlier iterations next to ``folder``, newest first."""
    before = iteration_of(folder) if folder.name != RELEASE else 0
    return [other for other in reversed(checkpoints_in(folder.parent)) if iteration_of(other) < before]


def checkpoints_in(root: Path) -> list[Path]:
    """Return the folders of checkpoints in ``root``, by iteration."""
    found = [path for path in root.glob("iter_*") if is_iteration(path.name.removeprefix("iter_")) and path.is_dir()]
    return sorted(found, key=iteration_of)


def tracked(root: Path) -> Path | None:
    """Return the checkpoint folder that the tracker in ``root`` names; None if there is no tracker.

    Raises:
        UserError: the tracker's content is not Megatron-LM's.
    """
    path = root / TRACKER
    if path.is_dir():  # refused now, and not at the first save
        raise UserError(f"{path}: is a folder where a file belongs; remove it")
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if text == RELEASE:
        return root / RELEASE
    if not is_iteration(text):
        raise UserError(f"{path}: says {text[:40]!r} where an iteration belongs; {_other_steps(root)}")
    return iteration_folder(root, int(text))


def track_first_checkpoint(root: Path) -> Path | None:
    """Name the one checkpoint of a run that was killed between giving it its name and writing the tracker.

    Returns:
        the checkpoint; None if there is nothing to do.
    """
    found = checkpoints_in(root)
    if len(found) != 1 or (root / TRACKER).exists():
        return None
    # Both are written last, the second one also by Megatron-LM.
    if not any((found[0] / name).is_file() for name in (CHECKSUMS, "metadata.json")):
        return None
    atomic_write_text(root / TRACKER, str(iteration_of(found[0])))
    return found[0]


def retired_mark(folder: Path) -> Path:
    """Return the file that marks a checkpoint for deletion as soon as the tracker names another one."""
    return folder.with_name(f".{folder.name}.retired")


def delete_retired(root: Path) -> None:
    """Delete the checkpoints that are marked for deletion, unless the tracker still names them."""
    current = tracked(root)
    for mark in root.glob(".iter_*.retired"):
        folder = root / mark.name.removeprefix(".").removesuffix(".retired")
        if folder != current and folder.exists():
            delete_folder(folder)
        remove(mark)


def _what_is_there(root: Path) -> str:
    """Return what was found at ``--load`` instead of a folder of checkpoints, and the remedy."""
    if not root.exists():
        return "does not exist; check the path"
    if not root.is_dir():
        return "is a file; give the folder that a run saved to"
    if (root / "metadata.json").is_file() or (root / "common.pt").is_file():
        step = root.name.removeprefix("iter_").lstrip("0")
        named = f", and --ckpt-step {step}" if root.name.startswith("iter_") and is_iteration(step) else ""
        return f"is one checkpoint; give the folder that it is in, {root.parent}{named}"
    if _has_checkpoints(root):
        return f"holds checkpoints but no {TRACKER}; {_other_steps(root)}"
    return f"no {TRACKER} there; check the path"


def _has_checkpoints(root: Path) -> bool:
    names = (RELEASE, "metadata.json", "common.pt")
    return bool(checkpoints_in(root)) or any((root / name).exists() for name in names)


def _other_steps(root: Path) -> str:
    steps = [str(iteration_of(path)) for path in checkpoints_in(root) if (path / "metadata.json").is_file()]
    return f"give --ckpt-step of one that is there ({', '.join(steps[-5:])})" if steps else "give another folder"
