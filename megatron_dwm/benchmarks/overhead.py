"""The cost of data weighting: time, throughput and memory of plain, frozen and bilevel training.

    python benchmarks/overhead.py --json overhead.json
    python benchmarks/overhead.py --micro-batch-sizes 1 2 4
    torchrun --nproc-per-node 4 benchmarks/overhead.py --tensor-model-parallel-size 2 <flags of pretrain_dwm.py>

All modes train one model in one group of processes and take turns, and a ratio is the median over the turns, so that
other work on the machine slows all of them alike. Nothing is saved. The time of a mode is the slowest rank's.

  - plain: the training loop without a weighter (``--dwm-mode off``);
  - bare: megatron-core's schedule, optimizer and learning rate, called in as few lines as possible;
  - frozen: the training loop with a weighter that scores;
  - bilevel: frozen steps, and one step with an outer update every ``--dwm-update-interval``. Both are measured; the
    mode's time is their mean over an interval, and that at other ``--intervals`` follows from them too. With
    ``--steps`` of an interval or more, intervals are also run whole.

Between the turns the parts of a step are timed around the functions that the run itself calls.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.benchmarks.benchmark_flags import parse_benchmark
from megatron_dwm.benchmarks.overhead_flags import OverheadConfig, parse_overhead
from megatron_dwm.benchmarks.overhead_report import cost_lines, table
from megatron_dwm.benchmarks.programs import call
from megatron_dwm.cli.build_trainer import build_trainer
from megatron_dwm.cli.launch import Process, run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a run on the ranks that torchrun or srun has started."""

    def program(process: Process) -> None:
        (options, config), device = process.parse(partial(parse_overhead, argv))
        if options.micro_batch_sizes is not None:
            _, run_flags = parse_benchmark(OverheadConfig, argv, __doc__)
            runs = [_measured_by_itself(options, run_flags, size) for size in options.micro_batch_sizes]
            figures: dict[str, Any] = {"runs": runs}
            text = "\n".join(line for run in runs for line in ["", *cost_lines(run)])
        else:
            from megatron_dwm.benchmarks.overhead_measures import measure  # after the flags: it takes seconds

            figures = measure(build_trainer(config, device, process), options)
            text = table(figures)
        if process.rank == 0:
            print(text, flush=True)
            if options.json_file is not None:
                atomic_write_text(Path(options.json_file), json.dumps(figures, indent=2) + "\n")
                print(options.json_file, flush=True)

    run_program(program, argv)


def _measured_by_itself(options: OverheadConfig, run_flags: Sequence[str], micro_batch_size: int) -> dict[str, Any]:
    """Measure a run with this micro-batch size in a separate process, and return its figures."""
    measuring = ["--steps", options.steps, "--repeats", options.repeats, "--clock", options.clock]
    measuring += ["--intervals", *options.intervals, "--micro-batch-size", micro_batch_size]
    with tempfile.TemporaryDirectory() as folder:
        found, log = Path(folder) / "figures.json", Path(folder) / "log.txt"
        call("benchmark", "overhead", *run_flags, *measuring, "--json", found, log=log)
        figures: dict[str, Any] = json.loads(found.read_text())
    return figures


if __name__ == "__main__":
    main()
