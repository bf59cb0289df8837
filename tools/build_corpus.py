"""Make a corpus of several sources from text that is installed on this machine.

The same as ``megatron-dwm build-corpus``.
"""

from megatron_dwm.cli.build_corpus import main

if __name__ == "__main__":
    main()
