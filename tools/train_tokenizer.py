"""Train a SentencePiece tokenizer on JSON lines.

The same as ``megatron-dwm train-tokenizer``.
"""

from megatron_dwm.cli.train_tokenizer import main

if __name__ == "__main__":
    main()
