"""Disturb a training run at random moments, and compare its results with those of an undisturbed run.

The same as ``megatron-dwm benchmark chaos``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.benchmarks.chaos")
