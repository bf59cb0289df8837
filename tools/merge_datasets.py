"""Merge the indexed datasets of a folder into one.

The same as ``megatron-dwm merge-datasets``.
"""

from megatron_dwm.cli.merge_datasets import main

if __name__ == "__main__":
    main()
