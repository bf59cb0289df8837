"""Pretrain a Megatron-Core GPT with a data weighting model.

Under torchrun, srun or mpirun this process is one rank of the run. ``--nproc N`` starts N ranks on this machine
instead. ``--plan`` prints the plan of the run, and does not train.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

from megatron_dwm.cli.build_trainer import build_trainer
from megatron_dwm.cli.command import hide_warnings, run_command
from megatron_dwm.cli.launch import Process, run_program
from megatron_dwm.cli.local_launcher import launch_locally
from megatron_dwm.cli.plan import print_plan
from megatron_dwm.cli.run_flags import read_run_flags
from megatron_dwm.config.flags import split
from megatron_dwm.config.plan import PlanConfig
from megatron_dwm.config.start import StartConfig
from megatron_dwm.errors import UserError, run_cli
from megatron_dwm.runtime.environment import environment_rank
from megatron_dwm.runtime.logging import configure_logging


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain; flags are Megatron-LM's, plus ``--dwm-*`` (docs/flags.md) and ``--nproc``."""

    def launch() -> None:
        words = sys.argv[1:] if argv is None else argv
        if environment_rank()[2] > 1 and "MASTER_ADDR" in os.environ:
            run_program(partial(run_rank, words), words)
            return
        start, rest = split(words, StartConfig)
        plan, rest = split(rest, PlanConfig)
        if plan.plan:
            run_command(partial(print_plan, plan, rest, start.nproc))
            return
        if start.nproc is not None:
            configure_logging()
            raise SystemExit(launch_locally("megatron_dwm.cli.pretrain", start.nproc, rest))
        run_program(partial(pretrain, rest), rest)

    run_cli(launch)


def run_rank(argv: Sequence[str], process: Process) -> None:
    """Run one of several ranks that a launcher has started; a wrong flag on one rank ends all."""
    with process.startup_sync.phase("launch"):
        start, rest = split(argv, StartConfig)
        if start.nproc is not None:
            raise UserError(
                f"--nproc {start.nproc}: a launcher has started {process.world_size} processes; leave it out"
            )
        plan, rest = split(rest, PlanConfig)
    if not plan.plan:
        pretrain(rest, process)
        return
    hide_warnings()
    with process.startup_sync.phase("plan"):
        print_plan(plan, rest, None)
    process.startup_sync.leave_together("plan")


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
