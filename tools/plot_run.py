"""Draw the losses and the mean weight of each data source of a run as one PNG.

The same as ``megatron-dwm plot``.
"""

from megatron_dwm.cli.plot import main

if __name__ == "__main__":
    main()
