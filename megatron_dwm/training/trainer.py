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
from megatron_dwm.model.schedule import PipelineSchedule
from megatron_dwm.runtime.distributed import Layout
from megatron_dwm.runtime.metrics import say
from megatron_dwm.runtime.parameters import ParameterCopy
from megatron_dwm.training.checkpoint import Progress, TrainingObjects, save_checkpoint
from megatron_dwm.training.evaluation import evaluate
from megatron_dwm.training.readers import Readers
from megatron_dwm.training.reporter import Reporter
from megatron_dwm.training.step import StepResult, train_step
from megatron_dwm.weighting.data_weighting import BatchWeights, DataWeighting
from megatron_dwm.weighting.export import WeighterExporter
from megatron_dwm.weighting.weights import WeightStatistics


class Trainer:
    """Trains, evaluates and saves."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        schedule: PipelineSchedule,
        objects: TrainingObjects,
        readers: Readers,
        weighting: DataWeighting | None,
        exporter: WeighterExporter | None,
        reporter: Reporter,
        progress: Progress,
    ) -> None:
        self.config, self.layout, self.schedule, self.objects = config, layout, schedule, objects
        self.readers, self.weighting, self.exporter = readers, weighting, exporter
        self.reporter, self.progress = reporter, progress
        self.started = time.perf_counter()
        self.stop_requested = False

    def train(self) -> None:
        """Run the remaining iterations, then evaluate and save."""
        config, progress = self.config, self.progress
        self._prepare_to_stop()
        saved_at = -1
        while not config.training.skip_train and progress.iteration < config.train_iters:
            self.iterate(progress.iteration + 1)
            saves = config.checkpoint.save_interval
            leaving = self._leaving()
            if config.data.eval_interval and progress.iteration % config.data.eval_interval == 0:
                self.evaluate("valid", f"iteration {progress.iteration}")
            if config.checkpoint.save and (leaving or (saves and progress.iteration % saves == 0)):
                self.save()
                saved_at = progress.iteration
            if leaving:
                break
        else:
            if config.checkpoint.save and progress.iteration != saved_at and not config.training.skip_train:
                self.save()
            self.evaluate("valid", f"iteration {progress.iteration} on validation set")
            self.evaluate("test", f"iteration {progress.iteration} on test set")
        self.reporter.close()

    def iterate(self, iteration: int) -> None:
        """One iteration: weigh the batch, step the language model, update the weighter if it is time."""
        batch = self.readers.train.next()
        self._start_weighting(iteration)
        weights = self.weighting.weigh(iteration, batch) if self.weighting is not None else None
        updates = self.weighting is not None and self.weighting.updates(iteration)
        before = ParameterCopy(self.schedule.chunks) if updates else None

        result = train_step(
            self.schedule,
            self.objects.optimizer,
            self.objects.scheduler,
            batch,
            self.config.training.micro_batch,
            weights.own if weights is not None else None,
            self.layout,
        )
        self.progress.iteration = iteration
        self.progress.consumed_train_samples += self.config.global_batch_size
        self.progress.num_floating_point_operations_so_far += self.reporter.flops_per_step

        figures = self._weighting_figures(iteration, batch, weights)
        if weights is not None and (updates or iteration % self.config.logging.log_interval == 0):
            assert self.weighting is not None
            self.reporter.warnings(iteration, self.weighting.warnings(weights))
        if before is not None:
            assert self.weighting is not None and weights is not None
            with self.schedule.whole_parameters():
                self.reporter.record(self.weighting.update(iteration, batch, weights, before))
        self._report(result, figures)
        if self.exporter is not None and self.weighting is not None and self.weighting.stages.ends_stage(iteration):
            self.exporter.export(self.weighting, iteration)
        interval = self.config.training.manual_gc_interval
        if self.config.training.manual_gc and interval and iteration % interval == 0:
            gc.collect()

    def evaluate(self, split: str, prefix: str) -> None:
        """Evaluate on ``valid`` or ``test``, if there is such data."""
        reader = self.readers.valid if split == "valid" else self.readers.test
        if reader is None or self.config.data.eval_iters == 0:
            return
        paused = self.reporter.pause()
        with self.schedule.whole_parameters():
            result = evaluate(
                self.schedule,
                reader,
                self.config.data.eval_iters,
                self.config.training.micro_batch,
                self.layout,
            )
        if split == "valid":
            self.progress.consumed_valid_samples += result.samples
        self.reporter.evaluation(self.progress, split, result.loss, prefix)
        self.reporter.resume(paused)

    def save(self) -> None:
        """Write a checkpoint, and the weighter's export beside it."""
        paused = self.reporter.pause()
        state = self.weighting.state_dict() if self.weighting is not None else None
        with self.schedule.whole_parameters():
            folder = save_checkpoint(self.config, self.objects, self.progress, self.layout, state)
        if self.layout.is_first:
            say(f"  successfully saved checkpoint from iteration {self.progress.iteration:7d} to {folder.parent}")
        if self.exporter is not None and self.weighting is not None:
            self.exporter.export(self.weighting, self.progress.iteration)
        self.reporter.resume(paused)

    def _start_weighting(self, iteration: int) -> None:
        if self.weighting is None or not self.weighting.starts(iteration):
            return
        with self.schedule.whole_parameters():
            self.weighting.start()
        if self.layout.is_first:
            say(f" > weighting starts at iteration {iteration}: {self.weighting.describe()}")

    def _weighting_figures(self, iteration: int, batch: Any, weights: BatchWeights | None) -> dict[str, Any]:
        if self.weighting is None:
            return {}
        figures = {
            "stage": self.weighting.stages.stage(iteration),
            **self.weighting.by_source(batch, weights),
        }
        return figures | asdict(WeightStatistics.of(weights.relative)) if weights is not None else figures

    def _report(self, result: StepResult, figures: dict[str, Any]) -> None:
        optimizer = self.objects.optimizer
        groups = [group for group in optimizer.param_groups if group["params"]]
        standard = [group for group in groups if group.get("default_config", True)] or groups
        norm = params_norm(optimizer) if self.config.logging.log_params_norm else None
        self.reporter.step(self.progress, result, standard[-1]["lr"], float(optimizer.get_loss_scale()), norm, figures)

    def _prepare_to_stop(self) -> None:
        if self.config.training.exit_signal_handler:

            def request_stop(signum: int, frame: Any) -> None:
                self.stop_requested = True

            signal.signal(signal.SIGTERM, request_stop)
        if self.config.training.manual_gc:
            gc.disable()
            gc.collect()

    def _leaving(self) -> bool:
        """Whether the run ends here, by signal, time or interval; all ranks agree."""
        training, iteration = self.config.training, self.progress.iteration
        at_interval = training.exit_interval is not None and iteration % training.exit_interval == 0
        if not training.exit_signal_handler and training.exit_duration_in_mins is None:
            return at_interval
        minutes = (time.perf_counter() - self.started) / 60
        out_of_time = training.exit_duration_in_mins is not None and minutes > training.exit_duration_in_mins
        flag = torch.tensor(float(self.stop_requested or out_of_time), device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return at_interval or bool(flag)


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
