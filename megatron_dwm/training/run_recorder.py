"""The records and curves of a run: where they are written, and which of an earlier run are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dwm.config.logging import LoggingConfig
from megatron_dwm.runtime.record_writers import JsonLinesWriter, ScalarWriter, TensorBoardWriter, WandbWriter
from megatron_dwm.training.train_state import TrainState

AFTER_TRAINING = "after_training"
"""True in the record of an evaluation after the last iteration; others have no such field."""
_EVALUATIONS = {"evaluation": "validation", "tasks": "tasks"}
"""The evaluation that makes the records of a kind."""


class RunRecorder:
    """Writes JSON-lines records and curves, on the last rank; on the others it writes nothing."""

    def __init__(self, jsonl: JsonLinesWriter | None = None, boards: Sequence[ScalarWriter] = ()) -> None:
        self._jsonl, self._boards = jsonl, boards

    @property
    def has_curves(self) -> bool:
        """Whether curves are written."""
        return bool(self._boards)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record."""
        if self._jsonl is not None:
            self._jsonl.write(record)

    def draw(self, name: str, value: float, iteration: int, samples: int | None = None) -> None:
        """Write a point of a curve.

        Args:
            samples: training samples consumed so far, for a second curve over them, as Megatron-LM writes.
        """
        for board in self._boards:
            board.scalar(name, value, iteration, samples)

    def close(self) -> None:
        """Close the files."""
        if self._jsonl is not None:
            self._jsonl.close()
        for board in self._boards:
            board.close()


def open_recorder(
    flags: LoggingConfig, save: str | None, arguments: Mapping[str, Any], start: TrainState, *, has_trained: bool
) -> RunRecorder:
    """Open the files that the flags name; called on the last rank.

    Records that the run will write again, because it resumes from before them, are removed.

    Args:
        save: the run's ``--save`` folder.
        arguments: all flags, for Weights & Biases.
        start: how far the run has come when it starts.
        has_trained: whether it has trained to its end.

    Raises:
        UserError: a file cannot be written.
    """

    def is_repeated(record: Mapping[str, Any]) -> bool:
        """Return whether a record of the iteration where the run resumed belongs to an evaluation that is repeated."""
        if AFTER_TRAINING in record:
            return has_trained
        return _EVALUATIONS.get(str(record.get("kind"))) in start.evaluations_due

    path = flags.records_file(save)
    jsonl = None if path is None else JsonLinesWriter(path, start.iteration, is_repeated)
    boards: list[ScalarWriter] = []
    if flags.tensorboard_dir is not None:
        boards.append(TensorBoardWriter(flags.tensorboard_dir, flags.tensorboard_queue_size))
    if flags.wandb_project:
        boards.append(WandbWriter(flags, save, arguments))
    return RunRecorder(jsonl, boards)
