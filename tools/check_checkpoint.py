"""Verify checkpoints from the first to the last byte.

The same as ``megatron-dwm check-checkpoint``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.check_checkpoint")
