"""Reports of a run: log lines, records and curves of each iteration."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dwm.config.logging import LoggingConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.runtime.device import peak_flops
from megatron_dwm.runtime.energy import EnergyMeter
from megatron_dwm.runtime.log_line import (
    LogLine,
    LossWindow,
    Speed,
    task_line,
    update_curves,
    update_line,
    validation_line,
)
from megatron_dwm.runtime.logging import LAST_RANK
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.runtime.timers import StepTimers
from megatron_dwm.training.memory_report import MemoryReport
from megatron_dwm.training.run_recorder import AFTER_TRAINING, RunRecorder
from megatron_dwm.training.step import StepResult
from megatron_dwm.training.train_state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportedRun:
    """Facts about a run that reports use in every step."""

    train_iters: int
    batch_size: int
    """Samples of a step; the largest if steps differ."""
    seq_length: int
    flops_per_step: float
    """Operations of a step of ``batch_size`` samples, without weighting."""
    peak_tflops: float | None
    """Of one device, if known."""
    is_trained: bool
    """Whether the run trains, and does not only evaluate."""
    has_set_names: bool
    """Whether ``--validation-set-names`` are given."""


class Reporter:
    """Writes the log line, curves and JSON-lines records.

    As in Megatron-LM the last rank reports: it is on the last pipeline stage, which knows the losses.
    """

    def __init__(
        self,
        run: ReportedRun,
        flags: LoggingConfig,
        parallel_state: ParallelState,
        records: RunRecorder,
        memory: MemoryReport,
        timers: StepTimers,
        energy: EnergyMeter,
    ) -> None:
        self.run, self.flags, self.parallel_state, self.records = run, flags, parallel_state, records
        self.memory, self.timers, self.energy = memory, timers, energy
        self.window = LossWindow()
        self.since = time.perf_counter()
        """Start of the log line's window, shifted by the time that is not training."""
        self.step_since = self.since
        """Time of the last reported step, shifted by the time that is not training."""
        self.is_first_step = True

    def step(
        self,
        train_state: TrainState,
        result: StepResult,
        *,
        learning_rate: float,
        loss_scale: float,
        params_norm: float | None,
        weighting: dict[str, Any],
        weighting_flops: float,
        batch_size: int,
    ) -> None:
        """Report one training step.

        Args:
            weighting: figures of the step's weights, empty for plain training: numbers, and dicts of numbers by source.
            weighting_flops: operations of all ranks that plain training would not have needed.
            batch_size: samples of the step over all replicas.
        """
        losses = {} if result.loss is None else {"lm loss": result.loss}
        self.window.add(losses, result.skipped, weighting_flops)
        numbers: dict[str, float] = {
            "learning-rate": learning_rate,
            "batch-size": float(batch_size),
            **losses,
        }
        if self.flags.log_loss_scale_to_tensorboard:
            numbers["loss-scale"] = loss_scale
        if self.flags.log_world_size_to_tensorboard:
            numbers["world-size"] = float(self.parallel_state.world_size)
        for name, value in (
            ("grad-norm", result.grad_norm),
            ("num-zeros", result.num_zeros),
            ("params-norm", params_norm),
        ):
            if value is not None:
                numbers[name] = float(value)
        self._write_scalars(train_state, numbers, weighting)
        now = time.perf_counter()
        seconds, self.step_since = now - self.step_since, now
        self.records.write(
            {
                "kind": "train",
                "iteration": train_state.iteration,
                "consumed_samples": train_state.consumed_train_samples,
                "seconds": seconds,
                "flops": self.run.flops_per_step * batch_size / self.run.batch_size + weighting_flops,
                "lm_loss": result.loss,
                "learning_rate": learning_rate,
                "grad_norm": result.grad_norm,
                "loss_scale": loss_scale,
                "skipped": result.skipped,
                **weighting,
            }
        )
        # As in Megatron-LM, the first step has a separate line, and counts again in the next one.
        if self.is_first_step or train_state.iteration % self.flags.log_interval == 0:
            self._log_line(train_state, result, learning_rate, loss_scale, params_norm, weighting, batch_size)
            if not self.is_first_step:
                self.window = LossWindow()
                self.since = time.perf_counter()
        self.is_first_step = False

    def record(self, *records: dict[str, Any]) -> None:
        """Write records to the JSON lines; an outer update's has a log line and curves too."""
        if not self.parallel_state.is_last_rank:
            return
        for record in records:
            self.records.write(record)
            if record["kind"] == "outer_update":
                logger.info(update_line(record), extra=LAST_RANK)
                for name, value in update_curves(record).items():
                    self.records.draw(f"dwm/{name}", value, record["iteration"])

    def evaluation(
        self,
        train_state: TrainState,
        split: str,
        loss: float,
        prefix: str,
        by_source: dict[str, float],
        *,
        after_training: bool,
    ) -> None:
        """Report an evaluation on ``split`` (valid or test).

        Args:
            loss: mean over all that was read.
            prefix: the point of the run, for the log.
            by_source: the loss of each set by its name, if sets are evaluated by themselves.
            after_training: whether it is the one after the last iteration.
        """
        if not self.parallel_state.is_last_rank:
            return
        has_names = self.run.has_set_names
        labels = {name: name if has_names else str(number) for number, name in enumerate(by_source)}  # Megatron-LM's
        lines = [validation_line(prefix, value, labels[name], name) for name, value in by_source.items()]
        for line in lines or [validation_line(prefix, loss)]:
            logger.info(line, extra=LAST_RANK)
        record = {"kind": "evaluation", "iteration": train_state.iteration, "split": split, "lm_loss": loss}
        if by_source:
            record["lm_loss_by_source"] = by_source
        if after_training:
            record[AFTER_TRAINING] = True
        self.record(record)
        # Megatron-LM appends the test loss to the validation curve.
        if self.run.is_trained:
            self._draw_evaluation("lm loss validation", loss, train_state)
            for name, value in by_source.items():
                self._draw_evaluation(f"lm loss validation-{labels[name]}", value, train_state)
                self.records.draw(f"dwm/validation_loss/{name}", value, train_state.iteration)

    def tasks(self, iteration: int, results: list[dict[str, Any]]) -> None:
        """Report an evaluation on tasks: a log line, a record and curves for each."""
        for result in results:
            name, metrics = f"{result['task']}, {result['num_fewshot']} examples", result["metrics"]
            logger.info(task_line(iteration, name, result["samples"], metrics), extra=LAST_RANK)
            self.record({**result, "iteration": iteration})
            for metric, value in metrics.items():
                label = f"dwm/tasks/{result['task']}/{result['num_fewshot']}-shot {metric}"
                if value["mean"] is not None:
                    self.records.draw(label, value["mean"], iteration)

    def _draw_evaluation(self, name: str, loss: float, train_state: TrainState) -> None:
        """Write a point of a loss curve, and of its perplexity curve if asked for, under Megatron-LM's names."""
        self.records.draw(name, loss, train_state.iteration, train_state.consumed_train_samples)
        if self.flags.log_validation_ppl_to_tensorboard:
            ppl = float(torch.tensor(min(20.0, loss)).exp())
            self.records.draw(f"{name} ppl", ppl, train_state.iteration, train_state.consumed_train_samples)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the context (an evaluation, a save) from the time of an iteration."""
        paused_at = time.perf_counter()
        self.energy.pause()
        try:
            yield
        finally:
            self.energy.resume()
            seconds = time.perf_counter() - paused_at
            self.since += seconds
            self.step_since += seconds

    def close(self) -> None:
        """Close the records and the curves; collective."""
        joules = self.energy.close()
        if joules is not None:
            logger.info(f"Total training energy (GPU): {joules / 1e6:.3f} MJ")
        self.records.close()

    def _write_scalars(self, train_state: TrainState, numbers: dict[str, float], weighting: dict[str, Any]) -> None:
        if not self.records.has_curves or train_state.iteration % self.flags.tensorboard_log_interval:
            return
        for name, value in numbers.items():
            self.records.draw(name, value, train_state.iteration, train_state.consumed_train_samples)
        if train_state.skipped_train_samples > 0:
            self.records.draw("skipped-train-samples", train_state.skipped_train_samples, train_state.iteration)
        for name, value in weighting.items():
            parts = value if isinstance(value, dict) else {"": value}
            for source, number in parts.items():
                label = f"dwm/{name}/{source}" if source else f"dwm/{name}"
                self.records.draw(label, number, train_state.iteration)
        for name, value in self.memory.curves().items():
            self.records.draw(name, value, train_state.iteration)

    def _log_line(
        self,
        train_state: TrainState,
        result: StepResult,
        learning_rate: float,
        loss_scale: float,
        params_norm: float | None,
        weighting: dict[str, Any],
        batch_size: int,
    ) -> None:
        seconds = (time.perf_counter() - self.since) / max(1, self.window.iterations)
        per_flop = 1 / (seconds * 1e12 * self.parallel_state.world_size)
        flops = self.run.flops_per_step * batch_size / self.run.batch_size
        throughput = flops * per_flop if self.flags.log_throughput else None
        extra: dict[str, float | str] = {**_flat(weighting)}
        if self.flags.log_throughput and weighting:
            added = self.window.weighting_flops / self.window.iterations
            extra["dwm throughput per GPU (TFLOP/s/GPU)"] = (flops + added) * per_flop
        if not self.is_first_step:  # the first step includes start-up costs
            tokens = batch_size * self.run.seq_length / (seconds * self.parallel_state.world_size)
            seconds_left = seconds * (self.run.train_iters - train_state.iteration)
            extra |= Speed(tokens, flops * per_flop, self.run.peak_tflops, seconds_left).figures()
        joules = self.energy.lap()
        if joules is not None:
            joules /= max(1, self.window.iterations) * self.parallel_state.world_size
            self.records.draw("iter-energy/gpu", joules, train_state.iteration)
            self.records.draw("power/gpu", joules / seconds, train_state.iteration)
        line = LogLine(
            iteration=train_state.iteration,
            train_iters=self.run.train_iters,
            consumed_samples=train_state.consumed_train_samples,
            skipped_samples=train_state.skipped_train_samples,
            seconds_per_iteration=seconds,
            throughput=throughput,
            joules=joules,
            learning_rate=learning_rate,
            global_batch_size=batch_size,
            losses=self.window.averages(),
            loss_scale=loss_scale,
            grad_norm=result.grad_norm,
            num_zeros=result.num_zeros,
            params_norm=params_norm,
            skipped_iterations=self.window.skipped,
            nan_iterations=self.window.nan,
            extra=extra,
        )
        logger.info(str(line), extra=LAST_RANK)
        self._report_timers(train_state.iteration, seconds, throughput)
        self.memory.after_log_line(train_state.iteration)

    def _report_timers(self, iteration: int, seconds: float, throughput: float | None) -> None:
        """Log the timers, and write them to TensorBoard; collective.

        As in Megatron-LM, they are divided by ``--log-interval`` and then reset, except after a run's first step, which
        has an additional line and no curve in TensorBoard.
        """
        interval = self.flags.log_interval
        if self.timers.has_curves:
            numbers = {f"{name}-time": value for name, value in self.timers.largest(interval).items()}
            if not self.is_first_step:
                numbers["iteration-time"] = seconds
            if throughput is not None:
                numbers["throughput"] = throughput
            for name, value in numbers.items():
                self.records.draw(name, value, iteration)
        text = self.timers.text(interval, should_reset=not self.is_first_step)
        if text is not None:
            logger.info(text, extra=LAST_RANK)


def peak_tflops(flags: LoggingConfig, optimizer: OptimizerConfig) -> float | None:
    """Return the peak TFLOP/s of a device in this run, if known."""
    if flags.dwm_peak_tflops is not None:
        return flags.dwm_peak_tflops
    is_half = optimizer.bf16 or optimizer.fp16
    flops = peak_flops(torch.cuda.get_device_name()) if is_half and torch.cuda.is_available() else None
    return None if flops is None else flops / 1e12


def _flat(weighting: dict[str, Any]) -> dict[str, float]:
    """Return the weighting figures that fit a log line: stage, effective sample size, mean weight by source."""
    flat: dict[str, float] = {}
    if "stage" in weighting:
        flat["dwm stage"] = weighting["stage"]
    if "effective_sample_size" in weighting:
        flat["dwm effective sample size"] = weighting["effective_sample_size"]
    for source, weight in weighting.get("weight_by_source", {}).items():
        flat[f"dwm weight {source}"] = weight
    return flat
