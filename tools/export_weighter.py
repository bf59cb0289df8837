"""Write the weighter of a checkpoint as a Hugging Face folder.

The same as ``megatron-dwm export-weighter``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.export_weighter")
