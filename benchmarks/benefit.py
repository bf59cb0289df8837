"""Compare the test losses of several weightings on the same tokens.

The same as ``megatron-dwm benchmark benefit``.
"""

from megatron_dwm.benchmarks.benefit import main

if __name__ == "__main__":
    main()
