"""Data weighting in another program's training loop: a plain torch loop, a Trainer, or a loop over megatron-core.

The loop makes three calls a step, the same on every process: :meth:`EmbeddedWeighting.before_step`, then
:meth:`~EmbeddedWeighting.weigh`, the step with the weights in its loss, and
:meth:`~EmbeddedWeighting.after_step`. docs/embedding.md shows such loops.

Shape legend: n samples of this replica, s sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.errors import UserError
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.model.protocols import ModelChunk, Optimizer
from megatron_dwm.runtime.collectives import all_reduce_over_world
from megatron_dwm.runtime.process_groups import current_parallel_state, data_parallel_state
from megatron_dwm.weighting.bilevel.alignment_pass import GradientPasses, Samples
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from megatron_dwm.weighting.bilevel.module_gradients import (
    Method,
    ModuleBatch,
    ModuleGradients,
    SampleLosses,
    next_token_losses,
    tokens_of,
)
from megatron_dwm.weighting.bilevel.outer_update import OuterResult, OuterUpdate
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.stage_schedule import bilevel_stages
from megatron_dwm.weighting.weighter import Weighter, weighter_state
from megatron_dwm.weighting.weighter_init import random_weighter_model
from megatron_dwm.weighting.weights import weights_from_scores


@dataclass(frozen=True)
class WeighterSize:
    """Sizes of a new weighter."""

    vocab_size: int
    seq_length: int = 2048
    """Longest sample of a weighter that is a transformer; an n-gram weighter takes any length."""
    end_of_document: int = 0
    """Token that ends documents; a transformer pads with it."""
    seed: int = 1234


class EmbeddedWeighting:
    """A weighter that is trained alongside a training loop outside this package."""

    def __init__(
        self,
        settings: WeightingConfig,
        passes: GradientPasses,
        sample_gather: SampleGather,
        weighter: Weighter,
        *,
        parameters: ParameterCopy,
        targets: Iterator[Any],
        train_iters: int,
        as_samples: Callable[[Any], Samples],
    ) -> None:
        """
        Args:
            as_samples: converts the loop's batches to what the passes take.

        Raises:
            UserError: the settings are for another mode, or the stages do not fit into the run.
        """
        if settings.dwm_mode != "bilevel":
            raise UserError(
                f"dwm_mode {settings.dwm_mode}: only bilevel weighting is supported in another program's loop"
            )
        if settings.dwm_target_momentum:
            raise UserError(
                f"dwm_target_momentum {settings.dwm_target_momentum}: only pretrain_dwm.py averages target gradients; "
                "leave it out, and use target batches as large as the training batches"
            )
        if settings.dwm_source_offsets:
            raise UserError("dwm_source_offsets: only pretrain_dwm.py knows the samples' sources; leave it out")
        self.settings, self.sample_gather, self.weighter = settings, sample_gather, weighter
        self.outer_update = OuterUpdate(settings, passes, weighter, sample_gather)
        self.stages = bilevel_stages(settings, train_iters)
        self.targets, self.as_samples, self._old_parameters = targets, as_samples, parameters
        self.iteration = 0
        """Steps begun."""

    @classmethod
    def for_module(
        cls,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        targets: Iterator[Any],
        weighter: WeighterSize | torch.nn.Module,
        *,
        train_iters: int,
        settings: WeightingConfig | None = None,
        sample_losses: SampleLosses = next_token_losses,
        tokens_of: Callable[[Any], torch.Tensor] = tokens_of,
        method: Method = "forward-mode",
    ) -> EmbeddedWeighting:
        """Create a weighting for a module that is not sharded: on one process, or under DistributedDataParallel.

        Args:
            model: the module, not sharded by FSDP.
            optimizer: torch's Adam or AdamW, or any with ``dwm_preconditioner="none"``.
            targets: this process's batches of the target set, one for each outer update.
            weighter: size of a new weighter, or a sequence classifier of transformers with one label.
            train_iters: steps of the run, which the schedule of updates depends on.
            settings: the values of ``--dwm-*``.
            sample_losses: losses [n] of a batch.
            tokens_of: tokens [n, s] of a batch.
            method: how alignments are computed; see
                :func:`~megatron_dwm.weighting.bilevel.module_gradients.alignments`.
        """
        settings = settings or WeightingConfig()
        parallel_state = data_parallel_state()
        preconditioning = optimizer if settings.dwm_preconditioner == "adam" else None
        device = next(model.parameters()).device
        return cls(
            settings,
            ModuleGradients(model, sample_losses, preconditioning_optimizer=preconditioning, method=method),
            # One sample a microbatch: batches of any size are in one global order.
            SampleGather(BatchPartition(1, 1, parallel_state.dp_rank, parallel_state.dp_size), parallel_state),
            _new_weighter(settings, weighter, device),
            parameters=ParameterCopy([model]),
            targets=targets,
            train_iters=train_iters,
            as_samples=lambda batch: ModuleBatch(batch, tokens_of(batch)),
        )

    @classmethod
    def for_megatron(
        cls,
        chunks: Sequence[ModelChunk],
        optimizer: Optimizer,
        targets: Iterator[Batch],
        weighter: WeighterSize | torch.nn.Module,
        *,
        partition: BatchPartition,
        seq_length: int,
        train_iters: int,
        settings: WeightingConfig | None = None,
    ) -> EmbeddedWeighting:
        """Create a weighting for a megatron-core GPT under tensor, pipeline, context and data parallelism.

        Args:
            chunks: megatron-core's DistributedDataParallel chunks of this rank; their configuration has its
                ``grad_scale_func`` and ``finalize_model_grads_func``.
            optimizer: megatron-core's optimizer.
            targets: this replica's batches of the target set, the same on all its ranks.
            weighter: size of a new weighter, or a sequence classifier with one label.
            seq_length: tokens of a sample.
            partition: how a step's samples are divided among replicas and microbatches.
            train_iters: steps of the run.
            settings: the values of ``--dwm-*``.
        """
        settings = settings or WeightingConfig()
        parallel_state, config = current_parallel_state(), chunks[0].config
        engine = PipelineEngine(chunks, config, parallel_state, seq_length)
        device = next(chunks[0].parameters()).device
        return cls(
            settings,
            LMGradients(settings, engine, optimizer, partition.micro_batch_size),
            SampleGather(partition, parallel_state),
            _new_weighter(settings, weighter, device),
            parameters=ParameterCopy(chunks),
            targets=targets,
            train_iters=train_iters,
            as_samples=lambda batch: batch,
        )

    def before_step(self) -> None:
        """Prepare for a step: copy the parameters if an outer update follows it."""
        self.iteration += 1
        if self.stages.is_update(self.iteration):
            self._old_parameters.store()

    def weigh(self, batch: Any) -> torch.Tensor:
        """Return the weights [n] of this replica's samples in the current step, float32; a collective call.

        Their mean over the global batch is 1. They are exactly 1.0 in the warm-up, and as long as all scores are equal.

        Raises:
            UserError: processes have different numbers of samples.
        """
        tokens = self.as_samples(batch).tokens
        if not self.stages.is_weighted(self.iteration):
            return torch.ones(len(tokens), device=tokens.device)
        _require_equal("samples", [len(tokens)], tokens.device)
        scores = self.sample_gather.score(tokens, self.weighter.score)
        sample_weights = weights_from_scores(scores, self.settings.dwm_temperature)
        return self.sample_gather.select_replica(sample_weights).to(tokens.device, torch.float32)

    def after_step(self, batch: Any) -> OuterResult | None:
        """Make the outer update if it is due; a collective call then.

        Args:
            batch: the batch of the step, all of its microbatches.

        Returns:
            the results of the update, None if there was none.

        Raises:
            FloatingPointError: an alignment is not finite.
            RuntimeError: the weighter's replicas differ.
            UserError: all alignments are zero, or samples are of another length on another process or in an earlier
                update.
        """
        if not self.stages.is_update(self.iteration):
            return None
        samples, target = self.as_samples(batch), self.as_samples(next(self.targets))
        tokens = [samples.tokens, *(aligned.tokens for aligned in self.outer_update.replay.batches)]
        _require_equal("tokens per sample", [part.shape[1] for part in tokens], samples.tokens.device)
        result = self.outer_update.run(samples, target, self._old_parameters)
        self._old_parameters.release()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, except for the position in the targets; a collective call."""
        return {
            "iteration": self.iteration,
            **weighter_state(self.weighter),
            "num_updates": self.outer_update.num_updates,
            **self.outer_update.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.iteration = state["iteration"]
        self.weighter.load_state(state)
        self.outer_update.load_state_dict(state, state["num_updates"])


def _require_equal(unit: str, counts: Sequence[int], device: torch.device) -> None:
    """Require that all counts are the same on all processes, before these wait for each other; a collective call.

    Raises:
        UserError: they are not.
    """
    bounds = torch.tensor([-min(counts), max(counts)], device=device)
    all_reduce_over_world(bounds, torch.distributed.ReduceOp.MAX)
    low, high = -int(bounds[0]), int(bounds[1])
    if low < high:
        raise UserError(
            f"batches have {low} and {high} {unit}; pass batches of one size on all processes, and a tokens_of that "
            "pads to one length"
        )


def _new_weighter(
    settings: WeightingConfig, weighter: WeighterSize | torch.nn.Module, device: torch.device
) -> Weighter:
    model = weighter
    if isinstance(weighter, WeighterSize):
        sizes = weighter.vocab_size, weighter.seq_length, weighter.end_of_document, weighter.seed
        model = random_weighter_model(settings, *sizes)
    return Weighter(model, settings, device)
