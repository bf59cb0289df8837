"""Pretrain a Megatron-Core GPT with a data weighting model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_dwm.cli.launch import Process, build_trainer, read_run_flags, run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run this rank of a pretraining run; flags are Megatron-LM's, plus ``--dwm-*`` (docs/flags.md)."""

    def program(process: Process) -> None:
        config, device = process.parse(partial(read_run_flags, argv))
        build_trainer(config, device, process).train()

    run_program(program)


if __name__ == "__main__":
    main()
