"""Make a corpus of several sources from text that is installed on this machine.

The same as ``megatron-dwm build-corpus``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.build_corpus")
