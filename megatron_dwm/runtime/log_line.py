"""The lines that a run logs: Megatron-LM's, byte for byte, followed by the weighting's metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dwm.runtime.logging import timestamp


@dataclass
class LossWindow:
    """Sums of the iterations since the last log line."""

    losses: dict[str, float] = field(default_factory=dict)
    weighting_flops: float = 0.0
    """Operations that plain training would not have needed."""
    advanced: int = 0
    """Iterations in which the parameters changed."""
    skipped: int = 0
    """Iterations that the optimizer skipped, because a gradient overflowed."""
    nan: int = 0
    """Losses that were not finite, in skipped iterations."""

    def add(self, losses: Mapping[str, float], skipped: bool, weighting_flops: float = 0.0) -> None:
        """Add one iteration; the losses of a skipped one do not count."""
        self.weighting_flops += weighting_flops
        for name, value in losses.items():
            if not skipped:
                self.losses[name] = self.losses.get(name, 0.0) + value
            elif not math.isfinite(value):
                self.nan += 1
        self.advanced += not skipped
        self.skipped += skipped

    @property
    def iterations(self) -> int:
        """Iterations in the window, skipped ones included."""
        return self.advanced + self.skipped

    def averages(self) -> dict[str, float]:
        """Return the mean of each loss over the iterations that were not skipped."""
        return {name: total / max(1, self.advanced) for name, total in self.losses.items()}


@dataclass(frozen=True)
class LogLine:
    """The values of one of Megatron-LM's log lines; this program's values follow them."""

    iteration: int
    train_iters: int
    consumed_samples: int
    skipped_samples: int
    seconds_per_iteration: float
    throughput: float | None
    """Throughput of the language model's steps, in TFLOP/s per GPU."""
    joules: float | None
    """Energy of one GPU in one iteration, if it is measured."""
    learning_rate: float
    global_batch_size: int
    losses: Mapping[str, float]
    loss_scale: float
    grad_norm: float | None
    num_zeros: float | None
    params_norm: float | None
    skipped_iterations: int
    nan_iterations: int
    extra: Mapping[str, float | str] = field(default_factory=dict)
    """Figures that Megatron-LM's line does not have."""

    def __str__(self) -> str:
        parts = [
            f" [{timestamp()}] iteration {self.iteration:8d}/{self.train_iters:8d}",
            f"consumed samples: {self.consumed_samples:12d}",
        ]
        if self.skipped_samples > 0:
            parts.append(f"skipped samples: {self.skipped_samples:12d}")
        parts.append(f"elapsed time per iteration (ms): {self.seconds_per_iteration * 1000:.1f}")
        if self.throughput is not None:
            parts.append(f"throughput per GPU (TFLOP/s/GPU): {self.throughput:.1f}")
        if self.joules is not None:
            parts.append(f"energy per GPU (J/iter/GPU): {self.joules:.1f}")
            parts.append(f"power per GPU (W/GPU): {self.joules / self.seconds_per_iteration:.1f}")
        parts.append(f"learning rate: {self.learning_rate:.6E}")
        parts.append(f"global batch size: {self.global_batch_size:5d}")
        parts += [f"{name}: {value:.6E}" for name, value in self.losses.items() if value > 0]
        parts.append(f"loss scale: {self.loss_scale:.1f}")
        if self.grad_norm is not None:
            parts.append(f"grad norm: {self.grad_norm:.3f}")
        if self.num_zeros is not None:
            parts.append(f"num zeros: {float(self.num_zeros)}")
        if self.params_norm is not None:
            parts.append(f"params norm: {self.params_norm:.3f}")
        parts.append(f"number of skipped iterations: {self.skipped_iterations:3d}")
        parts.append(f"number of nan iterations: {self.nan_iterations:3d}")
        parts += [
            f"{name}: {value if isinstance(value, str) else format(value, '.4g')}" for name, value in self.extra.items()
        ]
        return " | ".join(parts) + " |"


def update_line(record: Mapping[str, Any]) -> str:
    """Return the log line of an outer update: target loss, the weighter's objective, and values by source."""
    parts = [
        f" [{timestamp()}] outer update at iteration {record['iteration']:8d}",
        f"target loss: {record['target_loss']:.6E}",
        f"objective: {record['objective_before']:.4g} before, {record['objective_after']:.4g} after",
        f"effective sample size: {record['effective_sample_size']:.4g}",
    ]
    parts += [f"alignment {source}: {value:.4g}" for source, value in record["alignment_by_source"].items()]
    parts += [f"offset {source}: {value:.4g}" for source, value in record.get("offset_by_source", {}).items()]
    return " | ".join(parts) + " |"


def update_curves(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an outer update that are plotted, by name."""
    names = ("target_loss", "objective_before", "objective_after", "weighter_grad_norm")
    by_source = {
        f"{name}/{source}": value
        for name in ("alignment", "offset")
        for source, value in record.get(f"{name}_by_source", {}).items()
    }
    return {**{name: record[name] for name in names}, **by_source}


@dataclass(frozen=True)
class Speed:
    """The speed of a run, and its remaining time."""

    tokens_per_second: float
    """Per GPU."""
    tflops: float
    """TFLOP/s per GPU, counting only the operations of plain training."""
    peak_tflops: float | None
    """Peak TFLOP/s of a GPU; None if unknown."""
    seconds_left: float

    def figures(self) -> dict[str, float | str]:
        """Return the figures that the log line shows, by name."""
        figures: dict[str, float | str] = {"tokens/s/GPU": self.tokens_per_second, "TFLOP/s/GPU": self.tflops}
        if self.peak_tflops is not None:
            figures["MFU"] = f"{self.tflops / self.peak_tflops:.1%}"
        return {**figures, "time left": duration(self.seconds_left)}


def duration(seconds: float) -> str:
    """Return a time as days, hours, minutes and seconds, such as ``1d 02:03:04``."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock


def validation_line(prefix: str, loss: float, label: str | None = None, name: str | None = None) -> str:
    """Return Megatron-LM's report of an evaluation, between lines of dashes.

    Args:
        label: label of the validation set, if there are several: its number, or its name in the flags.
        name: name of that set, which Megatron-LM does not log.
    """
    suffix, ours = ("", "") if label is None else (f"-{label}", f"dwm set: {name} | ")
    ppl = math.exp(min(20, loss))  # Megatron-LM's limit
    text = f" validation{suffix} loss at {prefix} | lm loss value: {loss:.6E} | lm loss PPL: {ppl:.6E} | {ours}"
    rule = "-" * (len(text) + 1)
    return f"{rule}\n{text}\n{rule}"


def task_line(iteration: int, task: str, items: int, metrics: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return the report of an evaluation on one task: means, and their standard errors where they have any."""
    figures = [
        f"{name} {value['mean']:.3f}" + ("" if value["stderr"] is None else f" ± {value['stderr']:.3f}")
        for name, value in metrics.items()
        if value["mean"] is not None
    ]
    return f" dwm tasks at iteration {iteration} | {task}, {items} items | {' | '.join(figures)}"


def event_line(event: str) -> str:
    """Return Megatron-LM's line for the time of an event."""
    return f"[{event}] datetime: {timestamp()} "
