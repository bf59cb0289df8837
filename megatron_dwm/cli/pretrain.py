"""Pretrain a Megatron-Core GPT with a data weighting model.

Under torchrun, srun or mpirun this process is one rank of the run. ``--nproc N`` starts N ranks on this machine
instead. ``--plan`` prints the plan of the run, and does not train.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from megatron_dwm.cli.command import run_command
from megatron_dwm.cli.launch import Process, build_trainer, read_run_flags, run_program
from megatron_dwm.cli.local_launcher import launch_locally, split_nproc
from megatron_dwm.cli.plan import print_plan, split_plan
from megatron_dwm.errors import run_cli
from megatron_dwm.runtime.logging import configure_logging


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain; flags are Megatron-LM's, plus ``--dwm-*`` (docs/flags.md) and ``--nproc``."""

    def launch() -> None:
        processes, rest = split_nproc(sys.argv[1:] if argv is None else argv)
        plan, rest = split_plan(rest)
        if plan.plan:
            run_command(partial(print_plan, plan, rest, processes))
            return
        if processes is not None:
            configure_logging()
            raise SystemExit(launch_locally("megatron_dwm.cli.pretrain", processes, rest))
        run_program(partial(pretrain, rest), rest)

    run_cli(launch)


def pretrain(argv: Sequence[str], process: Process) -> None:
    """Run one rank of a pretraining run."""
    config, device = process.parse(partial(read_run_flags, argv))
    trainer = build_trainer(config, device, process)
    if config.checkpoint.ckpt_convert_format is None:
        trainer.train()
    else:
        trainer.convert()


if __name__ == "__main__":
    main()
