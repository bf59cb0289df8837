"""The training loop."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_dwm.config.run import RunConfig
from megatron_dwm.model.attributes import changed_attributes
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
from megatron_dwm.training.evaluation import Evaluation, evaluate
from megatron_dwm.training.profiler import StepProfiler
from megatron_dwm.training.reporter import Reporter
from megatron_dwm.training.rerun import StepValidation, reported_divergence
from megatron_dwm.training.run_status import write_run_status
from megatron_dwm.training.step import StepResult, train_step
from megatron_dwm.training.stop_request import EvaluationInterruptedError, StopRequest
from megatron_dwm.training.train_state import EVALUATIONS, TrainComponents, TrainState
from megatron_dwm.weighting.policy import SampleWeighting

logger = logging.getLogger(__name__)

TaskEvaluation = Callable[[Callable[[], None]], list[dict[str, Any]]]
"""Evaluates the model on tasks, with all ranks, and calls its argument now and then; returns a record for each task."""

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
        self.batch_sizes, self.validation = config.batch_sizes, StepValidation(config.training)
        self.stop_request = StopRequest(config.training)
        self.saves_with_memory_report = SAVES_WITH_MEMORY_REPORT

    def with_weighting(self, weighting: SampleWeighting) -> Trainer:
        """Return a trainer of the same model, data and records with another weighting."""
        return Trainer(self.config, self.parts, weighting)

    def train(self) -> None:
        """Run the remaining iterations, then evaluate and save."""
        write_run_status(self.config.checkpoint.save, "running", self.train_state.iteration)
        try:
            stop_reason = self._train()
        finally:
            self.dataloaders.close()
        self.checkpoints.close()
        self.parts.profiler.close()
        self.reporter.close()
        status: Literal["interrupted", "finished"] = "finished" if stop_reason is None else "interrupted"
        write_run_status(self.config.checkpoint.save, status, self.train_state.iteration, stop_reason or "")

    def convert(self) -> None:
        """Save the checkpoint that was loaded, unchanged, in the format of this run."""
        flags = self.config.checkpoint
        try:
            self.save()
        finally:
            self.dataloaders.close()
        self.checkpoints.close()
        self.parts.profiler.close()
        self.reporter.close()
        logger.info(f" > converted checkpoint: {flags.load} -> {flags.save}.")

    def _train(self) -> str | None:
        """Train and evaluate; return why the run ends early, or None if it does not."""
        config, train_state = self.config, self.train_state
        self.stop_request.listen()
        if config.training.manual_gc:
            gc.disable()
            gc.collect()
        start = train_state.iteration
        self._check_replicas(start)
        stop_reason = None
        if not config.training.skip_train and not self._make_due_evaluations():
            stop_reason = self.stop_request.reason(start)
        while not config.training.skip_train and train_state.iteration < config.train_iters and stop_reason is None:
            self.checkpoints.poll()
            with reported_divergence(train_state.iteration + 1):
                self.train_iteration(train_state.iteration + 1)
            self.parts.profiler.after_iteration(train_state.iteration - start, train_state.iteration)
            self._check_replicas(train_state.iteration)
            train_state.evaluations_due = self._evaluations_of(train_state.iteration)
            self._make_due_evaluations()
            stop_reason = self.stop_request.reason(train_state.iteration)
            if self._save_if_due(is_last=stop_reason is not None):
                stop_reason = stop_reason or self.stop_request.reason(train_state.iteration)
        if stop_reason is not None:
            logger.info(event_line(stop_reason))
            return stop_reason if self._has_more_to_do() else None
        return self._evaluate_at_the_end()

    def _evaluate_at_the_end(self) -> str | None:
        """Evaluate after training; return the reason if a signal interrupts it."""
        config, train_state = self.config, self.train_state
        skipped = "skipping training (--skip-train is on) ..."
        logger.info(skipped if config.training.skip_train else event_line("after training is done"))
        self._announce_second_evaluation()
        try:
            self.evaluate("valid", f"iteration {train_state.iteration} on validation set", after_training=True)
            self.evaluate("test", f"iteration {train_state.iteration} on test set", after_training=True)
        except EvaluationInterruptedError as error:
            logger.info(event_line(reason := f"exiting program after receiving {error}."))
            return reason
        return None

    def _has_more_to_do(self) -> bool:
        """Whether a run that ends now would train or evaluate if it were started again."""
        is_evaluated = self.dataloaders.valid is None and self.dataloaders.test is None
        is_evaluated = is_evaluated and not self.train_state.evaluations_due
        return self.train_state.iteration < self.config.train_iters or not is_evaluated

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
            changed_attributes(self.engine, {"around_forward": self.parts.stragglers.forward_pass}),
        ):
            result = train_step(
                self.engine,
                self.components.optimizer,
                self.components.scheduler,
                batch,
                self.config.training.micro_batch,
                weights.replica_sample_weights if weights is not None else None,
                self.parallel_state,
                timed("optimizer"),
                self.config.training.empty_unused_memory_level,
                self.validation.passes(iteration),
                self.validation.check if self.validation.is_active else None,
            )
        samples = len(batch) * self.parallel_state.dp_size
        part = (
            samples / self.config.global_batch_size
        )  # relative to the largest batch, for which operations are counted
        self.parts.stragglers.count(part * self.reporter.flops_per_step)
        skipped = self.batch_sizes.nominal(self.train_state.consumed_train_samples) - samples
        self.train_state.advance(iteration, samples, part * self.reporter.flops_per_step, skipped)
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

    def evaluate(self, split: str, prefix: str, *, after_training: bool = False) -> None:
        """Evaluate on ``valid`` or ``test``, if there is such data.

        Args:
            prefix: the point of the run, for the log.
            after_training: whether this is the evaluation after the last iteration, which logs each batch.

        Raises:
            EvaluationInterruptedError: on every rank, if one of them receives a signal.
        """
        data = self.dataloaders.valid if split == "valid" else self.dataloaders.test
        if data is None:
            return
        reads_whole_sets = split == "valid" and self.config.data.full_validation
        with self.reporter.paused(), self.engine.full_parameters():
            results = {
                name: evaluate(
                    self.engine,
                    data.loader,
                    batches,
                    self.config.training.micro_batch,
                    self.parallel_state,
                    log_progress=after_training,
                    dtype=torch.float64 if reads_whole_sets else torch.float32,
                    before_batch=self.stop_request.interrupt_if_signaled,
                )
                for name, batches in data.batches.items()
            }
            if split == "valid" and not reads_whole_sets:  # each set has a separate position, which is the same for all
                self.train_state.consumed_valid_samples += data.samples // len(data.batches)
            loss = Evaluation.of_all(list(results.values())).loss
            by_source = {name: result.loss for name, result in results.items()}
            is_by_source = split == "valid" and self.config.data.multiple_validation_sets
            by_source = by_source if is_by_source else {}
            self.reporter.evaluation(self.train_state, split, loss, prefix, by_source, after_training=after_training)

    def _evaluations_of(self, iteration: int) -> tuple[str, ...]:
        """Return which evaluations follow an iteration."""
        of_validation, of_tasks = self.config.data.eval_interval, self.config.tasks.eval_tasks_interval
        is_last = iteration == self.config.train_iters
        asked = (
            of_validation and iteration % of_validation == 0 and self.dataloaders.valid is not None,
            self.parts.evaluate_tasks and of_tasks is not None and (iteration % of_tasks == 0 or is_last),
        )
        return tuple(name for name, is_asked in zip(EVALUATIONS, asked, strict=True) if is_asked)

    def _make_due_evaluations(self) -> bool:
        """Make the evaluations that are due at this iteration, or that the previous start of the run left.

        Returns:
            whether all were made; a signal interrupts them.
        """
        train_state, iteration = self.train_state, self.train_state.iteration
        try:
            while train_state.evaluations_due:
                if train_state.evaluations_due[0] == "validation":
                    self.evaluate("valid", f"iteration {iteration}")
                else:
                    self._evaluate_tasks()
                train_state.evaluations_due = train_state.evaluations_due[1:]
        except EvaluationInterruptedError as error:
            due = " and ".join(train_state.evaluations_due)
            logger.info(f" > {error} interrupts {due} of iteration {iteration}, which is made when the run continues")
        return not train_state.evaluations_due

    def _evaluate_tasks(self) -> None:
        if self.parts.evaluate_tasks is not None:
            with self.reporter.paused(), self.engine.full_parameters():
                records = self.parts.evaluate_tasks(self.stop_request.interrupt_if_signaled)
                self.reporter.tasks(self.train_state.iteration, records)

    def _announce_second_evaluation(self) -> None:
        """Log why the last iteration has two validation losses, as in Megatron-LM, if it has."""
        config, interval = self.config, self.config.data.eval_interval
        was_evaluated = interval and self.train_state.iteration % interval == 0 and not config.training.skip_train
        if was_evaluated and self.dataloaders.valid is not None and not config.data.full_validation:
            samples = config.data.eval_iters * config.global_batch_size
            logger.info(f" > the final validation loss is of the next {samples} samples, after those of the loss above")

    def save(self, *, persistent: bool = True) -> None:
        """Write a checkpoint; with a persistent one, also the files of the weighting."""
        iteration = self.train_state.iteration
        with self.reporter.paused():
            should_report = self.saves_with_memory_report > 0
            self.saves_with_memory_report -= 1
            if should_report:
                self.reporter.memory(f"(before save_checkpoint for iteration {iteration})")
            if (
                persistent
            ):  # first, so that a run that is killed in between resumes from before both, and writes both again
                self.weighting.before_save(iteration)
            with self.engine.full_parameters():
                self.checkpoints.save(self.train_state, self.weighting.state_dict(), persistent=persistent)
            if should_report:
                self.reporter.memory(f"(after save_checkpoint for iteration {iteration})")

    def _save_if_due(self, *, is_last: bool) -> bool:
        """Return whether a checkpoint was saved that stays."""
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
        parameters: those of this rank.
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
