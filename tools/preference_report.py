"""Report what a run's weighter prefers, when and how strongly, as one HTML page.

The same as ``megatron-dwm report``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.report")
