"""The progress of a run, and the parts of it that a checkpoint restores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dwm.model.protocols import ModelChunk, Optimizer
from megatron_dwm.model.vocabulary import Vocabulary

EVALUATIONS = ("validation", "tasks")
"""Evaluations during training, in their order."""


@dataclass
class TrainState:
    """Counters of a run's progress."""

    iteration: int = 0
    consumed_train_samples: int = 0
    skipped_train_samples: int = 0
    consumed_valid_samples: int = 0
    num_floating_point_operations_so_far: float = 0
    evaluations_due: tuple[str, ...] = ()
    """Those of ``EVALUATIONS`` that are due at this iteration and have not been made yet."""

    def advance(self, iteration: int, samples: int, flops: float, skipped_samples: int = 0) -> None:
        """Count one iteration.

        Args:
            skipped_samples: the samples by which its batch was smaller than the flags request.
        """
        self.skipped_train_samples += skipped_samples
        self.iteration = iteration
        self.consumed_train_samples += samples
        self.num_floating_point_operations_so_far += flops


@dataclass(frozen=True)
class TrainComponents:
    """The parts of a run whose state a checkpoint holds."""

    chunks: Sequence[ModelChunk]
    optimizer: Optimizer
    scheduler: Any
    vocabulary: Vocabulary
