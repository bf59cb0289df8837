"""The training loop."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_dwm.config.run import RunConfig
from megatron_dwm.model.attributes import temporary_attributes
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.protocols import Optimizer
from megatron_dwm.runtime.device import current_device
from megatron_dwm.runtime.log_line import event_line
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.runtime.stragglers import StragglerReport
from megatron_dwm.runtime.timers import StepTimers
from megatron_dwm.training.checkpoint import CheckpointWriter
from megatron_dwm.training.dataloaders import Dataloaders
from megatron_dwm.training.evaluator import Evaluator, TaskEvaluation
from megatron_dwm.training.profiler import StepProfiler
from megatron_dwm.training.reporter import Reporter
from megatron_dwm.training.rerun import StepValidation, reported_divergence
from megatron_dwm.training.run_status import write_run_status
from megatron_dwm.training.step import StepResult, train_step
from megatron_dwm.training.stop_request import StopRequest
from megatron_dwm.training.train_state import TrainComponents, TrainState
from megatron_dwm.weighting.policy import SampleWeighting

logger = logging.getLogger(__name__)

SAVES_WITH_MEMORY_REPORT = 3
"""Megatron-LM reports the GPU's memory around a run's first checkpoints."""


@dataclass(frozen=True)
class TrainerParts:
    """All that a trainer needs besides a weighting (built by ``setup.py``)."""

    parallel_state: ParallelState
    engine: PipelineEngine
    components: TrainComponents
    dataloaders: Dataloaders
    reporter: Reporter
    checkpoints: CheckpointWriter
    train_state: TrainState
    timers: StepTimers
    profiler: StepProfiler
    stragglers: StragglerReport
    evaluate_tasks: TaskEvaluation | None = None


class Trainer:
    """Trains, evaluates and saves."""

    def __init__(self, config: RunConfig, parts: TrainerParts, weighting: SampleWeighting) -> None:
        self.config, self.parts, self.weighting = config, parts, weighting
        self.parallel_state, self.engine, self.components = parts.parallel_state, parts.engine, parts.components
        self.dataloaders, self.reporter = parts.dataloaders, parts.reporter
        self.checkpoints, self.train_state, self.timers = parts.checkpoints, parts.train_state, parts.timers
        self.batch_sizes, self.validation = config.sizes.batch_sizes, StepValidation(config.training)
        self.stop_request = StopRequest(config.training)
        self.evaluator = Evaluator(
            config.data,
            config.tasks,
            parts.engine,
            parts.dataloaders,
            parts.reporter,
            parts.train_state,
            self.stop_request,
            parts.evaluate_tasks,
        )
        self.saves_with_memory_report = SAVES_WITH_MEMORY_REPORT

    def with_weighting(self, weighting: SampleWeighting) -> Trainer:
        """Return a trainer of the same model, data and records with another weighting."""
        return Trainer(self.config, self.parts, weighting)

    def train(self) -> None:
        """Run the remaining iterations, then evaluate and save."""
        self.stop_request.listen()
        write_run_status(self.config.checkpoint.save, "running", self.train_state.iteration)
        try:
            stop_reason = self._train()
        except BaseException:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the end of a second worker would interrupt what follows
            self.checkpoints.abandon()
            raise
        finally:
            self.dataloaders.close()
        self._close()
        status: Literal["interrupted", "finished"] = "finished" if stop_reason is None else "interrupted"
        write_run_status(self.config.checkpoint.save, status, self.train_state.iteration, stop_reason or "")

    def convert(self) -> None:
        """Save the checkpoint that was loaded, unchanged, in the format of this run."""
        flags = self.config.checkpoint
        try:
            self.save()
        finally:
            self.dataloaders.close()
        self._close()
        logger.info(f" > converted checkpoint: {flags.load} -> {flags.save}.")

    def _close(self) -> None:
        self.checkpoints.close()
        self.parts.profiler.close()
        self.reporter.close()

    def _train(self) -> str | None:
        """Train and evaluate; return why the run ends early, or None if it does not."""
        config, train_state = self.config, self.train_state
        if config.training.manual_gc:
            gc.disable()
            gc.collect()
        start = train_state.iteration
        self._check_replicas(start)
        stop_reason = None
        if not config.training.skip_train and not self.evaluator.run_due():
            stop_reason = self.stop_request.reason(start)
        while not config.training.skip_train and train_state.iteration < config.train_iters and stop_reason is None:
            self.checkpoints.poll()
            with reported_divergence(train_state.iteration + 1):
                self.train_iteration(train_state.iteration + 1)
            self.parts.profiler.after_iteration(train_state.iteration - start, train_state.iteration)
            self._check_replicas(train_state.iteration)
            self.evaluator.schedule()
            self.evaluator.run_due()
            stop_reason = self.stop_request.reason(train_state.iteration)
            if self._save_if_due(is_last=stop_reason is not None):
                stop_reason = stop_reason or self.stop_request.reason(train_state.iteration)
        if stop_reason is None:
            return self.evaluator.finish()
        logger.info(event_line(stop_reason))
        is_finished = train_state.iteration >= config.train_iters and not self.evaluator.has_more_to_do
        return None if is_finished else stop_reason

    def train_iteration(self, iteration: int) -> None:
        """Run one iteration: weight the batch, train the language model, update the weighting."""
        timed = self.timers.timed
        with timed("batch-generator"), self.parts.stragglers.reading():
            batch = self.dataloaders.train.next_batch()
        with timed("dwm-before-step"):
            self.weighting.before_step(iteration)
        with timed("dwm-weigh"):
            weights = self.weighting.weigh(iteration, batch)
        with (
            self.timers.attached(
                self.engine.config, *(part.config for part in optimizer_parts(self.components.optimizer))
            ),
            temporary_attributes(self.engine, {"around_forward": self.parts.stragglers.forward_pass}),
        ):
            result = train_step(
                self.engine,
                self.components.optimizer,
                self.components.scheduler,
                batch,
                self.config.training.micro_batch_size,
                weights.replica_sample_weights if weights is not None else None,
                timed("optimizer"),
                self.config.training.empty_unused_memory_level,
                self.validation.passes(iteration),
                self.validation.check if self.validation.is_active else None,
            )
        samples = len(batch) * self.parallel_state.dp_size
        # Operations are counted for the largest batch.
        part = samples / self.config.sizes.global_batch_size
        self.parts.stragglers.count(part * self.reporter.run.flops_per_step)
        skipped = self.batch_sizes.nominal(self.train_state.consumed_train_samples) - samples
        self.train_state.advance(iteration, samples, part * self.reporter.run.flops_per_step, skipped)
        metrics = self.weighting.metrics(iteration, batch, weights)
        with timed("dwm-after-step"):
            self.reporter.record(*self.weighting.after_step(iteration, batch, weights, result))
        self._report(result, metrics, part * self.weighting.flops(iteration, result), samples)
        if iteration % self.config.logging.log_interval == 0:
            self.parts.stragglers.report()
            self.parts.profiler.write_memory()
        interval = self.config.training.manual_gc_interval
        if self.config.training.manual_gc and interval and iteration % interval == 0:
            gc.collect()

    def _check_replicas(self, iteration: int) -> None:
        """Check that all replicas hold the same parameters, if that is due.

        Raises:
            RuntimeError: they do not.
        """
        interval = self.config.training.check_weight_hash_across_dp_replicas_interval
        if interval is None or iteration % interval:
            return
        from megatron.core.utils import check_param_hashes_across_dp_replicas

        with self.reporter.paused(), self.engine.full_parameters():
            if not check_param_hashes_across_dp_replicas(self.components.chunks, cross_check=True):
                raise RuntimeError(f"the replicas' parameters differ after iteration {iteration}")
        logger.info(f">>> Weight hashes match after {iteration} iterations...")

    def save(self, *, persistent: bool = True) -> None:
        """Write a checkpoint; with a persistent one, also the files of the weighting."""
        iteration = self.train_state.iteration
        with self.reporter.paused():
            should_report = self.saves_with_memory_report > 0
            self.saves_with_memory_report -= 1
            if should_report:
                self.reporter.memory.log(f"(before save_checkpoint for iteration {iteration})")
            # Before the checkpoint: a run that is killed between the two resumes from the one before, and repeats both.
            # After the last one: if these files cannot be written, it is complete.
            self.checkpoints.finish()
            if persistent:
                self.weighting.before_save(iteration)
            with self.engine.full_parameters():
                self.checkpoints.save(self.train_state, self.weighting.state_dict(), persistent=persistent)
            if should_report:
                self.reporter.memory.log(f"(after save_checkpoint for iteration {iteration})")

    def _save_if_due(self, *, is_last: bool) -> bool:
        """Save a checkpoint if one is due; return whether a persistent one was saved."""
        flags, iteration = self.config.checkpoint, self.train_state.iteration
        if not flags.save:
            return False
        is_due = bool(flags.save_interval) and iteration % (flags.save_interval or 1) == 0
        if is_last or is_due or iteration == self.config.train_iters:
            self.save()
            return True
        if flags.non_persistent_save_interval and iteration % flags.non_persistent_save_interval == 0:
            self.save(persistent=False)
        return False

    def _report(self, result: StepResult, metrics: dict[str, object], weighting_flops: float, samples: int) -> None:
        optimizer = self.components.optimizer
        groups = [group for group in optimizer.param_groups if group["params"]]
        standard = [group for group in groups if group.get("default_config", True)] or groups
        norm = self._params_norm() if self.config.logging.log_params_norm else None
        self.reporter.step(
            self.train_state,
            result,
            learning_rate=standard[-1]["lr"],
            loss_scale=float(optimizer.get_loss_scale()),
            params_norm=norm,
            weighting=metrics,
            weighting_flops=weighting_flops,
            batch_size=samples,
        )

    def _params_norm(self) -> float:
        optimizer = self.components.optimizer
        if not self.config.optimizer.fp16:
            return params_norm(optimizer.get_parameters(), optimizer)
        # As in Megatron-LM: in fp16 training the norm is of the model's parameters, not of the fp32 masters.
        return params_norm([param for chunk in self.components.chunks for param in chunk.parameters()])


def params_norm(parameters: Iterable[torch.nn.Parameter], sharded_by: Optimizer | None = None) -> float:
    """Return the norm of all parameters over the model, each counted once.

    Args:
        parameters: the parameters of this rank.
        sharded_by: the optimizer over whose ranks the parameters are sharded; None if they are not sharded.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    total = torch.zeros((), dtype=torch.float64, device=current_device())
    for param in parameters:
        if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param):
            total += param.detach().double().square().sum()
    group = None
    if sharded_by is not None and hasattr(sharded_by, "get_grad_stats_parallel_group"):
        group = sharded_by.get_grad_stats_parallel_group()
    dist.all_reduce(total, group=group or mpu.get_model_parallel_group())
    return float(total.sqrt())
