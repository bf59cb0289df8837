"""Measure the time and memory that data weighting costs.

The same as ``megatron-dwm benchmark overhead``; torchrun starts it on several ranks.
"""

from megatron_dwm.benchmarks.overhead import main

if __name__ == "__main__":
    main()
