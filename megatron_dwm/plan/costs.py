"""The cost of a training step and of an outer update: operations, and bytes sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.run_sizes import RunSizes
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.model.flops import training_flops
from megatron_dwm.plan.meter import Traffic
from megatron_dwm.plan.stage import RULES_OF_FORWARD_PASSES, Pass, Stage
from megatron_dwm.plan.weighter import WeighterPlan
from megatron_dwm.weighting.flops import forward_flops, outer_update_flops, scoring_flops


@dataclass(frozen=True)
class Cost:
    """The cost of one iteration, or of a part of it."""

    operations: float
    """Floating-point operations of all ranks."""
    traffic: dict[str, Traffic]
    """The traffic of the rank that sends most, by purpose."""

    @property
    def sent(self) -> float:
        """Bytes that this rank sends."""
        return sum(part.total for part in self.traffic.values())


@dataclass(frozen=True)
class CostModel:
    """The costs of a run, from the passes that were measured of its stages."""

    model: ModelConfig
    weighting: WeightingConfig
    sizes: RunSizes
    padded_vocab_size: int
    stages: Sequence[Stage]
    weighter: WeighterPlan | None
    overlaps_param_gather: bool
    """Whether forward passes gather the parameters that they need (``--overlap-param-gather``)."""

    def step(self) -> Cost:
        """Return the cost of a step of plain training."""
        operations = training_flops(self.model, self.padded_vocab_size, self.sizes.global_batch_size)
        return Cost(operations, _busiest([self.step_traffic(stage) for stage in self.stages]))

    def scoring(self) -> Cost:
        """Return the cost of computing the weights of a step.

        The communication of a weighter's scores is not counted: ranks gather one number per sample.
        """
        rule, samples = self.weighting.dwm_rule, self.sizes.global_batch_size
        if self.weighter is not None:
            return Cost(scoring_flops(self.weighter.active_parameters, samples, self.model.seq_length), {})
        if rule in RULES_OF_FORWARD_PASSES:
            return self._forward(samples)
        if rule == "top-alignment":
            return self._alignment()
        return Cost(0.0, {})

    def update(self) -> Cost:
        """Return the cost of an outer update, or of a rule's passes in its place; zero for a run without updates."""
        if not self.weighting.needs_target or self.weighting.dwm_rule == "top-alignment":
            return Cost(0.0, {})
        if self.weighting.dwm_rule == "similarity":
            return self._forward(self.sizes.target_batch_size)
        return self._alignment()

    def step_traffic(self, stage: Stage) -> dict[str, Traffic]:
        """Return the bytes that a rank of a stage sends in a step of plain training, by purpose."""
        microbatches = self.sizes.num_microbatches
        return {
            "layers": _of_passes(stage.training, microbatches),
            "stages": stage.stage_traffic.times(microbatches),
            "gradients": stage.gradient_sync,
            "parameters": stage.parameter_gather,
        }

    def update_traffic(self, stage: Stage) -> dict[str, Traffic]:
        """Return the bytes that a rank of a stage sends in an outer update, by purpose."""
        batch = self.sizes.num_microbatches
        target = self.sizes.target_batch_size / self.sizes.batch_sizes.unit
        kind = self.weighting.dwm_alignment
        passes = batch * (self.sizes.micro_batch_size if kind == "single-sample" else 1)
        between = stage.stage_traffic.times(target + batch)
        if kind == "finite-difference":  # forward passes at two points
            passes, between = 2 * batch, stage.stage_traffic.times(target) + stage.forward_traffic.times(2 * batch)
        # To return to the old parameters, and to the new ones again.
        gathers = 0 if self.weighting.dwm_rule == "top-alignment" else 2
        gathers += 2 if kind == "finite-difference" else 0  # to return from each of the two points
        gathers += self.overlaps_param_gather  # before the passes; the next forward pass repeats it
        return {
            "layers": _of_passes(stage.training, target) + _of_passes(stage.alignment, passes),
            "stages": between,
            "gradients": stage.gradient_sync,
            "target gradient": stage.direction_gather,
            "parameters": stage.parameter_gather.times(gathers),
            "weighter": Traffic() if self.weighter is None else self.weighter.traffic,
        }

    def _alignment(self) -> Cost:
        """Return the cost of alignments with the target set, and of the weighter's steps if there is one."""
        parameters, is_linear = 0, False
        if self.weighter is not None:
            parameters, is_linear = self.weighter.active_parameters, self.weighter.is_linear
        operations = outer_update_flops(
            self.model, self.weighting, self.sizes, self.padded_vocab_size, parameters, is_linear=is_linear
        )
        return Cost(operations, _busiest([self.update_traffic(stage) for stage in self.stages]))

    def _forward(self, samples: int) -> Cost:
        """Return the cost of forward passes over ``samples`` samples."""
        microbatches = samples / self.sizes.batch_sizes.unit
        traffic = [
            {
                "layers": _of_passes(stage.alignment, microbatches),
                "stages": stage.forward_traffic.times(microbatches),
            }
            for stage in self.stages
        ]
        return Cost(forward_flops(self.model, self.padded_vocab_size, samples), _busiest(traffic))


def _of_passes(passes: Sequence[Pass], microbatches: float) -> Traffic:
    return sum((part.traffic for part in passes), Traffic()).times(microbatches)


def _busiest(stages: list[dict[str, Traffic]]) -> dict[str, Traffic]:
    """Return the traffic of the stage whose ranks send most."""
    return max(stages, key=lambda traffic: sum(part.total for part in traffic.values()))
