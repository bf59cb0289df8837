"""``--dwm-check``: compares the hypergradient of the user's configuration with central differences (docs/method.md).

One step θ' = θ - η P ∇ Σ w_i l_i of plain gradient descent is computed explicitly, for scores s and for s ± δd, with
the gradient that training would use. The difference of the target loss at the two θ' is compared with the closed form
∂ l_target(θ') / ∂ s_i, with the alignments that an outer update would use. The run's state is restored afterwards.

Shape legend: N samples of the global batch, n of this replica.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.errors import UserError
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.weighting.bilevel.alignment import shift
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from megatron_dwm.weighting.bilevel.preconditioner import is_preconditioner_known
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.weights import target_score_gradient, weights_from_scores

logger = logging.getLogger(__name__)

# Of the relative error. In fp32 it was 1.4e-3 and less in every layout with exact alignments, and 6.6e-3 and less with
# those of finite differences. In bf16 it is at least 0.1 for any step size, which is why that is refused.
TOLERANCE = 1e-2
SCORE_DISTANCE = 0.05  # δ in units of the temperature; the softmax's curvature is then about 1e-3 of the difference
LOSS_DIFFERENCE = 2e-3  # difference in nats that determines η: small, but far above the rounding of fp32


@dataclass(frozen=True)
class HypergradientCheck:
    """Result of the check."""

    derivative: float
    """Derivative of the target loss with respect to the scores, along the hypergradient, in closed form."""
    difference: float
    """The same from central differences."""
    error: float
    """The larger of two directions' errors, relative to ``derivative``."""

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= TOLERANCE  # NaN does not pass

    def __str__(self) -> str:
        return (
            f"hypergradient {self.derivative:.6e} by finite differences {self.difference:.6e}, "
            f"relative error {self.error:.1e} (bound {TOLERANCE:g})"
        )


def check_at_start(lm_gradients: LMGradients, sample_gather: SampleGather, batch: Batch, target: Batch) -> None:
    """Check the hypergradient and log the result; every rank calls it.

    Raises:
        UserError: on every rank, if the check fails or there is nothing to check.
    """
    config = lm_gradients.config
    is_unknown = config.dwm_preconditioner == "adam" and not is_preconditioner_known(lm_gradients.optimizer)
    if is_unknown:
        lm_gradients = lm_gradients.with_config(replace(config, dwm_preconditioner="none"))
    result = check_hypergradient(lm_gradients, sample_gather, batch, target)
    if not result.passed:
        raise UserError(
            f"--dwm-check: {result}; the weighter would learn from wrong alignments: leave out flags of kernels, "
            "fusions and parallelism one by one to find the one that causes it"
        )
    note = ", without Adam's preconditioner, which is unknown before the first step" if is_unknown else ""
    logger.info(f" > --dwm-check: {result}{note}")


def check_hypergradient(
    lm_gradients: LMGradients, sample_gather: SampleGather, batch: Batch, target: Batch
) -> HypergradientCheck:
    """Compare the closed form with central differences; every rank calls it and gets the same result.

    Args:
        lm_gradients: the run's passes. Parameters are restored, gradient buffers are left empty.
        sample_gather: which rank holds which samples.
        batch: this replica's training samples [n].
        target: this replica's target samples.

    Raises:
        UserError: the hypergradient is zero or not finite, so there is nothing to compare.
    """
    return _Check(lm_gradients, sample_gather, batch, target).run()


class _Check:
    def __init__(self, lm_gradients: LMGradients, sample_gather: SampleGather, batch: Batch, target: Batch) -> None:
        self.lm_gradients, self.sample_gather, self.batch, self.target = lm_gradients, sample_gather, batch, target
        self.temperature = lm_gradients.config.dwm_temperature
        generator = torch.Generator().manual_seed(0)
        samples = len(batch) * sample_gather.parallel_state.dp_size
        draws = torch.randn(2, samples, generator=generator, dtype=torch.float64)
        self.scores = 0.5 * self.temperature * draws[0]
        self.signs = draws[1].sign()

    def run(self) -> HypergradientCheck:
        engine = self.lm_gradients.engine
        with engine.full_parameters(), engine.deterministic():
            self.old_parameters = ParameterCopy.of(engine.chunks)
            try:
                return self._run()
            finally:
                self.old_parameters.restore()

    def _run(self) -> HypergradientCheck:
        widest = SCORE_DISTANCE * self.temperature
        step_size = LOSS_DIFFERENCE / (2 * widest * _slope_along(self._closed_form(step_size=0.0)))
        gradient = step_size * self._closed_form(step_size)
        # The loss may be steeper at θ' than it is at θ, where η was chosen.
        distance = min(widest, LOSS_DIFFERENCE / (2 * _slope_along(gradient)))

        directions = [gradient / gradient.abs().max(), self.signs]
        derivatives = [float((direction * gradient).sum()) for direction in directions]
        differences = []
        for direction in directions:
            above, below = (
                self._loss_after_step(self.scores + side * direction, step_size) for side in (distance, -distance)
            )
            differences.append((above - below) / (2 * distance))
        errors = [abs(one - other) for one, other in zip(derivatives, differences, strict=True)]
        error = max(errors) if all(map(math.isfinite, errors)) else math.nan
        return HypergradientCheck(derivatives[0], differences[0], error / derivatives[0])

    def _closed_form(self, step_size: float) -> torch.Tensor:
        """Return ∂ l_target(θ') / ∂ s_i per unit of η [N]."""
        self._step(self.scores, step_size)
        _, direction = self.lm_gradients.gradient(self.target)
        self.old_parameters.restore()
        alignments = self.lm_gradients.align(self.batch, direction)
        self.lm_gradients.discard(direction)
        all_alignments = self.sample_gather.gather_from_replicas(alignments).cpu()
        return target_score_gradient(all_alignments, self.scores, self.temperature, learning_rate=1.0)

    def _loss_after_step(self, scores: torch.Tensor, step_size: float) -> float:
        self._step(scores, step_size)
        lm_gradients, target = self.lm_gradients, self.target
        with torch.no_grad():
            losses = lm_gradients.engine.run(target, lm_gradients.micro_batch_size_of(target), forward_only=True)
        self.old_parameters.restore()
        return lm_gradients.mean_loss(losses, target)

    def _step(self, scores: torch.Tensor, step_size: float) -> None:
        """Move the parameters from θ to θ' = θ - η P ∇ Σ w_i l_i."""
        weights = self.sample_gather.select_replica(weights_from_scores(scores, self.temperature))
        _, gradient = self.lm_gradients.gradient(self.batch, weights.to(self.batch.tokens.device))
        shift(gradient, -step_size)
        self.lm_gradients.discard(gradient)


def _slope_along(gradient: torch.Tensor) -> float:
    """Return the derivative along the gradient [N] itself, scaled so that no score moves faster than 1."""
    slope = float(gradient.square().sum() / gradient.abs().max())
    if not 0 < slope < math.inf:
        raise UserError(
            f"--dwm-check: the hypergradient of the first {len(gradient)} samples is zero or not finite; use a "
            "--global-batch-size of 2 or more, and look at the losses of --train-data-path and --dwm-target-data-path"
        )
    return slope
