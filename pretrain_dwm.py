"""Pretrain a Megatron-Core GPT with a data weighting model.

Start it with torchrun or srun; flags are Megatron-LM's, plus --dwm-* (docs/flags.md).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.run import parse_run
from megatron_dwm.errors import run_cli
from megatron_dwm.runtime.device import environment_rank, require_megatron_core, select_device
from megatron_dwm.runtime.startup_sync import StartupSync


def main() -> None:
    # megatron-core warns on every process that optional packages are missing, and of torch interfaces it still uses.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer_engine).*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(load_state_dict|ShardedTensor).*")
    rank, local_rank, world_size = environment_rank()
    startup_sync = StartupSync(rank, world_size)
    with startup_sync.phase("flags"):
        require_megatron_core()
        config = parse_run(None, world_size, speaks=rank == 0, read_saved=_read_saved)
        device = select_device(local_rank)
        if device.type == "cpu":  # advice on CUDA's queues
            warnings.filterwarnings("ignore", message=".*async grad allreduce.*")

    from megatron_dwm.training.setup import build_trainer, read_inputs

    with startup_sync.phase("inputs"):
        inputs = read_inputs(config, reads_data=rank == 0)
    trainer = build_trainer(config, inputs, device, startup_sync)
    trainer.train()
    dist.destroy_process_group()


def _read_saved(flags: CheckpointConfig) -> Mapping[str, Any]:
    # Only --use-checkpoint-args reads a checkpoint before the configuration is whole, and imports all it takes.
    from megatron_dwm.training.checkpoint import saved_arguments

    return saved_arguments(flags)


if __name__ == "__main__":
    run_cli(main, speaks=int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0)
