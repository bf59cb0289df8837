"""Write the language model of a checkpoint as a Hugging Face folder.

The same as ``megatron-dwm export-hf``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.export_hf")
