"""Tokenize JSON lines into Megatron's indexed datasets.

The same as ``megatron-dwm preprocess``.
"""

from megatron_dwm.cli.preprocess import main

if __name__ == "__main__":
    main()
