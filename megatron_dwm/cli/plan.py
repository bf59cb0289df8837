"""``pretrain_dwm.py --plan``: prints the plan of a run instead of running it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.cli.run_flags import read_run_flags
from megatron_dwm.config.plan import PlanConfig
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.environment import environment_rank


def print_plan(config: PlanConfig, argv: Sequence[str], processes: int | None) -> None:
    """Check the flags of a run and print its plan.

    Args:
        argv: the run's flags.
        processes: value of ``--nproc``.

    Raises:
        UserError: the flags are not valid, or a file cannot be written.
    """
    rank, _, started = environment_rank()
    if rank != 0:  # one process is enough
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: a plan takes no GPU
    run = read_run_flags(argv, config.plan_world_size or processes or started)
    # Imported here, after the flags are known to be good: these imports take seconds.
    from megatron_dwm.plan.plan import make_plan, plan_values
    from megatron_dwm.plan.text import plan_lines

    model_logger = logging.getLogger("megatron_dwm.model")
    model_logger.setLevel(logging.WARNING)  # otherwise every stage would log its construction
    try:
        plan = make_plan(run)
    finally:
        model_logger.setLevel(logging.NOTSET)
    print("\n".join(plan_lines(plan)))
    if config.plan_json is None:
        return
    try:
        atomic_write_text(Path(config.plan_json), json.dumps(plan_values(plan), indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"--plan-json {config.plan_json}: cannot be written ({error.strerror}); give another path"
        ) from None
