"""Write a Hugging Face model as a checkpoint that pretraining can start from.

The same as ``megatron-dwm import-hf``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.import_hf")
