"""The sizes of a run that follow from flags of several groups and from the number of processes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config.batch_sizes import BatchSizes, Rampup
from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.config.weighting import TARGET_PART, WeightingConfig


@dataclass(frozen=True)
class RunSizes:
    """The batches of a run, and how they are divided over replicas, microbatches and model chunks."""

    world_size: int
    batch_sizes: BatchSizes
    """The numbers of samples in the steps of the run."""
    virtual_stages: int | None
    """Model chunks on each pipeline rank; None without the interleaved schedule."""
    eval_batch_size: int
    """Samples in one batch of an evaluation."""
    eval_micro_batch: int
    """Samples per microbatch of an evaluation."""
    target_batch_size: int
    """Target samples in one outer update."""

    @classmethod
    def from_flags(
        cls,
        world_size: int,
        num_layers: int,
        parallel: ParallelConfig,
        training: TrainingConfig,
        data: DataConfig,
        weighting: WeightingConfig,
    ) -> RunSizes:
        """Return the sizes of a run on ``world_size`` processes.

        Raises:
            UserError: batches or layers are not divisible.
        """
        micro, dp = training.micro_batch_size, world_size // (parallel.mp * parallel.cp)
        ramp = Rampup(*training.rampup_batch_size) if training.rampup_batch_size is not None else None
        final = training.global_batch_size or micro * dp
        batches = BatchSizes(final, micro, dp, ramp, training.decrease_batch_size_if_needed)
        virtual_stages = parallel.virtual_stages(num_layers)
        return cls(
            world_size,
            batches,
            virtual_stages,
            data.eval_global_batch_size or batches.largest,
            data.eval_micro_batch_size or micro,
            _target_batch_size(weighting, parallel, batches, is_interleaved=virtual_stages is not None),
        )

    @property
    def data_parallel_size(self) -> int:
        """The number of model replicas."""
        return self.batch_sizes.data_parallel_size

    @property
    def micro_batch_size(self) -> int:
        """The number of samples per microbatch of a step."""
        return self.batch_sizes.micro_batch_size

    @property
    def global_batch_size(self) -> int:
        """The number of samples in one step; the largest if steps differ."""
        return self.batch_sizes.largest

    @property
    def num_microbatches(self) -> int:
        """The number of microbatches of one model replica in one step."""
        return self.global_batch_size // self.batch_sizes.unit

    @property
    def target_micro_batch(self) -> int:
        """The number of samples per target microbatch, at most the run's and at most a replica's target samples."""
        return max(1, min(self.micro_batch_size, self.target_batch_size // self.data_parallel_size))


def _target_batch_size(
    weighting: WeightingConfig, parallel: ParallelConfig, batches: BatchSizes, *, is_interleaved: bool
) -> int:
    """Return the number of target samples in one outer update; by default an eighth of the batch, rounded up.

    It is rounded up so that all replicas have the same number of samples, in full microbatches if there are several,
    and in full groups of microbatches with the interleaved schedule. The default for rules that learn no weighter is
    the size of the batch.
    """
    if weighting.dwm_target_batch_size is not None:
        return weighting.dwm_target_batch_size
    if not weighting.has_trainable_weighter:
        return batches.largest
    unit, part = batches.data_parallel_size, -(-batches.largest // TARGET_PART)
    if is_interleaved:
        unit = batches.unit * (parallel.microbatch_group_size_per_vp_stage or parallel.pp)
    elif part > batches.unit or parallel.tp_comm_overlap:  # Transformer Engine's buffers fit full microbatches
        unit = batches.unit
    return min(-(-part // unit) * unit, batches.largest)
