"""The number of samples of each step: constant, or growing (``--rampup-batch-size``)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class Rampup:
    """Batch sizes that grow over the first samples."""

    start: int
    increment: int
    samples: int
    """Samples over which the batch grows to its final size, in increments of equal length."""


@dataclass(frozen=True)
class BatchSizes:
    """Global batch sizes of a run, by the number of consumed samples."""

    final: int
    """``--global-batch-size``."""
    micro_batch_size: int
    data_parallel_size: int
    rampup: Rampup | None = None
    should_decrease: bool = False
    """Whether sizes are rounded down to multiples of :attr:`unit` (``--decrease-batch-size-if-needed``)."""

    def __post_init__(self) -> None:
        ramp = self.rampup
        if ramp is not None:
            flag = f"--rampup-batch-size {ramp.start} {ramp.increment} {ramp.samples}"
            if ramp.start < 1 or ramp.increment < 1 or ramp.samples < 1:
                raise UserError(f"{flag}: start, increment and samples must be at least 1")
            if ramp.start >= self.final or (self.final - ramp.start) % ramp.increment:
                raise UserError(
                    f"{flag}: no number of increments leads to exactly --global-batch-size {self.final}; change one"
                )
        for size in self.nominal_sizes:
            if self._running(size) < self.unit or self._running(size) % self.unit:
                name = "--global-batch-size" if size == self.final else "--rampup-batch-size: a batch of"
                raise UserError(
                    f"{name} {size} is not divisible by --micro-batch-size {self.micro_batch_size} x data-parallel "
                    f"size {self.data_parallel_size}; change one"
                )

    @property
    def unit(self) -> int:
        """The samples of one microbatch on all replicas; batch sizes are multiples of it."""
        return self.micro_batch_size * self.data_parallel_size

    @property
    def nominal_sizes(self) -> list[int]:
        """All sizes that the flags specify, in order."""
        return (
            [self.final]
            if self.rampup is None
            else [*range(self.rampup.start, self.final, self.rampup.increment), self.final]
        )

    @property
    def running_sizes(self) -> list[int]:
        """All sizes that are used in training, in order."""
        return [self._running(size) for size in self.nominal_sizes]

    @property
    def largest(self) -> int:
        """The largest size that is used in training, which is the last."""
        return self._running(self.final)

    def nominal(self, consumed: int) -> int:
        """Return the size that the flags specify after ``consumed`` samples; if fewer are used, the rest is skipped."""
        ramp = self.rampup
        if ramp is None or consumed > ramp.samples:
            return self.final
        sizes = self.nominal_sizes
        return sizes[int(consumed / (ramp.samples / (len(sizes) - 1)))]

    def running(self, consumed: int) -> int:
        """Return the size of the batch that follows ``consumed`` samples."""
        return self._running(self.nominal(consumed))

    def iterations(self, samples: int, consumed: int = 0) -> int:
        """Return the number of steps of a run of ``samples`` after ``consumed``, without an incomplete last one.

        As in Megatron-LM, samples that :attr:`should_decrease` leaves out of batches count as consumed.
        """
        count = 0
        if self.rampup is not None:
            while consumed <= self.rampup.samples and consumed <= samples:
                consumed += self.nominal(consumed)
                count += 1
        return count + max(0, samples - consumed) // self.final

    def trained_samples(self, iterations: int) -> int:
        """Return the number of samples that the first ``iterations`` steps of a run train on."""
        consumed = trained = 0
        while iterations > 0 and self.rampup is not None and consumed <= self.rampup.samples:
            trained += self.running(consumed)
            consumed += self.nominal(consumed)
            iterations -= 1
        return trained + iterations * self.largest

    def _running(self, size: int) -> int:
        return size - size % self.unit if self.should_decrease else size
