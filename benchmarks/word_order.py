"""Whether a weighter can distinguish text from its shuffled words.

The same as ``megatron-dwm benchmark word-order``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.benchmarks.word_order")
