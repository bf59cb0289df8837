"""Kill, stop and starve a training run at random moments, and hold what comes of it against an undisturbed one.

The same as ``megatron-dwm benchmark chaos``.
"""

from megatron_dwm.benchmarks.chaos import main

if __name__ == "__main__":
    main()
