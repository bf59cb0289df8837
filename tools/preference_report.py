"""Report what a run's weighter prefers, when and how strongly, as one HTML page.

The same as ``megatron-dwm report``.
"""

from megatron_dwm.cli.report import main

if __name__ == "__main__":
    main()
