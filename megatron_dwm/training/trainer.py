"""The training loop."""

from __future__ import annotations

import gc
import signal
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.config.run import RunConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.runtime.record_writers import event_line, say
from megatron_dwm.training.checkpoint import CheckpointWriter
from megatron_dwm.training.dataloaders import Dataloaders
from megatron_dwm.training.evaluation import evaluate
from megatron_dwm.training.reporter import Reporter
from megatron_dwm.training.step import StepResult, train_step
from megatron_dwm.training.train_state import TrainComponents, TrainState
from megatron_dwm.weighting.data_weighting import DataWeighting, SampleWeights
from megatron_dwm.weighting.export import WeighterExporter
from megatron_dwm.weighting.weights import WeightStatistics


class Trainer:
    """Trains, evaluates and saves."""

    def __init__(
        self,
        config: RunConfig,
        parallel_state: ParallelState,
        engine: PipelineEngine,
        components: TrainComponents,
        dataloaders: Dataloaders,
        weighting: DataWeighting | None,
        exporter: WeighterExporter | None,
        reporter: Reporter,
        writer: CheckpointWriter,
        train_state: TrainState,
    ) -> None:
        self.config, self.parallel_state, self.engine, self.components = config, parallel_state, engine, components
        self.dataloaders, self.weighting, self.exporter = dataloaders, weighting, exporter
        self.reporter, self.writer, self.train_state = reporter, writer, train_state
        self.started = time.perf_counter()
        self.stop_requested = False
        self.saves_with_memory_report = 3

    def train(self) -> None:
        """Run the remaining iterations, then evaluate and save."""
        config, train_state = self.config, self.train_state
        self._prepare_to_stop()
        while not config.training.skip_train and train_state.iteration < config.train_iters:
            self.writer.poll()
            self.iterate(train_state.iteration + 1)
            leaving = self._reason_to_leave()
            if config.data.eval_interval and train_state.iteration % config.data.eval_interval == 0:
                self.evaluate("valid", f"iteration {train_state.iteration}")
            self._save_if_due(leaving)
            if leaving:
                self._tell(event_line(leaving))
                break
        else:
            skipped = "skipping training (--skip-train is on) ..."
            self._tell(skipped if config.training.skip_train else event_line("after training is done"))
            self.evaluate("valid", f"iteration {train_state.iteration} on validation set", tells=True)
            self.evaluate("test", f"iteration {train_state.iteration} on test set", tells=True)
        self.writer.close()
        self.reporter.close()

    def iterate(self, iteration: int) -> None:
        """One iteration: weigh the batch, step the language model, update the weighter if it is time."""
        batch = self.dataloaders.train.next_batch()
        self._start_weighting(iteration)
        weights = self.weighting.weigh(iteration, batch) if self.weighting is not None else None
        updates = self.weighting is not None and self.weighting.updates(iteration)
        before = ParameterCopy(self.engine.chunks) if updates else None

        result = train_step(
            self.engine,
            self.components.optimizer,
            self.components.scheduler,
            batch,
            self.config.training.micro_batch,
            weights.own if weights is not None else None,
            self.parallel_state,
        )
        self.train_state.iteration = iteration
        self.train_state.consumed_train_samples += self.config.global_batch_size
        self.train_state.num_floating_point_operations_so_far += self.reporter.flops_per_step

        figures = self._weighting_figures(iteration, batch, weights)
        if self.weighting is not None and weights is not None:
            # A step that was skipped has moved nothing for its samples to be aligned with.
            self._learn(self.weighting, iteration, batch, weights, result, None if result.skipped else before)
        self._report(result, figures)
        interval = self.config.training.manual_gc_interval
        if self.config.training.manual_gc and interval and iteration % interval == 0:
            gc.collect()

    def _learn(
        self,
        weighting: DataWeighting,
        iteration: int,
        batch: Batch,
        weights: SampleWeights,
        result: StepResult,
        before: ParameterCopy | None,
    ) -> None:
        """What follows a weighted step: the outer update, if the parameters ``before`` the step were kept for one."""
        assert weighting.weighter is not None
        if before is not None or iteration % self.config.logging.log_interval == 0:
            self.reporter.warnings(iteration, weighting.warnings(weights))
        if before is not None:
            with self.engine.full_parameters():
                self.reporter.record(weighting.update(iteration, batch, weights, result.sample_losses, before))
        self.reporter.weighed(weighting.weighter.num_computing_parameters, updated=before is not None)
        if self.exporter is not None and weighting.stages.ends_stage(iteration):
            self.exporter.export(weighting, iteration)

    def evaluate(self, split: str, prefix: str, *, tells: bool = False) -> None:
        """Evaluate on ``valid`` or ``test``, if there is such data.

        Args:
            prefix: where in the run this is, for the log.
            tells: whether to print how far it is.
        """
        batch_loader = self.dataloaders.valid if split == "valid" else self.dataloaders.test
        if batch_loader is None or self.config.data.eval_iters == 0:
            return
        paused = self.reporter.pause()
        with self.engine.full_parameters():
            result = evaluate(
                self.engine,
                batch_loader,
                self.config.data.eval_iters,
                self.config.training.micro_batch,
                self.parallel_state,
                tells=tells,
            )
        if split == "valid":
            self.train_state.consumed_valid_samples += result.samples
        self.reporter.evaluation(self.train_state, split, result.loss, prefix)
        self.reporter.resume(paused)

    def save(self, *, persistent: bool = True) -> None:
        """Write a checkpoint, and with a persistent one the weighter's export beside it."""
        paused = self.reporter.pause()
        state = self.weighting.state_dict() if self.weighting is not None else None
        reports, iteration = self.saves_with_memory_report > 0, self.train_state.iteration
        self.saves_with_memory_report -= 1
        if reports:
            self.reporter.memory(f"(before save_checkpoint for iteration {iteration})")
        with self.engine.full_parameters():
            self.writer.save(self.train_state, state, persistent=persistent)
        if reports:
            self.reporter.memory(f"(after save_checkpoint for iteration {iteration})")
        if persistent and self.exporter is not None and self.weighting is not None:
            self.exporter.export(self.weighting, self.train_state.iteration)
        self.reporter.resume(paused)

    def _save_if_due(self, leaving: str | None) -> None:
        flags, iteration = self.config.checkpoint, self.train_state.iteration
        if not flags.save:
            return
        regular = flags.save_interval and iteration % flags.save_interval == 0
        if leaving or regular or iteration == self.config.train_iters:
            self.save()
        elif flags.non_persistent_save_interval and iteration % flags.non_persistent_save_interval == 0:
            self.save(persistent=False)

    def _tell(self, message: str) -> None:
        if self.parallel_state.is_first_rank:
            say(message)

    def _start_weighting(self, iteration: int) -> None:
        if self.weighting is None or not self.weighting.starts(iteration):
            return
        with self.engine.full_parameters():
            self.weighting.start()
        if self.parallel_state.is_first_rank:
            say(f" > weighting starts at iteration {iteration}: {self.weighting.describe()}")

    def _weighting_figures(self, iteration: int, batch: Batch, weights: SampleWeights | None) -> dict[str, Any]:
        if self.weighting is None:
            return {}
        figures = {
            "stage": self.weighting.stages.stage(iteration),
            **self.weighting.by_source(batch, weights),
        }
        return figures | asdict(WeightStatistics.of(weights.relative)) if weights is not None else figures

    def _report(self, result: StepResult, figures: dict[str, Any]) -> None:
        optimizer = self.components.optimizer
        groups = [group for group in optimizer.param_groups if group["params"]]
        standard = [group for group in groups if group.get("default_config", True)] or groups
        norm = params_norm(optimizer) if self.config.logging.log_params_norm else None
        self.reporter.step(
            self.train_state, result, standard[-1]["lr"], float(optimizer.get_loss_scale()), norm, figures
        )

    def _prepare_to_stop(self) -> None:
        if self.config.training.exit_signal_handler:

            def request_stop(signum: int, frame: Any) -> None:
                self.stop_requested = True

            signal.signal(signal.SIGTERM, request_stop)
        if self.config.training.manual_gc:
            gc.disable()
            gc.collect()

    def _reason_to_leave(self) -> str | None:
        """Why the run ends after this iteration, if it does: signal, time or interval; all ranks agree."""
        training, iteration = self.config.training, self.train_state.iteration
        if training.exit_signal_handler or training.exit_duration_in_mins is not None:
            minutes = (time.perf_counter() - self.started) / 60
            late = training.exit_duration_in_mins is not None and minutes > training.exit_duration_in_mins
            flags = torch.tensor([float(self.stop_requested), float(late)], device=torch.cuda.current_device())
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            if flags[0]:
                return "exiting program after receiving SIGTERM."
            if flags[1]:
                return f"exiting program after {minutes} minutes"
        if training.exit_interval is not None and iteration % training.exit_interval == 0:
            return f"exiting program at iteration {iteration}"
        return None


def params_norm(optimizer: Any) -> float:
    """Norm of all parameters over the model, each counted once."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    for param in optimizer.get_parameters():
        if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param):
            total += param.detach().double().square().sum()
    group = optimizer.get_grad_stats_parallel_group() if hasattr(optimizer, "get_grad_stats_parallel_group") else None
    dist.all_reduce(total, group=group or parallel_state.get_model_parallel_group())
    return float(total.sqrt())
