"""Compare the test losses of several weightings on the same tokens.

The same as ``megatron-dwm benchmark benefit``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.benchmarks.benefit")
