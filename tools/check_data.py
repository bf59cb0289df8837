"""Verify datasets from the first to the last byte.

The same as ``megatron-dwm check-data``.
"""

from megatron_dwm.cli.check_data import main

if __name__ == "__main__":
    main()
