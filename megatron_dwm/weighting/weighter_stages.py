"""The schedule of a frozen run with another run's exports: that of each stage at the same fraction of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.errors import UserError
from megatron_dwm.weighting.export_manifest import MANIFEST, read_manifest


@dataclass(frozen=True)
class WeighterStage:
    """An exported weighter, and the last iteration that uses it."""

    folder: str
    last_iteration: int
    """The last iteration of the current run that uses it."""
    number: int
    """The number of the stage at whose end it was exported."""


def weighter_stages(flag: str, folder: str, train_iters: int) -> list[WeighterStage]:
    """Return the stages of a run with the weighter in ``folder``.

    Args:
        flag: the flag that names ``folder``, for messages.
        folder: an export, which is used for the whole run, or the folder ``weighter`` with all exports of
            another run, of which the last one of each stage is used.
        train_iters: iterations of the run that uses them.

    Raises:
        UserError: a manifest cannot be read.
    """
    root = Path(folder)
    exports = [] if (root / "config.json").is_file() else sorted(root.glob(f"iter_*/{MANIFEST}"))
    if not exports:
        return [WeighterStage(folder, train_iters, 1)]
    ends: dict[int, tuple[int, Path]] = {}
    length = 0
    for path in exports:
        try:
            manifest = read_manifest(path.parent)
            stage, iteration = int(manifest["stage"]), int(manifest["iteration"])
            length = max(length, iteration, int(manifest.get("train_iters") or 0))
        except (ValueError, OverflowError, TypeError, KeyError) as error:
            reason = f"{type(error).__name__} {error}".splitlines()[0][:100]
            raise UserError(f"{flag} {folder}: {path} cannot be read ({reason}); export it again") from None
        if stage > 0 and iteration > ends.get(stage, (0,))[0]:
            ends[stage] = (iteration, path.parent)
    if not ends:
        raise UserError(f"{flag} {folder}: all its exports are from the warm-up; give the folder of one of them")
    stages = [
        WeighterStage(str(path), round(train_iters * iteration / length), stage)
        for stage, (iteration, path) in sorted(ends.items())
    ]
    # The last weighter of an interrupted run is used for the stages that it did not reach.
    stages[-1] = WeighterStage(stages[-1].folder, train_iters, stages[-1].number)
    return [
        stage
        for before, stage in zip([0, *(s.last_iteration for s in stages)], stages, strict=False)
        if stage.last_iteration > before
    ]
