"""The cost of a training step and of an outer update: operations, and bytes sent."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config.run import RunConfig
from megatron_dwm.model.flops import training_flops
from megatron_dwm.plan.meter import Traffic
from megatron_dwm.plan.stage import Stage
from megatron_dwm.plan.weighter import WeighterPlan
from megatron_dwm.weighting.flops import outer_update_flops, scoring_flops


@dataclass(frozen=True)
class Cost:
    """The cost of one iteration, or of a part of it."""

    operations: float
    """Floating-point operations of all ranks."""
    traffic: dict[str, Traffic]
    """What the rank sends that sends most, by purpose."""

    @property
    def sent(self) -> float:
        """Bytes that this rank sends."""
        return sum(part.total for part in self.traffic.values())


def step_cost(config: RunConfig, rows: int, stages: list[Stage]) -> Cost:
    """Return the cost of a step of plain training; ``rows`` is the number of rows of the embedding."""
    operations = training_flops(config.model, rows, config.global_batch_size)
    return Cost(operations, _busiest([step_traffic(config, stage) for stage in stages]))


def step_traffic(config: RunConfig, stage: Stage) -> dict[str, Traffic]:
    """Return the bytes that a rank of a stage sends in a step of plain training, by purpose."""
    microbatches = config.num_microbatches
    return {
        "layers": _of_passes(stage, microbatches),
        "stages": stage.stage_traffic.times(microbatches),
        "gradients": stage.gradient_sync,
        "parameters": stage.parameter_gather,
    }


def scoring_cost(config: RunConfig, weighter: WeighterPlan | None) -> Cost:
    """Return the cost of scoring a batch, for which ranks gather one number per sample."""
    if weighter is None:
        return Cost(0.0, {})
    samples, sequence = config.global_batch_size, config.model.sequence
    return Cost(scoring_flops(weighter.computing_parameters, samples, sequence), {})


def update_cost(config: RunConfig, rows: int, stages: list[Stage], weighter: WeighterPlan | None) -> Cost:
    """Return the cost of an outer update; zero in a run without outer updates."""
    if weighter is None or not config.weighting.needs_target:
        return Cost(0.0, {})
    operations = outer_update_flops(config, rows, weighter.computing_parameters, is_linear=weighter.is_linear)
    return Cost(operations, _busiest([update_traffic(config, stage, weighter) for stage in stages]))


def update_traffic(config: RunConfig, stage: Stage, weighter: WeighterPlan) -> dict[str, Traffic]:
    """Return the bytes that a rank of a stage sends in an outer update, by purpose."""
    batch = config.num_microbatches
    target = config.target_batch_size / (config.training.micro_batch * config.data_parallel_size)
    alignment = sum((part.traffic for part in stage.alignment), Traffic())
    kind = config.weighting.dwm_alignment
    single = kind == "single-sample"
    passes = batch * (config.training.micro_batch if single else 1) * (2 if kind == "finite-difference" else 1)
    return {
        "layers": _of_passes(stage, target) + alignment.times(passes),
        "stages": stage.stage_traffic.times(target + batch),
        "gradients": stage.gradient_sync,
        "target gradient": stage.direction_gather,
        "parameters": stage.parameter_gather.times(2),  # put back, and forward again
        "weighter": weighter.traffic,
    }


def _of_passes(stage: Stage, microbatches: float) -> Traffic:
    return sum((part.traffic for part in stage.training), Traffic()).times(microbatches)


def _busiest(stages: list[dict[str, Traffic]]) -> dict[str, Traffic]:
    """Return the traffic of the stage whose ranks send most."""
    return max(stages, key=lambda traffic: sum(part.total for part in traffic.values()))
