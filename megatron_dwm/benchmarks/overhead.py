"""What data weighting costs: time, throughput and memory of plain, frozen and bilevel training, side by side.

    python benchmarks/overhead.py --json overhead.json
    torchrun --nproc-per-node 4 benchmarks/overhead.py --tensor-model-parallel-size 2 <flags of pretrain_dwm.py>

All modes train one model in one group of processes and take turns, and a ratio is the median over the turns, so that
other work on the machine slows all of them alike. Nothing is saved. The time of a mode is the slowest rank's.

  - plain: the training loop without a weighter (``--dwm-mode off``);
  - bare: megatron-core's schedule, optimizer and learning rate, called by the fewest lines that do it;
  - frozen: the training loop with a weighter that scores;
  - bilevel: frozen steps, and one step with an outer update every ``--dwm-update-interval``. Both are measured; the
    mode's time is their mean over an interval. With ``--steps`` of an interval or more, intervals are also run whole.

Between the turns the parts of a step are timed around the functions that the run itself calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.benchmarks.overhead_flags import parse_overhead
from megatron_dwm.benchmarks.overhead_report import table
from megatron_dwm.cli.launch import Process, build_trainer, run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a run on the ranks that torchrun or srun has started."""

    def program(process: Process) -> None:
        (options, config), device = process.parse(partial(parse_overhead, argv))
        from megatron_dwm.benchmarks.overhead_measures import measure  # after the flags: this import takes seconds

        figures = measure(build_trainer(config, device, process), options)
        if process.rank == 0:
            print(table(figures), flush=True)
            if options.json_file is not None:
                atomic_write_text(Path(options.json_file), json.dumps(figures, indent=2) + "\n")
                print(options.json_file, flush=True)

    run_program(program, argv)


if __name__ == "__main__":
    main()
