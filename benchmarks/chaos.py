"""Disturb a training run at random moments, and compare its results with those of an undisturbed run.

The same as ``megatron-dwm benchmark chaos``.
"""

from megatron_dwm.benchmarks.chaos import main

if __name__ == "__main__":
    main()
