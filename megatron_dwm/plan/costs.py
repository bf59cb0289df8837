"""The cost of a training step and of an outer update: operations, and bytes sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dwm.config.run import RunConfig
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


def step_cost(config: RunConfig, rows: int, stages: list[Stage]) -> Cost:
    """Return the cost of a step of plain training; ``rows`` is the number of rows of the embedding."""
    operations = training_flops(config.model, rows, config.sizes.global_batch_size)
    return Cost(operations, _busiest([step_traffic(config, stage) for stage in stages]))


def step_traffic(config: RunConfig, stage: Stage) -> dict[str, Traffic]:
    """Return the bytes that a rank of a stage sends in a step of plain training, by purpose."""
    microbatches = config.sizes.num_microbatches
    return {
        "layers": _of_passes(stage.training, microbatches),
        "stages": stage.stage_traffic.times(microbatches),
        "gradients": stage.gradient_sync,
        "parameters": stage.parameter_gather,
    }


def scoring_cost(config: RunConfig, rows: int, stages: list[Stage], weighter: WeighterPlan | None) -> Cost:
    """Return the cost of computing the weights of a step.

    The communication of a weighter's scores is not counted: ranks gather one number per sample.
    """
    settings, samples = config.weighting, config.sizes.global_batch_size
    if weighter is not None:
        return Cost(scoring_flops(weighter.active_parameters, samples, config.model.seq_length), {})
    if settings.dwm_rule in RULES_OF_FORWARD_PASSES:
        return _forward_cost(config, rows, stages, samples)
    if settings.dwm_rule == "top-alignment":
        traffic = [update_traffic(config, stage, None) for stage in stages]
        return Cost(outer_update_flops(config, rows, 0), _busiest(traffic))
    return Cost(0.0, {})


def update_cost(config: RunConfig, rows: int, stages: list[Stage], weighter: WeighterPlan | None) -> Cost:
    """Return the cost of an outer update, or of what a rule does in its place; zero for a run without updates."""
    settings = config.weighting
    if not settings.needs_target or settings.dwm_rule == "top-alignment":
        return Cost(0.0, {})
    if settings.dwm_rule == "similarity":
        return _forward_cost(config, rows, stages, config.sizes.target_batch_size)
    computing, is_linear = (0, False) if weighter is None else (weighter.active_parameters, weighter.is_linear)
    operations = outer_update_flops(config, rows, computing, is_linear=is_linear)
    return Cost(operations, _busiest([update_traffic(config, stage, weighter) for stage in stages]))


def update_traffic(config: RunConfig, stage: Stage, weighter: WeighterPlan | None) -> dict[str, Traffic]:
    """Return the bytes that a rank of a stage sends in an outer update, by purpose."""
    batch = config.sizes.num_microbatches
    target = config.sizes.target_batch_size / (config.training.micro_batch_size * config.sizes.data_parallel_size)
    kind = config.weighting.dwm_alignment
    passes = batch * (config.training.micro_batch_size if kind == "single-sample" else 1)
    between = stage.stage_traffic.times(target + batch)
    if kind == "finite-difference":  # forward passes at two points
        passes, between = 2 * batch, stage.stage_traffic.times(target) + stage.forward_traffic.times(2 * batch)
    gathers = 0 if config.weighting.dwm_rule == "top-alignment" else 2  # to go back, and forward again
    gathers += 2 if kind == "finite-difference" else 0  # to return from each of the two points
    gathers += config.parallel.overlap_param_gather  # before the passes; the next forward pass repeats it
    return {
        "layers": _of_passes(stage.training, target) + _of_passes(stage.alignment, passes),
        "stages": between,
        "gradients": stage.gradient_sync,
        "target gradient": stage.direction_gather,
        "parameters": stage.parameter_gather.times(gathers),
        "weighter": Traffic() if weighter is None else weighter.traffic,
    }


def _forward_cost(config: RunConfig, rows: int, stages: list[Stage], samples: int) -> Cost:
    """Return the cost of forward passes over ``samples`` samples."""
    microbatches = samples / (config.training.micro_batch_size * config.sizes.data_parallel_size)
    traffic = [
        {
            "layers": _of_passes(stage.alignment, microbatches),
            "stages": stage.forward_traffic.times(microbatches),
        }
        for stage in stages
    ]
    return Cost(forward_flops(config.model, rows, samples), _busiest(traffic))


def _of_passes(passes: Sequence[Pass], microbatches: float) -> Traffic:
    return sum((part.traffic for part in passes), Traffic()).times(microbatches)


def _busiest(stages: list[dict[str, Traffic]]) -> dict[str, Traffic]:
    """Return the traffic of the stage whose ranks send most."""
    return max(stages, key=lambda traffic: sum(part.total for part in traffic.values()))
