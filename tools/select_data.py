"""Select documents within a budget.

The same as ``megatron-dwm select``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.select")
