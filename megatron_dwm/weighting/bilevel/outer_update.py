"""One outer update: how the weighter is trained (docs/method.md, section 3).

Shape legend: N samples of the global batch, n of this replica, c of this rank's slice, s sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.runtime.collectives import world_rank, world_size
from megatron_dwm.weighting.bilevel.alignment_pass import AlignmentPass, GradientPasses, Samples
from megatron_dwm.weighting.bilevel.learning import GradientLearner, Learner
from megatron_dwm.weighting.bilevel.replay import AlignedBatch, Replay
from megatron_dwm.weighting.bilevel.ridge import RidgeLearner
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weights import objective


@dataclass(frozen=True)
class OuterResult:
    """Results of one outer update."""

    alignments: torch.Tensor
    """[N], float64, global order."""
    target_loss: float
    """Mean target loss at θ'."""
    objective_before: float
    objective_after: float
    """The weighter's objective on this batch before and after its steps."""
    weighter_grad_norm: float
    """Gradient norm of the last weighter step."""
    weighter_hash: str


Passes = TypeVar("Passes", bound=GradientPasses)


class OuterUpdate(Generic[Passes]):
    """Updates the weighter from the samples' alignments with the target."""

    def __init__(
        self, config: WeightingConfig, lm_gradients: Passes, weighter: Weighter, sample_gather: SampleGather
    ) -> None:
        self.config, self.lm_gradients = config, lm_gradients
        self.weighter, self.sample_gather = weighter, sample_gather
        self.alignment_pass = AlignmentPass(lm_gradients, sample_gather)
        self.replay = Replay(config.dwm_replay, config.dwm_replay_half_life)
        self.learner: Learner = (RidgeLearner if weighter.is_linear else GradientLearner)(config, weighter)

    @property
    def loss_scale(self) -> float:
        """The optimizer's current loss scale."""
        return self.lm_gradients.loss_scale

    @property
    def num_updates(self) -> int:
        """Updates of the whole run in which a batch was aligned."""
        return self.replay.num_appended

    def state_dict(self) -> dict[str, Any]:
        """Return the replay, in global order, and the learner's state; a collective call of all ranks."""
        return {"replay": self.replay.state(), "weighter_prior": self.learner.prior}

    def load_state_dict(self, state: Mapping[str, Any], num_updates: int) -> None:
        """Continue from :meth:`state_dict`, in any layout and with any batch size, after so many updates."""
        self.replay.load(state["replay"], self._rank_positions, self.weighter.device)
        self.replay.num_appended = num_updates
        self.learner.prior = state.get("weighter_prior")  # checkpoints of earlier versions have none

    def _rank_positions(self, batch_samples: int) -> torch.Tensor:
        """Return the positions, in a batch of N samples, of the samples that this rank scores [c].

        A batch that was aligned with other batch sizes may not be divisible into this run's microbatches.
        """
        partition, positions = self.sample_gather.partition, torch.arange(batch_samples)
        if batch_samples % (partition.micro_batch_size * self.sample_gather.parallel_state.dp_size) == 0:
            return self.sample_gather.select_rank(positions)
        return positions[world_rank() :: world_size()]

    def run(self, batch: Samples, target: Samples, old_parameters: ParameterCopy) -> OuterResult | None:
        """Align ``batch`` with ``target`` and update the weighter.

        The step from θ to θ' has already been made. Only the weighter changes, and the gradient
        buffers are empty afterwards.

        Args:
            batch: this replica's samples of that step.
            target: this replica's target samples.
            old_parameters: the parameters θ, freed as soon as they are not needed any more; the model holds θ'.

        Returns:
            None if an alignment is not finite and the schedule tolerates that, as fp16 training with its loss
            scale must. In this case nothing has changed, on any rank.

        Raises:
            FloatingPointError: an alignment is not finite and the schedule checks for that.
            RuntimeError: the weighter's replicas differ.
            UserError: all alignments are zero.
        """
        found = self.alignment_pass.run(batch, target, old_parameters)
        old_parameters.release()
        if found is None:
            return None
        alignments = found.values
        tokens = batch.tokens[self.sample_gather.rank_slice(len(batch))]
        self.replay.append(tokens, self._rank_positions(len(alignments)), alignments)
        before_steps = self._scores(self.replay.newest)
        grad_norm = self.learner.learn(self.replay) if self.config.dwm_lr > 0 else 0.0
        first, last = torch.stack([before_steps, self._scores(self.replay.newest)]).cpu()
        return OuterResult(
            alignments=alignments,
            target_loss=found.target_loss,
            objective_before=self._objective(alignments, first),
            objective_after=self._objective(alignments, last),
            weighter_grad_norm=grad_norm,
            weighter_hash=self.weighter.check_replicas(),
        )

    def _scores(self, aligned: AlignedBatch) -> torch.Tensor:
        """Return the scores of a batch [N], on the weighter's device; a collective call."""
        count = self.sample_gather.replica_samples_of(len(aligned.alignments))
        return self.sample_gather.gather_from_ranks(self.weighter.score(aligned.tokens.long()), count)

    def _objective(self, alignments: torch.Tensor, scores: torch.Tensor) -> float:
        config = self.config
        settings = config.dwm_temperature, config.dwm_kl_weight, config.dwm_clip_alignment
        return objective(alignments, scores, *settings)
