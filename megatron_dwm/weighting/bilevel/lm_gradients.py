"""The passes over the language model in an outer update: a gradient, and the samples' alignments with it.

Shape legend: n samples of this replica.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.model.attributes import temporary_attributes
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.loss import SampleLosses, weighted_loss
from megatron_dwm.model.optimizer_parts import has_loss_scale
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.model.protocols import Optimizer
from megatron_dwm.weighting.bilevel.alignment import Direction, global_norm, shift, single_sample_products
from megatron_dwm.weighting.bilevel.gradient_buffers import GradientBuffers
from megatron_dwm.weighting.bilevel.gradient_mean import NO_MEAN, GradientAverage
from megatron_dwm.weighting.bilevel.preconditioner import precondition
from megatron_dwm.weighting.bilevel.sample_products import has_supported_layers, sample_products
from megatron_dwm.weighting.loss_factors import LossFactors

FINITE_DIFFERENCE_DISTANCE = 1e-2  # norm of the shift of θ along v


class LMGradients:
    """Gradients and alignments at the current parameters, which do not change."""

    def __init__(
        self,
        config: WeightingConfig,
        engine: PipelineEngine,
        optimizer: Optimizer,
        micro_batch_size: int,
        gradient_mean: GradientAverage = NO_MEAN,
    ) -> None:
        """
        Args:
            gradient_mean: replaces each target gradient, by the running mean over updates.
        """
        self.config, self.engine, self.optimizer, self.gradient_mean = config, engine, optimizer, gradient_mean
        self.parallel_state, self.micro_batch_size = engine.parallel_state, micro_batch_size
        self.loss_factors = LossFactors(micro_batch_size, engine.config.calculate_per_token_loss, engine.parallel_state)

    @property
    def loss_scale(self) -> float:
        """The optimizer's current loss scale."""
        return float(self.optimizer.get_loss_scale())

    @property
    def check_for_nan(self) -> bool:
        """Whether numbers that are not finite end the run."""
        return self.engine.check_for_nan

    def deterministic(self) -> AbstractContextManager[None]:
        """Return a context without dropout, in which no random stream advances."""
        return self.engine.deterministic()

    def with_config(self, config: WeightingConfig) -> LMGradients:
        """Return the same passes with other settings."""
        return type(self)(config, self.engine, self.optimizer, self.micro_batch_size, self.gradient_mean)

    def gradient(self, batch: Batch, sample_weights: torch.Tensor | None = None) -> tuple[float, Direction]:
        """Return the plain loss of ``batch``, and the preconditioned gradient of its loss with ``sample_weights`` [n].

        The gradient stays in the gradient buffers until :meth:`discard` or the next backward pass that fills them.
        """
        self._zero_gradients()
        with ExitStack() as stack:
            for chunk in self.engine.chunks:  # values that are not finite are detected in the alignments
                stack.enter_context(temporary_attributes(chunk.ddp_config, {"check_for_nan_in_grad": False}))
            losses = self.engine.run(
                batch,
                self.micro_batch_size_of(batch),
                loss_function=weighted_loss(sample_weights),
                check_for_nan=False,
            )
        gradients = GradientBuffers(self.engine.chunks)
        if has_loss_scale(self.optimizer):
            gradients.scale(1.0 / self.optimizer.get_loss_scale())
        self.gradient_mean.average(gradients)
        if self.config.dwm_preconditioner == "adam":
            precondition(gradients.direction, self.optimizer)
        gradients.gather_shards()
        return self.mean_loss(losses, batch), gradients.direction

    def discard(self, direction: Direction) -> None:
        """Empty the gradient buffers."""
        direction.clear()
        self._zero_gradients()

    def align(self, batch: Batch, direction: Direction) -> torch.Tensor:
        """Return a_i = f_i ⟨v, ∇ l_i⟩ of this replica's samples [n], float64, at the current parameters.

        f_i is the factor of sample i's mean loss in the training loss.
        """
        if self.config.dwm_alignment == "finite-difference":
            products = self._align_by_differences(batch, direction)
        elif self.config.dwm_alignment == "single-sample" or not has_supported_layers(self.engine.chunks):
            products = self._align_single_samples(batch, direction)
        else:
            products = self._align_exactly(batch, direction)
        return products * self.loss_factors(batch)

    def _align_exactly(self, batch: Batch, direction: Direction) -> torch.Tensor:
        """Return ⟨v, ∇ l_i⟩ from one backward pass at the run's micro-batch size."""
        # Megatron-LM's loss of a microbatch counts samples by their tokens. With these weights it is their mean loss.
        factors = LossFactors(self.micro_batch_size, is_per_token=False, parallel_state=self.parallel_state)(batch)
        weights = torch.where(factors > 0, 1 / factors.clamp(min=torch.finfo(factors.dtype).tiny), 0)
        with (
            self.engine.unsynchronized(),
            sample_products(
                direction, self.engine.chunks, len(batch), self.micro_batch_size, self.parallel_state
            ) as products,
        ):
            self.engine.run(batch, self.micro_batch_size, loss_function=weighted_loss(weights), check_for_nan=False)
        return self._sum_products(products)

    def _align_single_samples(self, batch: Batch, direction: Direction) -> torch.Tensor:
        """Return ⟨v, ∇ l_i⟩ from one backward pass over microbatches of one sample."""
        chunks = self.engine.chunks
        with (
            self.engine.unsynchronized(),
            single_sample_products(direction, chunks, len(batch), self.parallel_state) as products,
        ):
            self.engine.run(batch, 1, check_for_nan=False)
        return self._sum_products(products)

    def _sum_products(self, products: torch.Tensor) -> torch.Tensor:
        """Return alignments [n], the same on all ranks of a replica, from the ranks' products of one backward pass."""
        # The engine divides each microbatch's loss by their number, and scales it for the average over CP ranks and
        # in fp16 training.
        products *= len(products) / self.parallel_state.cp_size
        products /= self.optimizer.get_loss_scale()
        self.parallel_state.sum_over_replica(products)
        return products

    def micro_batch_size_of(self, batch: Batch) -> int:
        """Return the samples of a microbatch: the run's, or all of a batch that has fewer."""
        return min(self.micro_batch_size, len(batch))

    def _align_by_differences(self, batch: Batch, direction: Direction) -> torch.Tensor:
        norm = global_norm(direction, self.parallel_state)
        if norm == 0:
            return torch.zeros(len(batch), dtype=torch.float64, device=batch.tokens.device)
        epsilon = FINITE_DIFFERENCE_DISTANCE / norm
        current = ParameterCopy.of(self.engine.chunks)
        sides = []
        for distance in (epsilon, -epsilon):
            shift(direction, distance)
            with torch.no_grad():
                losses = self.engine.run(batch, self.micro_batch_size, forward_only=True)
            sides.append(self.engine.broadcast_losses(losses, len(batch)).mean.double())
            current.restore()
        return (sides[0] - sides[1]) / (2 * epsilon)

    def mean_loss(self, losses: SampleLosses | None, batch: Batch) -> float:
        """Return the plain loss over all replicas, from the last pipeline stage's losses of ``batch``; collective."""
        means = self.engine.broadcast_losses(losses, len(batch)).mean.double()
        factors = replace(self.loss_factors, micro_batch_size=self.micro_batch_size_of(batch))(batch)
        mean = (means * factors).mean()
        dist.all_reduce(mean, group=self.parallel_state.dp_group)
        return float(mean) / self.parallel_state.dp_size

    def _zero_gradients(self) -> None:
        for chunk in self.engine.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
