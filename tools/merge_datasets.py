"""Merge the indexed datasets of a folder into one.

The same as ``megatron-dwm merge-datasets``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.merge_datasets")
