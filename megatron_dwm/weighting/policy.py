"""The protocol between training and weighting: all that training knows about how samples get their weights.

The training loop is five calls: next batch, :meth:`~SampleWeighting.before_step`,
:meth:`~SampleWeighting.weigh`, the training step, :meth:`~SampleWeighting.after_step`. A way of weighting is
one class with these methods; ``docs/extending.md`` has an example. Every rank calls every method, with the same
iteration, in this order. The collectives of a method are part of the protocol, and are stated in its docstring.

Shape legend: N samples of the global batch, n of this replica.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.model.loss import SampleLosses
from megatron_dwm.runtime.host_copy import HostCopy

Record = dict[str, Any]
"""One line of the run's JSON-lines file, with its kind in ``kind``."""
State = dict[str, Any]
"""State in a checkpoint: tensors, numbers, strings, and lists and dicts of them."""
PER_PARAMETER = "per_parameter"
"""Key in a state for per-parameter tensors: by name, one tensor for each parameter, with its shape and its sharding."""


@dataclass(frozen=True)
class SampleWeights:
    """Weights of one step's samples. Their mean is 1, so that 1.0 everywhere is the plain loss, bit for bit."""

    replica_sample_weights: torch.Tensor
    """N softmax(scores / temperature) of this replica's samples [n], float64, on its device."""
    scores_and_weights: HostCopy
    """Scores and weights of the whole batch [2, N]."""
    sources_and_factors: HostCopy
    """The source and the loss factor of each sample [N, 2]."""

    @property
    def scores(self) -> torch.Tensor:
        """[N], float64, in global order (microbatch, data-parallel rank, position), on the CPU."""
        return self.scores_and_weights.read()[0]

    @property
    def sample_weights(self) -> torch.Tensor:
        """N softmax(scores / temperature) [N], float64, in global order, on the CPU."""
        return self.scores_and_weights.read()[1]


class StepOutcome(Protocol):
    """The result of a training step, as the weighting sees it."""

    @property
    def skipped(self) -> bool:
        """Whether no update was made, because the gradient overflowed (fp16)."""

    @property
    def learning_rate(self) -> float:
        """The learning rate of the step, the largest of the parameter groups, the same on every rank."""

    @property
    def sample_losses(self) -> SampleLosses | None:
        """This replica's losses before the step; None except on the last pipeline stage."""


class SampleWeighting(Protocol):
    """A way to weight the samples of each batch."""

    def before_step(self, iteration: int) -> None:
        """Prepare for an iteration, which counts from 1.

        May gather parameters over all groups; must leave the model's parameters unchanged.
        """

    def weigh(self, iteration: int, batch: Batch) -> SampleWeights | None:
        """Return the weights for this replica's ``batch``; None for plain training.

        The host need not wait for them: the step's kernels can be launched before they are known.
        May gather over the model-parallel, the context-parallel and then the data-parallel group.
        """

    def after_step(
        self, iteration: int, batch: Batch, weights: SampleWeights | None, outcome: StepOutcome
    ) -> list[Record]:
        """Learn from the step, and return records about it.

        May run passes over the model and communicate over all groups. Must leave parameters, optimizer state, random
        streams and data order of the language model unchanged.
        """

    def metrics(self, iteration: int, batch: Batch, weights: SampleWeights | None) -> dict[str, Any]:
        """Return metrics of the step's weights for the log: numbers, and dicts of numbers by source.

        May gather over the data-parallel group.
        """

    def flops(self, iteration: int, outcome: StepOutcome) -> float:
        """Return the operations of all ranks in this iteration beyond those of plain training. Does not communicate."""

    def before_save(self, iteration: int) -> None:
        """Write files next to a persistent checkpoint that is about to be written. May wait for all ranks."""

    def state_dict(self) -> State:
        """Return the state that a resumed run needs, in any layout; may be empty. May gather over all groups."""

    def load_state_dict(self, state: State) -> None:
        """Continue from :meth:`state_dict`. Does not communicate."""
