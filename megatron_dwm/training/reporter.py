"""Reports of a run: log lines, records and curves of each iteration."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron_dwm.config.run import RunConfig
from megatron_dwm.model.flops import training_flops
from megatron_dwm.model.memory import MEBIBYTE, memory_estimate
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
from megatron_dwm.runtime.logging import EVERY_RANK, LAST_RANK
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.runtime.record_writers import JsonLinesWriter, ScalarWriter, TensorBoardWriter, WandbWriter
from megatron_dwm.runtime.timers import StepTimers
from megatron_dwm.training.step import StepResult
from megatron_dwm.training.train_state import TrainState

logger = logging.getLogger(__name__)

AFTER_TRAINING = "after_training"
"""True in the record of an evaluation after the last iteration; others have no such field."""
_EVALUATIONS = {"evaluation": "validation", "tasks": "tasks"}
"""The evaluation that makes the records of a kind."""


class Reporter:
    """Writes the log line, curves and JSON-lines records.

    As in Megatron-LM the last rank reports: it is on the last pipeline stage, which knows the losses.
    """

    def __init__(
        self,
        config: RunConfig,
        parallel_state: ParallelState,
        padded_vocab_size: int,
        start: TrainState,
        timers: StepTimers,
    ) -> None:
        """
        Args:
            start: how far the run has come when it starts.
        """
        self.config, self.parallel_state, self.timers = config, parallel_state, timers
        self._due = start.evaluations_due
        self._has_trained = start.iteration >= config.train_iters and not config.training.skip_train
        self.window, self.energy = LossWindow(), EnergyMeter(is_wanted=config.profiling.log_energy)
        self.padded_vocab_size = padded_vocab_size
        self.flops_per_step = training_flops(config.model, padded_vocab_size, config.global_batch_size)
        self.since = time.perf_counter()
        """Start of the log line's window, shifted by the time that is not training."""
        self.step_since = self.since
        """Time of the last reported step, shifted by the time that is not training."""
        self.first_step = True
        self.memory_reports_left = 2
        self.peak_tflops = _peak_tflops(config)
        self.jsonl: JsonLinesWriter | None = None
        self.boards: list[ScalarWriter] = []
        if parallel_state.is_last_rank:
            path = config.logging.records_file(config.checkpoint.save)
            self.jsonl = None if path is None else JsonLinesWriter(path, start.iteration, self._is_repeated)
            if config.logging.tensorboard_dir is not None:
                self.boards.append(
                    TensorBoardWriter(config.logging.tensorboard_dir, config.logging.tensorboard_queue_size)
                )
            if config.logging.wandb_project:
                self.boards.append(WandbWriter(config.logging, config.checkpoint.save, config.flat()))

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
        if self.config.logging.log_loss_scale_to_tensorboard:
            numbers["loss-scale"] = loss_scale
        if self.config.logging.log_world_size_to_tensorboard:
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
        if self.jsonl is not None:
            self.jsonl.write(
                {
                    "kind": "train",
                    "iteration": train_state.iteration,
                    "consumed_samples": train_state.consumed_train_samples,
                    "seconds": seconds,
                    "flops": self.flops_per_step * batch_size / self.config.global_batch_size + weighting_flops,
                    "lm_loss": result.loss,
                    "learning_rate": learning_rate,
                    "grad_norm": result.grad_norm,
                    "loss_scale": loss_scale,
                    "skipped": result.skipped,
                    **weighting,
                }
            )
        # As in Megatron-LM, the first step has a separate line, and counts again in the next one.
        if self.first_step or train_state.iteration % self.config.logging.log_interval == 0:
            self._log_line(train_state, result, learning_rate, loss_scale, params_norm, weighting, batch_size)
            if not self.first_step:
                self.window = LossWindow()
                self.since = time.perf_counter()
        self.first_step = False

    def record(self, *records: dict[str, Any]) -> None:
        """Write records to the JSON lines; an outer update's has a log line and curves too."""
        if not self.parallel_state.is_last_rank:
            return
        for record in records:
            if self.jsonl is not None:
                self.jsonl.write(record)
            if record["kind"] == "outer_update":
                logger.info(update_line(record), extra=LAST_RANK)
                for name, value in update_curves(record).items():
                    self._draw(f"dwm/{name}", value, record["iteration"])

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
        has_names = self.config.data.validation_set_names is not None
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
        if not self.config.training.skip_train:
            self._draw_evaluation("lm loss validation", loss, train_state)
            for name, value in by_source.items():
                self._draw_evaluation(f"lm loss validation-{labels[name]}", value, train_state)
                self._draw(f"dwm/validation_loss/{name}", value, train_state.iteration)

    def _is_repeated(self, record: Mapping[str, Any]) -> bool:
        """Whether a record of the iteration at which the run resumed is of an evaluation that will be repeated."""
        if AFTER_TRAINING in record:
            return self._has_trained
        return _EVALUATIONS.get(str(record.get("kind"))) in self._due

    def tasks(self, iteration: int, results: list[dict[str, Any]]) -> None:
        """Report an evaluation on tasks: a log line, a record and curves for each."""
        for result in results:
            name, metrics = f"{result['task']}, {result['num_fewshot']} examples", result["metrics"]
            logger.info(task_line(iteration, name, result["samples"], metrics), extra=LAST_RANK)
            self.record({**result, "iteration": iteration})
            for metric, value in metrics.items():
                label = f"dwm/tasks/{result['task']}/{result['num_fewshot']}-shot {metric}"
                if value["mean"] is not None:
                    self._draw(label, value["mean"], iteration)

    def _draw_evaluation(self, name: str, loss: float, train_state: TrainState) -> None:
        """Write a point of a loss curve, and of its perplexity curve if asked for, under Megatron-LM's names."""
        self._draw(name, loss, train_state.iteration, train_state.consumed_train_samples)
        if self.config.logging.log_validation_ppl_to_tensorboard:
            ppl = float(torch.tensor(min(20.0, loss)).exp())
            self._draw(f"{name} ppl", ppl, train_state.iteration, train_state.consumed_train_samples)

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
        if self.jsonl is not None:
            self.jsonl.close()
        for board in self.boards:
            board.close()

    def _draw(self, name: str, value: float, iteration: int, samples: int | None = None) -> None:
        for board in self.boards:
            board.scalar(name, value, iteration, samples)

    def _write_scalars(self, train_state: TrainState, numbers: dict[str, float], weighting: dict[str, Any]) -> None:
        if not self.boards or train_state.iteration % self.config.logging.tensorboard_log_interval:
            return
        for name, value in numbers.items():
            self._draw(name, value, train_state.iteration, train_state.consumed_train_samples)
        if train_state.skipped_train_samples > 0:
            self._draw("skipped-train-samples", train_state.skipped_train_samples, train_state.iteration)
        for name, value in weighting.items():
            parts = value if isinstance(value, dict) else {"": value}
            for source, number in parts.items():
                label = f"dwm/{name}/{source}" if source else f"dwm/{name}"
                self._draw(label, number, train_state.iteration)
        if self.config.logging.log_memory_to_tensorboard and torch.cuda.is_available():
            stats = torch.cuda.memory_stats()
            self._draw("mem-reserved-bytes", stats["reserved_bytes.all.current"], train_state.iteration)
            self._draw("mem-allocated-bytes", stats["allocated_bytes.all.current"], train_state.iteration)
            self._draw("mem-max-allocated-bytes", stats["allocated_bytes.all.peak"], train_state.iteration)
            self._draw("mem-allocated-count", stats["allocation.all.current"], train_state.iteration)

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
        flops = self.flops_per_step * batch_size / self.config.global_batch_size
        throughput = flops * per_flop if self.config.logging.log_throughput else None
        extra: dict[str, float | str] = {**_flat(weighting)}
        if self.config.logging.log_throughput and weighting:
            added = self.window.weighting_flops / self.window.iterations
            extra["dwm throughput per GPU (TFLOP/s/GPU)"] = (flops + added) * per_flop
        if not self.first_step:  # the first step includes start-up costs
            tokens = batch_size * self.config.model.seq_length / (seconds * self.parallel_state.world_size)
            seconds_left = seconds * (self.config.train_iters - train_state.iteration)
            extra |= Speed(tokens, flops * per_flop, self.peak_tflops, seconds_left).figures()
        joules = self.energy.lap()
        if joules is not None:
            joules /= max(1, self.window.iterations) * self.parallel_state.world_size
            self._draw("iter-energy/gpu", joules, train_state.iteration)
            self._draw("power/gpu", joules / seconds, train_state.iteration)
        line = LogLine(
            iteration=train_state.iteration,
            train_iters=self.config.train_iters,
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
        self._report_memory(train_state.iteration)

    def _report_memory(self, iteration: int) -> None:
        """Log the GPU's memory at the first two lines, by when the optimizer's state is in it, and then if asked to.

        The estimate of it is logged once, and not without a GPU: it is one of mixed precision there.
        """
        interval = self.config.logging.log_memory_interval
        if self.first_step and torch.cuda.is_available():
            logger.info("\n".join(memory_estimate(self.config, self.padded_vocab_size)))
        if self.memory_reports_left > 0 or (interval is not None and iteration % interval == 0):
            self.memory_reports_left -= 1
            self.memory(f"(after {iteration} iterations)")

    def _report_timers(self, iteration: int, seconds: float, throughput: float | None) -> None:
        """Log the timers, and write them to TensorBoard; collective.

        As in Megatron-LM, they are divided by ``--log-interval`` and then reset, except after a run's first step, which
        has an additional line and no curve in TensorBoard.
        """
        interval = self.config.logging.log_interval
        if self.config.profiling.log_timers_to_tensorboard:
            numbers = {f"{name}-time": value for name, value in self.timers.largest(interval).items()}
            if not self.first_step:
                numbers["iteration-time"] = seconds
            if throughput is not None:
                numbers["throughput"] = throughput
            for name, value in numbers.items():
                self._draw(name, value, iteration)
        text = self.timers.text(interval, should_reset=not self.first_step)
        if text is not None:
            logger.info(text, extra=LAST_RANK)

    def memory(self, when: str) -> None:
        """Megatron-LM's report of the GPU's memory; silent without one."""
        if not torch.cuda.is_available() or self.parallel_state.dp_rank != 0:
            return
        figures = {
            "allocated": torch.cuda.memory_allocated(),
            "max allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "max reserved": torch.cuda.max_memory_reserved(),
        }
        if self.config.logging.log_device_memory_used:
            figures["total device memory used"] = torch.cuda.device_memory_used()
        text = " | ".join(f"{name}: {value / MEBIBYTE:.2f}" for name, value in figures.items())
        logger.info(f"[Rank {self.parallel_state.rank}] {when} memory (MB) | {text}", extra=EVERY_RANK)


def _peak_tflops(config: RunConfig) -> float | None:
    """Return the peak TFLOP/s of a device in this run, if known."""
    if config.logging.dwm_peak_tflops is not None:
        return config.logging.dwm_peak_tflops
    is_half = config.optimizer.bf16 or config.optimizer.fp16
    flops = peak_flops(torch.cuda.get_device_name()) if is_half and torch.cuda.is_available() else None
    return None if flops is None else flops / 1e12


def _flat(weighting: dict[str, Any]) -> dict[str, float]:
    """The weighting figures that fit a log line: stage, effective sample size, mean weight by source."""
    flat: dict[str, float] = {}
    if "stage" in weighting:
        flat["dwm stage"] = weighting["stage"]
    if "effective_sample_size" in weighting:
        flat["dwm effective sample size"] = weighting["effective_sample_size"]
    for source, weight in weighting.get("weight_by_source", {}).items():
        flat[f"dwm weight {source}"] = weight
    return flat
