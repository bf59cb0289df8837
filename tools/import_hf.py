"""Write a Hugging Face model as a checkpoint that pretraining can start from.

The same as ``megatron-dwm import-hf``.
"""

from megatron_dwm.cli.import_hf import main

if __name__ == "__main__":
    main()
