"""Measure the time and memory that data weighting costs.

The same as ``megatron-dwm benchmark overhead``; torchrun starts it on several ranks.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.benchmarks.overhead")
