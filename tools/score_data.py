"""Score documents with an exported weighter.

The same as ``megatron-dwm score``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.score")
