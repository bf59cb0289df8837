"""Where a run's numbers go: Megatron-LM's log line, TensorBoard, JSON lines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.logging import timestamp


class JsonLines:
    """Appends records to a file, one JSON object a line, each flushed as it is written.

    A resumed run drops the records past its first iteration, which it is about to write again. A run that starts anew
    leaves another run's records beside, under a name with their time.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        """
        Raises:
            UserError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and resumed_at > 0:
                atomic_write_text(path, "".join(_records_until(path, resumed_at)))
            elif path.is_file():
                written = datetime.fromtimestamp(path.stat().st_mtime)
                path.rename(path.with_name(f"{path.stem}.until-{written:%Y%m%d-%H%M%S-%f}{path.suffix}"))
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--metrics-jsonl {path}: cannot be written ({error.strerror}); give another path"
            ) from None

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _records_until(path: Path, iteration: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # An interrupted write can leave half a line at the end.
    whole = [line for line in lines if line.endswith("\n")]
    return [line for line in whole if json.loads(line).get("iteration", 0) <= iteration]


class TensorBoard:
    """TensorBoard's writer under Megatron-LM's names."""

    def __init__(self, folder: str, queue_size: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=folder, max_queue=queue_size)

    def scalar(self, name: str, value: float, iteration: int, samples: int | None = None) -> None:
        """Write ``value``, and with ``samples`` also Megatron-LM's curve against samples."""
        self._writer.add_scalar(name, value, iteration)
        if samples is not None:
            self._writer.add_scalar(f"{name} vs samples", value, samples)

    def close(self) -> None:
        self._writer.close()


@dataclass
class LossWindow:
    """Sums of the iterations since the last log line."""

    losses: dict[str, float] = field(default_factory=dict)
    weighting_flops: float = 0.0
    """Operations that plain training would not have needed."""
    advanced: int = 0
    skipped: int = 0
    nan: int = 0

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
        return self.advanced + self.skipped

    def averages(self) -> dict[str, float]:
        return {name: total / max(1, self.advanced) for name, total in self.losses.items()}


@dataclass(frozen=True)
class LogLine:
    """The values of one of Megatron-LM's log lines; ours come after them."""

    iteration: int
    train_iters: int
    consumed_samples: int
    skipped_samples: int
    seconds_per_iteration: float
    throughput: float | None
    """Of the language model's steps, in TFLOP/s per GPU."""
    learning_rate: float
    global_batch_size: int
    losses: Mapping[str, float]
    loss_scale: float
    grad_norm: float | None
    num_zeros: float | None
    params_norm: float | None
    skipped_iterations: int
    nan_iterations: int
    extra: Mapping[str, float] = field(default_factory=dict)

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
        parts += [f"{name}: {value:.4g}" for name, value in self.extra.items()]
        return " | ".join(parts) + " |"


def validation_line(prefix: str, loss: float) -> str:
    """Megatron-LM's report of an evaluation, between rules."""
    text = f" validation loss at {prefix} | lm loss value: {loss:.6E} | lm loss PPL: {math.exp(min(20, loss)):.6E} | "
    rule = "-" * (len(text) + 1)
    return f"{rule}\n{text}\n{rule}"


def event_line(event: str) -> str:
    """Megatron-LM's line for the time at which something happened."""
    return f"[{event}] datetime: {timestamp()} "


def say(message: str) -> None:
    """Print a line and flush it, so that a log file shows it at once."""
    print(message, file=sys.stdout, flush=True)
