"""Whether alignments and scores predict what training on some samples does.

The same as ``megatron-dwm benchmark lds``.
"""

from megatron_dwm.benchmarks.lds import main

if __name__ == "__main__":
    main()
