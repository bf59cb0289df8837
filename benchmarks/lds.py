"""Whether alignments and scores predict the effect of training on subsets.

The same as ``megatron-dwm benchmark lds``.
"""

from megatron_dwm.benchmarks.lds import main

if __name__ == "__main__":
    main()
