"""How much of a classifier's own speed scoring reaches.

The same as ``megatron-dwm benchmark scoring``.
"""

from megatron_dwm.benchmarks.scoring import main

if __name__ == "__main__":
    main()
