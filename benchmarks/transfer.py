"""Compare the runs of examples/transfer.sh.

The same as ``megatron-dwm benchmark transfer``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.benchmarks.transfer")
