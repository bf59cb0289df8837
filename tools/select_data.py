"""Select documents within a budget.

The same as ``megatron-dwm select``.
"""

from megatron_dwm.cli.select import main

if __name__ == "__main__":
    main()
