"""Compare the runs of examples/transfer.sh.

The same as ``megatron-dwm benchmark transfer``.
"""

from megatron_dwm.benchmarks.transfer import main

if __name__ == "__main__":
    main()
