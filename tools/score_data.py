"""Score documents with an exported weighter.

The same as ``megatron-dwm score``.
"""

from megatron_dwm.cli.score import main

if __name__ == "__main__":
    main()
