"""Tokenize JSON lines into Megatron's indexed datasets.

The same as ``megatron-dwm preprocess``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.preprocess")
