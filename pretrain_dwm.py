"""Pretrain a Megatron-Core GPT with a data weighting model.

Start it with torchrun or srun; flags are Megatron-LM's, plus --dwm-* (docs/flags.md).
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.pretrain")
