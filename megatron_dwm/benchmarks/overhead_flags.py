"""Flags of ``benchmarks/overhead.py``, and the run that it measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.benchmarks.benchmark_flags import override, parse_benchmark, without_files
from megatron_dwm.benchmarks.measuring import Clock
from megatron_dwm.config.flags import flag, require_at_least
from megatron_dwm.config.run import RunConfig, parse_run
from megatron_dwm.errors import UserError
from megatron_dwm.weighting.stage_schedule import bilevel_stages

WARMUP_STEPS = 3
"""Steps before anything is measured: the first ones allocate, and Adam's preconditioner needs one."""
ALIGNMENT_TURNS = 2
"""Times that an update under each way of alignment is timed."""
DEFAULT_RUN = (
    "--num-layers 8 --hidden-size 256 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 "
    "--micro-batch-size 2 --global-batch-size 32 --train-iters 3000 --lr 3e-4 "
    "--lr-warmup-iters 10 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 4095 --num-workers 0 --eval-iters 0 --log-interval 3000 "
    "--dwm-update-interval 100"
)
"""The run that is measured if the flags describe no model: short, with the update interval of a long run."""


@dataclass(frozen=True)
class OverheadConfig:
    """Measurement."""

    json_file: str | None = flag(None, "Also write the figures to this JSON file.", "--json")
    steps: int = flag(
        2, "Steps of each mode in a turn; if at least the update interval, whole intervals are timed too."
    )
    repeats: int = flag(12, "Number of repetitions.")
    intervals: list[int] = flag(
        [16, 50, 100],
        "Intervals between outer updates; a run's throughput follows from the time of a weighted iteration and of one "
        "with an update.",
    )
    micro_batch_sizes: list[int] | None = flag(
        None,
        "Measure with each of these micro-batch sizes, one after the other, and print one table; without torchrun.",
    )
    clock: Clock = flag(
        "wall",
        "Clock: wall time, or the processor time of this process, for machines that are busy with other work; it does "
        "not cover GPUs.",
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps repeats")
        for name, values in (("intervals", self.intervals), ("micro-batch-sizes", self.micro_batch_sizes or [1])):
            if not values or min(values) < 1:
                raise UserError(f"--{name} {' '.join(map(str, values))}: give numbers of at least 1")
        if self.json_file is not None and not Path(self.json_file).absolute().parent.is_dir():
            raise UserError(f"--json {self.json_file}: its folder does not exist; create it, or give another file")


def parse_overhead(argv: Sequence[str] | None, world_size: int) -> tuple[OverheadConfig, RunConfig]:
    """Parse the benchmark's flags, and those of the run that it measures.

    Raises:
        UserError: bad flags, or a run that is not bilevel or too short to be measured.
    """
    description = (
        "Measure what data weighting costs. The flags of pretrain_dwm.py are accepted too: they describe the run that "
        "is measured, a small one if --num-layers is not among them."
    )
    options, rest = parse_benchmark(OverheadConfig, argv, description)
    if not any(word.split("=")[0] == "--num-layers" for word in rest):
        rest = override(DEFAULT_RUN.split(), rest)
    if options.micro_batch_sizes is not None and world_size > 1:
        given = " ".join(map(str, options.micro_batch_sizes))
        raise UserError(f"--micro-batch-sizes {given} on {world_size} ranks: measure one --micro-batch-size at a time")
    for size in options.micro_batch_sizes or []:
        parse_run(override(rest, ["--micro-batch-size", str(size)]), world_size)
    config = parse_run(rest, world_size)
    if not config.weighting.has_trainable_weighter:
        raise UserError(f"--dwm-mode {config.weighting.dwm_mode}: all modes are measured; leave the flag out")
    stages = bilevel_stages(config.weighting, config.train_iters)
    if (needed := batches_read(options, stages.update_interval)) > config.train_iters:
        raise UserError(
            f"--train-iters {config.train_iters}: --steps {options.steps} and --repeats {options.repeats} read "
            f"{needed} batches; raise the former or lower the others"
        )
    return options, without_files(config)


def batches_read(options: OverheadConfig, interval: int) -> int:
    """Return the number of training batches that measuring reads."""
    whole = options.steps // interval * interval
    turns = options.repeats * (3 * options.steps + 1 + whole + 2)  # two more for the parts
    alignments = 3 * (ALIGNMENT_TURNS + 1)  # three ways, each of them tried once
    # Memory measures three steps twice, four are counted after one of each, one batch is for the passes.
    return WARMUP_STEPS + 1 + turns + alignments + 6 + 8 + 1
