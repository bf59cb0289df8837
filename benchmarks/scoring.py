"""Compare the speed of scoring with that of the classifier alone.

The same as ``megatron-dwm benchmark scoring``.
"""

from megatron_dwm.benchmarks.scoring import main

if __name__ == "__main__":
    main()
