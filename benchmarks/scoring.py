"""Compare the speed of scoring with that of the classifier alone.

The same as ``megatron-dwm benchmark scoring``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.benchmarks.scoring")
