"""Draw the losses and the mean weight of each data source of a run as one PNG.

The same as ``megatron-dwm plot``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.plot")
