"""Whether alignments and scores predict the effect of training on subsets.

The same as ``megatron-dwm benchmark lds``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.benchmarks.lds")
