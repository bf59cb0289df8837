"""Whether a weighter can distinguish text from its shuffled words.

The same as ``megatron-dwm benchmark word-order``.
"""

from megatron_dwm.benchmarks.word_order import main

if __name__ == "__main__":
    main()
