"""Train a SentencePiece tokenizer on JSON lines.

The same as ``megatron-dwm train-tokenizer``.
"""

from megatron_dwm.cli.dispatch import run_module

if __name__ == "__main__":
    run_module("megatron_dwm.cli.train_tokenizer")
